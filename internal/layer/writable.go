package layer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// writableInodes lists the numbers of the inodes that any process has open for writing,
// or mapped shared, whatever file system they are of: through an overlay a file has the
// number of its writable layer, and another device.
func writableInodes(ctx context.Context) (map[uint64]bool, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look who has files open for writing: %w", err)
	}
	found := map[uint64]bool{}
	for _, e := range entries {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		// What cannot be read of a process has ended with it: what it had begun is done. One
		// that root may not look into is none of a container that CRIU can capture.
		proc := "/proc/" + e.Name()
		openForWriting(proc, found)
		if err := mappedShared(proc, found); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("look what process %s has mapped: %w", e.Name(), err)
		}
	}
	return found, nil
}

// openForWriting adds what a process has open for writing. Of a thread with a table of
// its own (unshare(2)) nothing is seen; CRIU does not know such processes.
func openForWriting(proc string, found map[uint64]bool) {
	dir, err := os.Open(proc + "/fd")
	if err != nil {
		return
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(dir.Fd()), name, &st, 0) != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG || found[st.Ino] {
			continue
		}
		info, err := os.ReadFile(proc + "/fdinfo/" + name)
		if err != nil || opensForWriting(info) {
			found[st.Ino] = true
		}
	}
}

// opensForWriting reads the flags of proc_pid_fdinfo(5). What has none may be anything.
func opensForWriting(info []byte) bool {
	for line := range bytes.Lines(info) {
		if value, ok := bytes.CutPrefix(line, []byte("flags:")); ok {
			flags, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 8, 64)
			return err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return true
}

// mappedShared adds what a process has mapped shared (proc_pid_maps(5)), writable or
// not: that can be changed.
func mappedShared(proc string, found map[uint64]bool) error {
	f, err := os.Open(proc + "/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<16)
	for lines.Scan() {
		// address perms offset dev inode path
		fields := bytes.Fields(lines.Bytes())
		if len(fields) < 5 || len(fields[1]) < 4 || fields[1][3] != 's' {
			continue
		}
		if ino, err := strconv.ParseUint(string(fields[4]), 10, 64); err == nil && ino != 0 {
			found[ino] = true
		}
	}
	return lines.Err()
}
