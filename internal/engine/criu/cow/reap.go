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
	p.empty()
	now, err := readStat(p.child.pid)
	if err != nil {
		p.child.ended = true
		return nil // with its PID namespace
	}
	if c.captured(now.parent) {
		// Where its parent has ended, another has it, gets SIGCHLD for it, and could be
		// waiting for any child: that one stands still, all of it.
		held, err := stop(now.parent, now.parent != p.pid)
		if err == nil {
			err = c.kill(p.child)
		}
		if err == nil {
			err = collectBy(held[0], now.parent, p.child.pid)
		}
		for _, t := range held {
			err = errors.Join(err, t.release())
		}
		if err == nil {
			return nil
		}
		c.log.Info("a child is not collected at once", "process", now.parent, "child", p.child.pid, "err", err)
	}
	if !p.child.ended {
		if err := c.kill(p.child); err != nil {
			return err
		}
	}
	return collect(p.child.pid, p.pid, c.captured)
}

// empty has a child give up its memory, which can take a while: its parent does not stand
// still for that.
func (p *process) empty() {
	t := &thread{tid: p.child.pid, stopped: true}
	var err error
	if t.own, err = getRegisters(t.tid); err == nil {
		t.call(p.place, unix.SYS_MUNMAP, [5]uint64{0, p.place.address &^ (pageSize - 1)})
	}
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

// stop stops one thread of a process, or all.
func stop(pid int, all bool) (held []*thread, err error) {
	tids, err := threadsOf(pid)
	if err != nil {
		return nil, err
	}
	for _, tid := range tids {
		t, err := seize(tid, options(pid))
		if err == nil {
			err = t.awaitLong()
		}
		if errors.Is(err, errGone) {
			continue
		} else if err != nil {
			return held, err
		}
		if held = append(held, t); !all {
			break
		}
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
	held, err := stop(parent, false)
	if err != nil {
		return err
	}
	return errors.Join(collectBy(held[0], parent, pid), held[0].release())
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
