package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/criservice"
)

func TestCheckpointsStayWithinTheirShareAndLeaveTheDiskFreeEnough(t *testing.T) {
	const gib = 1 << 30
	limits := DiskLimits{MaxShare: 0.5, MinFree: 0.15}
	for name, c := range map[string]struct {
		disk  diskState
		bytes int64
		says  string
	}{
		"room":                               {diskState{total: 100 * gib, free: 60 * gib}, 10 * gib, ""},
		"just room":                          {diskState{total: 100 * gib, free: 60 * gib, checkpoints: 5 * gib}, 45 * gib, ""},
		"more than what stays free":          {diskState{total: 100 * gib, free: 20 * gib}, 6 * gib, "15Gi of that stay free (--min-free-disk"},
		"others are being taken":             {diskState{total: 100 * gib, free: 30 * gib, reserved: 10 * gib}, 6 * gib, "beside 10Gi for others"},
		"more than the share":                {diskState{total: 100 * gib, free: 60 * gib, checkpoints: 45 * gib}, 6 * gib, "take 45Gi of the 50Gi that they may (--max-disk-share)"},
		"the share with those being written": {diskState{total: 100 * gib, free: 60 * gib, checkpoints: 40 * gib, reserved: 5 * gib}, 6 * gib, "--max-disk-share"},
	} {
		t.Run(name, func(t *testing.T) {
			err := limits.admit(c.disk, c.bytes)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}

func TestRoomThatIsReservedIsNotGivenTwiceUntilItIsReleased(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, ".partial-x")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := newRoom(DiskLimits{MaxShare: 1}, root)
	disk := diskOf(t, root)
	release, err := r.Reserve(dir, disk/3*2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reserve(dir, disk/3*2); !errors.Is(err, criservice.ErrNoRoom) || !strings.Contains(err.Error(), dir) {
		t.Errorf("two thirds were given twice: %v", err)
	}
	release()
	if _, err := r.Reserve(dir, disk/3*2); err != nil {
		t.Error(err)
	}
}

func TestWhatCheckpointsTakeIsCountedBelowTheirRoot(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"a", ".partial-x"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "a", "pages"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := allocated(root); err != nil || n < 3<<20 || n > 4<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	r := newRoom(DiskLimits{MaxShare: 1e-9}, root)
	if _, err := r.Reserve(filepath.Join(root, ".partial-x"), 1); !errors.Is(err, criservice.ErrNoRoom) || !strings.Contains(err.Error(), "--max-disk-share") {
		t.Errorf("got %v", err)
	}
}

func TestDiskLimitsThatMakeNoSenseAreRefused(t *testing.T) {
	for _, l := range []DiskLimits{{0, 0.1}, {-1, 0.1}, {1.1, 0.1}, {0.5, -0.1}, {0.5, 1}} {
		if err := l.check(); err == nil {
			t.Errorf("%+v was accepted", l)
		}
	}
	if err := (DiskLimits{defaultMaxDiskShare, defaultMinFreeDisk}).check(); err != nil {
		t.Error(err)
	}
}

// diskOf is what is free on a directory's disk.
func diskOf(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}
