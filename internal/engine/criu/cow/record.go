package cow

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A record says whose children there may be, for the case that this process is killed:
// the kernel kills the children then, but nobody collects them. It lies on memory.
type record struct {
	file string

	Sandbox string `json:"sandbox"`
	// Helper is who sees to it as long as it lives.
	Helper identity `json:"helper"`
	// Began is when, in ticks since the node's start: no child is older.
	Began     uint64     `json:"began"`
	Processes []identity `json:"processes"`
}

// identity names a process: IDs are used again.
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks since the node's start
}

func (i identity) lives() bool {
	s, err := readStat(i.PID)
	return err == nil && s.start == i.Start && s.state != 'Z' && s.state != 'X'
}

// begin writes the record before anything is changed.
func (r *record) begin(request Request, processes []*process) error {
	r.file, r.Sandbox = request.Record, request.Sandbox
	self, err := readStat(os.Getpid())
	if err != nil {
		return err
	}
	r.Helper = identity{os.Getpid(), self.start}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return err
	}
	const ticks = 100 // a second, for all that user space sees
	r.Began = uint64(now.Nano() / (int64(time.Second) / ticks))
	for _, p := range processes {
		r.Processes = append(r.Processes, identity{p.pid, p.start})
	}
	if r.file == "" {
		return nil
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := os.WriteFile(r.file+".new", data, 0o600); err != nil {
		return fmt.Errorf("write down what is about to be forked: %w", err)
	}
	return os.Rename(r.file+".new", r.file)
}

func (r *record) end() error {
	if r.file == "" {
		return nil
	}
	err := os.Remove(r.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// maxRecord bounds what is read of a record.
const maxRecord = 4 << 20

// Clean collects the children of helpers that were killed, by the records in a directory.
// It has to be called on a thread that lives until it returns. One whose helper lives is
// left to that.
func Clean(dir string) error {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		name := filepath.Join(dir, f.Name())
		if !strings.HasSuffix(name, ".json") {
			continue
		}
		if info, err := f.Info(); err != nil || info.Size() > maxRecord {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			continue // done meanwhile
		}
		r := record{file: name}
		if err := json.Unmarshal(data, &r); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		if r.Helper.lives() {
			continue
		}
		errs = append(errs, r.clean())
	}
	return errors.Join(errs...)
}

// clean collects the dead children of a record's processes that are not the processes'
// own: those that have no exit signal and came after the record.
func (r *record) clean() error {
	parents := map[int]bool{}
	for _, p := range r.Processes {
		if p.lives() {
			if err := passed(p.PID); err != nil && !errors.Is(err, errGone) {
				return fmt.Errorf("process %d: %w", p.PID, err)
			}
			parents[p.PID] = true
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil {
			continue
		}
		s, err := readStat(pid)
		if err != nil || !parents[s.parent] || s.exitSignal != 0 || s.start < r.Began {
			continue
		}
		// The kernel is about to have killed it, or it has been let go to end itself.
		for end := time.Now().Add(stopPatience); s.state != 'Z' && time.Now().Before(end); time.Sleep(time.Millisecond) {
			if s, err = readStat(pid); err != nil {
				break
			}
		}
		if err == nil && s.state == 'Z' {
			errs = append(errs, collect(pid, s.parent, func(pid int) bool { return parents[pid] }))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return r.end()
}

// passed returns when the first thread of a process is not on its way through a stub any
// more: one that was let go there may be about to fork.
func passed(pid int) error {
	_, end, err := vdsoOf(pid)
	if errors.Is(err, ErrUnfit) || errors.Is(err, fs.ErrNotExist) {
		return nil // it executes another program
	} else if err != nil {
		return err
	}
	for deadline := time.Now().Add(stopPatience); ; time.Sleep(time.Millisecond) {
		t, err := seize(pid, options(pid))
		if err == nil {
			err = t.awaitLong()
		}
		if err != nil {
			return err
		}
		at := t.own.instruction()
		if err := t.release(); err != nil {
			return err
		}
		if at < end-maxStubs*stubSize || at >= end || time.Now().After(deadline) {
			return nil
		}
	}
}
