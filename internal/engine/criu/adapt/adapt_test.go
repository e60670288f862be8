package adapt_test

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	sk_inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	sk_opts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/engine/criu/adapt"
	"podstasis.dev/stasis/internal/nodeapi"
)

// States of TCP, as Linux numbers them.
const (
	established = 1
	synSent     = 2
	finWait2    = 5
	closed      = 7
	closeWait   = 8
	lastAck     = 9
	listening   = 10
)

// sock is a socket in a few words, such as {tcp, established, "10.0.0.1:80", "10.9.9.9:4000"}.
type sock struct {
	proto, state uint32
	src, dst     string
}

const (
	tcp = 6
	udp = 17
)

func words(a netip.Addr) (w []uint32) {
	for b := a.AsSlice(); len(b) > 0; b = b[4:] {
		w = append(w, binary.LittleEndian.Uint32(b))
	}
	return w
}

func address(w []uint32, port uint32) string {
	var b []byte
	for _, word := range w {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(port)).String()
}

func (s sock) entry(ino uint32) *fdinfo.FileEntry {
	src, dst := netip.MustParseAddrPort(s.src), netip.MustParseAddrPort(s.dst)
	family := uint32(2)
	if src.Addr().BitLen() == 128 {
		family = 10
	}
	f := &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: proto.Uint32(ino), Isk: &sk_inet.InetSkEntry{
		Id: proto.Uint32(ino), Ino: proto.Uint32(ino), Family: proto.Uint32(family), Type: proto.Uint32(1), Proto: proto.Uint32(s.proto),
		State: proto.Uint32(s.state), SrcPort: proto.Uint32(uint32(src.Port())), DstPort: proto.Uint32(uint32(dst.Port())),
		Flags: proto.Uint32(0), Backlog: proto.Uint32(0), SrcAddr: words(src.Addr()), DstAddr: words(dst.Addr()),
		Fown: &fown.FownEntry{}, Opts: &sk_opts.SkOptsEntry{},
	}}
	// A field of a CRIU that is newer than this code.
	f.Isk.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 7))
	return f
}

func image(magic images.Magic, entries ...proto.Message) []byte {
	b := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, images.Common), uint32(magic))
	for _, e := range entries {
		data, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(e)
		if err != nil {
			panic(err)
		}
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	return b
}

func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, name), data, 0o600)); err != nil {
		t.Fatal(err)
	}
}

// pod writes the images of containers that have these sockets.
func pod(t *testing.T, containers map[string][]sock) adapt.Pod {
	t.Helper()
	root := t.TempDir()
	p := adapt.Pod{ImageDirs: map[string]string{}, Was: addresses("10.0.0.1", "fd00::1"), Is: addresses("10.0.0.2", "fd00::2")}
	for name, socks := range containers {
		dir := filepath.Join(root, name)
		entries := []proto.Message{&fdinfo.FileEntry{Type: fdinfo.FdTypes_EVENTFD.Enum(), Id: proto.Uint32(99), Efd: &eventfd.EventfdFileEntry{
			Id: proto.Uint32(99), Flags: proto.Uint32(0), Fown: &fown.FownEntry{}, Counter: proto.Uint64(5),
		}}}
		for i, s := range socks {
			entries = append(entries, s.entry(uint32(i+1)))
		}
		write(t, dir, "files.img", image(images.Files, entries...))
		write(t, dir, "pstree.img", image(images.PSTree))
		write(t, dir, "pages-1.img", []byte("memory of "+name))
		p.ImageDirs[name] = dir
	}
	return p
}

