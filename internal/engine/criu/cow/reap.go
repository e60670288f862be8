package cow

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// reapPatience bounds how long a parent may be unable to collect a child.
const reapPatience = 30 * time.Second

// reap ends a child and has it collected, so that its parent never learns of it: the
// parent itself is made to wait for it, in between two of its own instructions. Its
// exit signal is none, so that no wait(2) of the parent's own finds it meanwhile.
func (c *capture) reap(p *process) error {
	if p.child == nil || p.child.ended {
		return nil
	}
	now, err := readStat(p.child.pid)
	if err != nil {
		p.child.ended = true
		return nil // with its PID namespace
	}
	if now.parent != p.pid && c.captured(now.parent) {
		// Its parent has ended. Whoever has it now gets SIGCHLD for it, and could be waiting
		// for any child: it stands still meanwhile.
		return c.collectHeld(now.parent, p.child)
	}
	if err := c.kill(p.child); err != nil {
		return err
	}
	return collect(p.child.pid, p.pid, c.captured)
}

func (c *capture) captured(pid int) bool {
	for _, p := range c.processes {
		if p.pid == pid {
			return true
		}
	}
	return false
}

// kill kills a child and waits for its end.
func (c *capture) kill(ch *child) error {
	if err := unix.Kill(ch.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end child %d: %w", ch.pid, err)
	}
	for {
		_, err := wait(ch.pid)
		if errors.Is(err, errGone) {
			ch.ended = true
			return nil
		}
		if err != nil {
			return err
		}
		if err := unix.PtraceCont(ch.pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
}

// collect has the parent of a dead child collect it.
func collect(pid, parent int, ours func(int) bool) error {
	var err error
	for end := time.Now().Add(reapPatience); ; time.Sleep(20 * time.Millisecond) {
		s, statErr := readStat(pid)
		if statErr != nil || s.state != 'Z' && s.state != 'X' {
			return nil // collected
		}
		if s.parent != parent && !ours(s.parent) {
			return nil // it has a new parent, which collects what is left to it
		}
		if err = collectFrom(s.parent, pid); err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("have process %d collect its child %d: %w", s.parent, pid, err)
		}
	}
}

// collectHeld has a child end, and be collected, while its parent stands still.
func (c *capture) collectHeld(parent int, ch *child) error {
	held, err := holdAll(parent)
	defer func() {
		for _, t := range held {
			t.release()
		}
	}()
	if err != nil {
		// It cannot be held: then it sees one child more than it knows of.
		return c.kill(ch)
	}
	if err := c.kill(ch); err != nil {
		return err
	}
	return collectBy(held[0], parent, ch.pid)
}

// holdAll stops all threads of a process.
func holdAll(pid int) (held []*thread, err error) {
	tids, err := threadsOf(pid)
	if err != nil {
		return nil, err
	}
	for _, tid := range tids {
		t, err := seize(tid, options(pid))
		if errors.Is(err, errGone) {
			continue
		} else if err != nil {
			return held, err
		}
		if err := t.awaitLong(); errors.Is(err, errGone) {
			continue
		} else if err != nil {
			return held, err
		}
		held = append(held, t)
	}
	if len(held) == 0 {
		return nil, errGone
	}
	return held, nil
}

func options(pid int) uintptr {
	if filter, err := statusOf(pid, "Seccomp"); err == nil && filter != "0" {
		return unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_SUSPEND_SECCOMP
	}
	return unix.PTRACE_O_TRACESYSGOOD
}

// collectFrom stops one thread of a process and has it collect a child that is dead.
func collectFrom(parent, pid int) error {
	tids, err := threadsOf(parent)
	if err != nil {
		return err
	}
	last := errGone
	for _, tid := range tids {
		t, err := seize(tid, options(parent))
		if errors.Is(err, errGone) {
			continue
		}
		if err == nil {
			err = t.awaitLong()
		}
		if err != nil {
			last = err
			continue
		}
		err = collectBy(t, parent, pid)
		return errors.Join(err, t.release())
	}
	return last
}

// awaitLong waits for a thread that was asked to stop and may be busy in the kernel. It
// must not be left alone: it would stop later.
func (t *thread) awaitLong() error {
	for end := time.Now().Add(reapPatience); ; {
		err := t.await()
		if !errors.Is(err, errBusy) || time.Now().After(end) {
			return err
		}
	}
}

// collectBy has a stopped thread collect a child that is dead.
func collectBy(t *thread, parent, pid int) error {
	inner, err := innerPID(pid)
	if err != nil {
		return err
	}
	place, err := findPlace(parent) // it may execute another program than it did
	if err != nil {
		return err
	}
	result, err := t.call(place, unix.SYS_WAIT4, [5]uint64{uint64(inner), 0, unix.WALL | unix.WNOHANG})
	if err != nil {
		return err
	}
	if err := place.clear(t.tid); err != nil {
		return err
	}
	if result != int64(inner) {
		return fmt.Errorf("it was not found: %d", result)
	}
	return nil
}
