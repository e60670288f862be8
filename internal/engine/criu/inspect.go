package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// inspect looks, while the container runs, for what is known not to survive a
// capture, so that it is refused with a plain reason and not found out by CRIU
// while the Pod stands still.
func inspect(c engine.Container, pids []int) error {
	for _, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		problem, err := problemOf(proc)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended since
		} else if err != nil {
			return fmt.Errorf("container %s: look at process %d: %w", c.Name, pid, err)
		}
		if problem != "" {
			return fmt.Errorf("%w: container %s, process %d (%s): %s", engine.ErrUnsupported, c.Name, pid, commandOf(pid), problem)
		}
	}
	return nil
}

func problemOf(proc string) (string, error) {
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(status)) {
		if state, ok := strings.CutPrefix(line, "State:"); ok && strings.HasPrefix(strings.TrimSpace(state), "T") {
			return "it is stopped (SIGSTOP); CRIU hangs on stopped processes of a frozen cgroup: continue or end it first", nil
		}
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return "", err
	}
	for _, fd := range fds {
		file := filepath.Join(proc, "fd", fd.Name())
		target, err := os.Readlink(file)
		switch {
		case err != nil: // closed since
		case strings.HasPrefix(target, "anon_inode:[io_uring]"):
			return "it uses io_uring, which CRIU cannot capture: turn it off in the application", nil
		case strings.HasPrefix(target, "socket:") && strings.HasPrefix(protocolOf(file), "MPTCP"):
			return "it has a multipath TCP socket (file descriptor " + fd.Name() + "), which CRIU cannot capture: turn it off in the application; " +
				"for one written in Go, set GODEBUG=multipathtcp=0", nil
		}
	}
	return "", nil
}

// protocolOf names a socket's protocol as the kernel calls it, such as "TCP"; empty
// where it does not say.
func protocolOf(fd string) string {
	var name [32]byte
	n, err := unix.Getxattr(fd, "system.sockprotoname", name[:])
	if err != nil {
		return ""
	}
	return unix.ByteSliceToString(name[:n])
}
