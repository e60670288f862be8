package criu

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// A process that starts another one with vfork(2), as most do that call posix_spawn(3)
// and as Go does, waits in the kernel until that executes its program. If both stand
// still before, CRIU waits for the one in vain: until its time-out, while the Pod stands
// still. A moment later it is over.

// spawning says that a process was frozen in such a moment.
type spawning struct {
	container string
	pid       int
	command   string
}

func (s *spawning) Error() string {
	return fmt.Sprintf("%v: container %s, process %d (%s) was frozen while it was starting another process (vfork); "+
		"it kept happening: checkpoint the Pod when it starts fewer", engine.ErrUnsupported, s.container, s.pid, s.command)
}

func (s *spawning) Unwrap() error { return engine.ErrUnsupported }

const kcmpVM = 1 // KCMP_VM (kcmp(2))

// lookForSpawning looks for processes that still have their parent's memory. It is for
// containers that are frozen.
func lookForSpawning(containers []engine.Container, pids [][]int) error {
	for i, c := range containers {
		for _, pid := range pids[i] {
			parent, err := parentOf(pid)
			if pid == c.PID || errors.Is(err, errEnded) {
				continue
			} else if err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			same, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(parent), kcmpVM, 0, 0, 0)
			if errno == 0 && same == 0 {
				return &spawning{c.Name, parent, commandOf(parent)}
			}
		}
	}
	return nil
}