func addresses(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// adapted adapts a container's images, and returns its sockets as they are then.
func adapted(t *testing.T, p adapt.Pod, name string) (*nodeapi.ContainerRestore, []string, string) {
	t.Helper()
	before, err := os.ReadFile(filepath.Join(p.ImageDirs[name], "files.img"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "adapted")
	answer, err := p.Container(context.Background(), name, dir)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var socks []string
	others := 0
	if err := images.New(root.FS(), 1<<20).Entries(context.Background(), "files.img", images.Files, func(entry []byte) error {
		f := new(fdinfo.FileEntry)
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(entry, f); err != nil {
			return err
		}
		e := f.GetIsk()
		if e == nil {
			others++
			return nil
		}
		if len(e.ProtoReflect().GetUnknown()) == 0 {
			t.Errorf("socket %d lost a field", e.GetId())
		}
		socks = append(socks, fmt.Sprintf("%d %s %s", e.GetState(), address(e.SrcAddr, e.GetSrcPort()), address(e.DstAddr, e.GetDstPort())))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if others != 1 {
		t.Errorf("%d of 1 other files are left", others)
	}
	if after, err := os.ReadFile(filepath.Join(p.ImageDirs[name], "files.img")); err != nil || !slices.Equal(after, before) {
		t.Error("the checkpoint was changed")
	}
	if memory, err := os.ReadFile(filepath.Join(dir, "pages-1.img")); err != nil || string(memory) != "memory of "+name {
		t.Errorf("memory is %q, %v", memory, err)
	}
	return answer, socks, dir
}

func TestSocketsMoveToTheNewPodsAddress(t *testing.T) {
	for _, test := range []struct {
		what string
		was  sock
		want string
	}{
		{"a listener on all addresses stays", sock{tcp, listening, "0.0.0.0:80", "0.0.0.0:0"}, "10 0.0.0.0:80 0.0.0.0:0"},
		{"a listener on loopback stays", sock{tcp, listening, "127.0.0.1:80", "0.0.0.0:0"}, "10 127.0.0.1:80 0.0.0.0:0"},
		{"a listener on the Pod's address moves", sock{tcp, listening, "10.0.0.1:80", "0.0.0.0:0"}, "10 10.0.0.2:80 0.0.0.0:0"},
		{"so does one on its IPv6 address", sock{tcp, listening, "[fd00::1]:80", "[::]:0"}, "10 [fd00::2]:80 [::]:0"},
		{"and one on its IPv4 address in IPv6", sock{tcp, listening, "[::ffff:10.0.0.1]:80", "[::]:0"}, "10 [::ffff:10.0.0.2]:80 [::]:0"},
		{"a UDP socket speaks from the new address to where it did", sock{udp, established, "10.0.0.1:5353", "10.9.9.9:53"}, "1 10.0.0.2:5353 10.9.9.9:53"},
		{"one that speaks to itself goes on to", sock{udp, established, "10.0.0.1:5353", "10.0.0.1:5354"}, "1 10.0.0.2:5353 10.0.0.2:5354"},
		{"who was connecting goes on to connect", sock{tcp, synSent, "10.0.0.1:4000", "10.9.9.9:80"}, "2 10.0.0.2:4000 10.9.9.9:80"},
		{"a socket that is bound and no more moves", sock{tcp, closed, "10.0.0.1:4000", "0.0.0.0:0"}, "7 10.0.0.2:4000 0.0.0.0:0"},
	} {
		_, socks, _ := adapted(t, pod(t, map[string][]sock{"a": {test.was}}), "a")
		if !slices.Equal(socks, []string{test.want}) {
			t.Errorf("%s: it is %q, want %q", test.what, socks, test.want)
		}
	}
}

func TestConnectionsToOtherPodsLeadToAPortThatNobodyHas(t *testing.T) {
	for _, test := range []struct {
		what string
		was  sock
		want string
	}{
		{"one that is open", sock{tcp, established, "10.0.0.1:80", "10.9.9.9:4000"}, "1 10.0.0.2:80 10.0.0.2:65533"},
		{"one that was accepted as IPv6", sock{tcp, established, "[::ffff:10.0.0.1]:80", "[::ffff:10.9.9.9]:4000"}, "1 [::ffff:10.0.0.2]:80 [::ffff:10.0.0.2]:65533"},
		{"one of IPv6", sock{tcp, established, "[fd00::1]:80", "[fd00::99]:4000"}, "1 [fd00::2]:80 [fd00::2]:65533"},
		{"one half-closed here", sock{tcp, finWait2, "10.0.0.1:80", "10.9.9.9:4000"}, "1 10.0.0.2:80 10.0.0.2:65533"},
		{"one half-closed there", sock{tcp, closeWait, "10.0.0.1:80", "10.9.9.9:4000"}, "1 10.0.0.2:80 10.0.0.2:65533"},
		{"one that both had closed is no connection", sock{tcp, lastAck, "10.0.0.1:80", "10.9.9.9:4000"}, "7 10.0.0.2:0 10.9.9.9:0"},
		{"one on loopback whose other end nobody had accepted", sock{tcp, established, "127.0.0.1:80", "127.0.0.1:4000"}, "1 127.0.0.1:80 127.0.0.1:65533"},
	} {
		// 65535 and 65534 are taken: by a listener, and as what somebody is connected to.
		p := pod(t, map[string][]sock{"a": {test.was}, "b": {{tcp, listening, "0.0.0.0:65535", "0.0.0.0:0"}, {udp, established, "0.0.0.0:9", "10.9.9.9:65534"}}})
		answer, socks, _ := adapted(t, p, "a")
		if !slices.Equal(socks, []string{test.want}) {
			t.Errorf("%s: it is %q, want %q", test.what, socks, test.want)
		}
		if len(answer.HoldDuring)+len(answer.HoldAfter) != 0 {
			t.Errorf("%s: held are %v, %v", test.what, answer.HoldDuring, answer.HoldAfter)
		}
	}
	two := sock{tcp, established, "10.0.0.1:80", "10.9.9.9:4000"}
	_, socks, _ := adapted(t, pod(t, map[string][]sock{"a": {two, {two.proto, two.state, two.src, "10.9.9.9:4001"}}}), "a")
	if slices.Sort(socks); len(slices.Compact(socks)) != 2 {
		t.Errorf("two connections became %q", socks)
	}
}

func TestConnectionsWithinThePodLiveOnAndAreHeldUntilBothEndsAreThere(t *testing.T) {
	containers := map[string][]sock{
		"a": {
			{tcp, established, "127.0.0.1:80", "127.0.0.1:4000"}, // to b
			{tcp, established, "10.0.0.1:80", "10.0.0.1:4001"},   // to b, over the Pod's address
			{tcp, established, "127.0.0.1:81", "127.0.0.1:4002"}, // to itself
			{tcp, established, "127.0.0.1:4002", "127.0.0.1:81"},
		},
		"b": {
			{tcp, established, "127.0.0.1:4000", "127.0.0.1:80"},
			{tcp, established, "[::ffff:10.0.0.1]:4001", "[::ffff:10.0.0.1]:80"},
		},
	}
	p := pod(t, containers)
	first, socks, _ := adapted(t, p, "a")
	if want := []string{"1 127.0.0.1:80 127.0.0.1:4000", "1 10.0.0.2:80 10.0.0.2:4001", "1 127.0.0.1:81 127.0.0.1:4002", "1 127.0.0.1:4002 127.0.0.1:81"}; !slices.Equal(socks, want) {
		t.Errorf("a's are %q", socks)
	}
	held := fmt.Sprint(first.HoldDuring)
	if held != "[{127.0.0.1:80 127.0.0.1:4000} {10.0.0.2:80 10.0.0.2:4001}]" || fmt.Sprint(first.HoldAfter) != held {
		t.Errorf("while only a is there, held are %v, then %v", first.HoldDuring, first.HoldAfter)
	}
	p.Created = []string{"a"}
	second, socks, _ := adapted(t, p, "b")
	if want := []string{"1 127.0.0.1:4000 127.0.0.1:80", "1 [::ffff:10.0.0.2]:4001 [::ffff:10.0.0.2]:80"}; !slices.Equal(socks, want) {
		t.Errorf("b's are %q", socks)
	}
	if fmt.Sprint(second.HoldDuring) != held || len(second.HoldAfter) != 0 {
		t.Errorf("until b is there, held are %v, then %v", second.HoldDuring, second.HoldAfter)
	}
}

func TestSystemVObjectsComeBackWithTheFirstContainerAlone(t *testing.T) {
	p := pod(t, map[string][]sock{"a": nil, "b": nil})
	segments := image(images.IPCNSShm, &eventfd.EventfdFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(0), Fown: &fown.FownEntry{}, Counter: proto.Uint64(0)})
	for _, dir := range p.ImageDirs {
		write(t, dir, "ipcns-shm-11.img", segments)
		write(t, dir, "ipcns-sem-11.img", append(image(images.IPCNSSem), "semaphores"...))
		write(t, dir, "ipcns-msg-11.img", append(image(images.IPCNSMsg), "messages"...))
	}
	has := func(dir, name string) string {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data[8:])
	}
	answer, _, dir := adapted(t, p, "a")
	if answer.SysVIPC != nodeapi.SysVIPCCreate || has(dir, "ipcns-sem-11.img") != "semaphores" || has(dir, "ipcns-msg-11.img") != "messages" {
		t.Errorf("the first: %s, %q, %q", answer.SysVIPC, has(dir, "ipcns-sem-11.img"), has(dir, "ipcns-msg-11.img"))
	}
	p.Created = []string{"a"}
	answer, _, dir = adapted(t, p, "b")
	if answer.SysVIPC != nodeapi.SysVIPCJoin || has(dir, "ipcns-sem-11.img") != "" || has(dir, "ipcns-msg-11.img") != "" || has(dir, "ipcns-shm-11.img") != string(segments[8:]) {
		t.Errorf("the second: %s, %q, %q", answer.SysVIPC, has(dir, "ipcns-sem-11.img"), has(dir, "ipcns-msg-11.img"))
	}
	write(t, p.ImageDirs["b"], "ipcns-shm-11.img", image(images.IPCNSShm))
	if answer, _, _ = adapted(t, p, "b"); answer.SysVIPC != nodeapi.SysVIPCKeep {
		t.Errorf("one without segments: %s", answer.SysVIPC)
	}
}

func TestTheFirstContainerLearnsTheHighestPIDOfThePod(t *testing.T) {
	p := pod(t, map[string][]sock{"a": nil, "b": nil})
	process := func(pid, pgid, sid uint32, threads ...uint32) proto.Message {
		return &pstree.PstreeEntry{Pid: &pid, Ppid: proto.Uint32(0), Pgid: &pgid, Sid: &sid, Threads: append(threads, pid)}
	}
	for want, entries := range map[int][]proto.Message{
		7:  {process(7, 3, 2), process(5, 3, 2, 6)},
		8:  {process(7, 3, 2), process(5, 3, 2, 8)},
		9:  {process(7, 9, 2)}, // the leader has ended, its group has not
		10: {process(7, 9, 10)},
	} {
		write(t, p.ImageDirs["a"], "pstree.img", image(images.PSTree, process(3, 3, 3)))
		write(t, p.ImageDirs["b"], "pstree.img", image(images.PSTree, entries...))
		p.Created = nil
		if answer, _, _ := adapted(t, p, "a"); answer.LastPID != want {
			t.Errorf("the highest of %v: %d", entries, answer.LastPID)
		}
		p.Created = []string{"a"}
		if answer, _, _ := adapted(t, p, "b"); answer.LastPID != 0 {
			t.Errorf("once a is restored: %d", answer.LastPID)
		}
	}
}

func TestImagesThatAreNotWhatTheySayAreRefused(t *testing.T) {
	for what, spoil := range map[string]func(dir string){
		"no table of files":     func(dir string) { os.Remove(filepath.Join(dir, "files.img")) },
		"a table of another":    func(dir string) { write(t, dir, "files.img", image(images.PSTree)) },
		"no processes":          func(dir string) { os.Remove(filepath.Join(dir, "pstree.img")) },
		"a table that ends":     func(dir string) { write(t, dir, "files.img", append(image(images.Files), 9, 0, 0, 0, 1)) },
		"a table without sense": func(dir string) { write(t, dir, "files.img", append(image(images.Files), 2, 0, 0, 0, 0xff, 0xff)) },
		"a table that leads out": func(dir string) {
			os.Remove(filepath.Join(dir, "files.img"))
			os.Symlink("/etc/passwd", filepath.Join(dir, "files.img"))
		},
	} {
		p := pod(t, map[string][]sock{"a": nil})
		spoil(p.ImageDirs["a"])
		if _, err := p.Container(context.Background(), "a", filepath.Join(t.TempDir(), "adapted")); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := pod(t, nil).Container(context.Background(), "a", filepath.Join(t.TempDir(), "adapted")); err == nil || !strings.Contains(err.Error(), "no images of container a") {
		t.Errorf("a container that is not there: %v", err)
	}
}

func TestACutThroughAConnectionIsFound(t *testing.T) {
	const finWait1 = 4
	pods := map[uint32]adapt.Pod{}
	for _, state := range []uint32{established, finWait1} {
		pods[state] = pod(t, map[string][]sock{
			"a": {{tcp, state, "127.0.0.1:80", "127.0.0.1:4000"}},
			"b": {{tcp, established, "127.0.0.1:4000", "127.0.0.1:80"}},
		})
	}
	part := func(received, written, unacknowledged, unsent uint32) []byte {
		return append(image(images.TCPStream, &tcp_stream.TcpStreamEntry{
			InqLen: proto.Uint32(0), InqSeq: proto.Uint32(received), OutqLen: proto.Uint32(unacknowledged), OutqSeq: proto.Uint32(written),
			UnsqLen: proto.Uint32(unsent),
			OptMask: proto.Uint32(0), SndWscale: proto.Uint32(0), MssClamp: proto.Uint32(0),
		}), "what is in the queues, which is no entry"...)
	}
	stream := func(received, written, unacknowledged uint32) []byte {
		return part(received, written, unacknowledged, 0)
	}
	const wrapped = 0xfffffff0
	for _, test := range []struct {
		what string
		a, b []byte
		torn bool
		ends uint32 // a's state, if it is not established
	}{
		{what: "all that was sent is received", a: part(100, 500, 20, 10), b: stream(490, 100, 0)},
		{what: "what was not sent yet is received", a: part(100, 500, 20, 10), b: stream(491, 100, 0), torn: true},
		{what: "a byte that was acknowledged was never received", a: stream(100, 500, 20), b: stream(479, 100, 0), torn: true},
		// The end of a's stream is number 500.
		{what: "nothing of what is under way is received", a: stream(100, 501, 20), b: stream(480, 100, 0), ends: finWait1},
		{what: "all but the end is received", a: stream(100, 501, 20), b: stream(500, 100, 0), ends: finWait1},
		{what: "all and the end is received", a: stream(100, 501, 20), b: stream(501, 100, 0), ends: finWait1},
		{what: "more than the end is received", a: stream(100, 501, 20), b: stream(502, 100, 0), torn: true, ends: finWait1},
		{"all was received and acknowledged", stream(100, 500, 0), stream(500, 100, 0), false, 0},
		{"some was written and is not received", stream(100, 500, 20), stream(480, 100, 0), false, 0},
		{"some was received and is not acknowledged", stream(100, 500, 20), stream(490, 100, 0), false, 0},
		{"the numbers wrap", stream(100, 5, 21), stream(wrapped, 100, 0), false, 0},
		{"what was acknowledged was never received", stream(100, 500, 0), stream(480, 100, 0), true, 0},
		{"more was received than written", stream(100, 500, 0), stream(520, 100, 0), true, 0},
		{"the other way round", stream(90, 500, 0), stream(500, 100, 0), true, 0},
		{"nothing is kept of one that opens", nil, stream(500, 100, 0), false, 0},
	} {
		p := pods[cmp.Or(test.ends, established)]
		for name, data := range map[string][]byte{"a": test.a, "b": test.b} {
			os.Remove(filepath.Join(p.ImageDirs[name], "tcp-stream-1.img"))
			if data != nil {
				write(t, p.ImageDirs[name], "tcp-stream-1.img", data)
			}
		}
		err := adapt.CheckConnections(context.Background(), p.ImageDirs)
		if errors.Is(err, criu.ErrTorn) != test.torn || !test.torn && err != nil {
			t.Errorf("%s: %v", test.what, err)
		}
	}
}
