package criu

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"google.golang.org/protobuf/proto"
)

func TestATimerWithAnIntervalThatHasExpiredUnreadIsArmedAgain(t *testing.T) {
	owner := &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)}
	timer := func(ticks, seconds, nanoseconds, every, and uint64) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_TIMERFD.Enum(), Id: proto.Uint32(7), Tfd: &timerfd.TimerfdEntry{
			Id: proto.Uint32(7), Flags: proto.Uint32(2), Fown: owner, Clockid: proto.Uint32(1), Ticks: &ticks, SettimeFlags: proto.Uint32(0),
			Vsec: &seconds, Vnsec: &nanoseconds, Isec: &every, Insec: &and,
		}}
	}
	entries := []*fdinfo.FileEntry{
		timer(1, 0, 0, 0, 50_000_000), // expired, with an interval
		timer(3, 0, 0, 5, 0),          // likewise
		timer(1, 0, 0, 0, 0),          // expired, once
		timer(0, 0, 0, 0, 50_000_000), // never armed
		timer(1, 0, 20, 0, 50_000_000),
		timer(1, 9, 0, 0, 50_000_000),
		{Type: fdinfo.FdTypes_EVENTFD.Enum(), Id: proto.Uint32(8), Efd: &eventfd.EventfdFileEntry{Id: proto.Uint32(8), Flags: proto.Uint32(0), Fown: owner, Counter: proto.Uint64(41)}},
	}
	data := []byte("\x19\x43\x56\x54\x02\x03\x03\x56")
	for _, e := range entries {
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		data = append(binary.LittleEndian.AppendUint32(data, uint32(len(b))), b...)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, filesImage), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := armTimers(dir); err != nil {
		t.Fatal(err)
	}
	out, err := os.ReadFile(filepath.Join(dir, filesImage))
	if err != nil {
		t.Fatal(err)
	}
	out = out[imageHead:]
	for i, e := range entries {
		size := binary.LittleEndian.Uint32(out)
		var got fdinfo.FileEntry
		if err := proto.Unmarshal(out[4:4+size], &got); err != nil {
			t.Fatal(err)
		}
		out = out[4+size:]
		if i < 2 {
			e.Tfd.Vnsec = proto.Uint64(1)
		}
		if !proto.Equal(e, &got) {
			t.Errorf("entry %d is %v, want %v", i, &got, e)
		}
	}
	if len(out) != 0 {
		t.Errorf("%d bytes are left", len(out))
	}
}

func TestAnImageOfFilesThatIsNoneIsRefused(t *testing.T) {
	for _, data := range []string{"", "short", "12345678\x09", "12345678\x09\x00\x00\x00abc", "12345678\x02\x00\x00\x00\x62\x7f", "12345678\x01\x00\x00\x00\x80", "12345678\x02\x00\x00\x00\x63\x01"} {
		if _, _, err := withTimersArmed([]byte(data)); !errors.Is(err, errFilesImage) {
			t.Errorf("%q: %v", data, err)
		}
	}
}
