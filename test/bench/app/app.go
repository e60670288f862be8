// Package app looks at the program "ballast" (test/bench/ballast), wherever it runs on
// this machine: how long it stood still, by its own clock, and how much of its memory
// is there.
package app

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Port is the TCP port on which a ballast answers if it is not told another.
const Port = 7000

// Process is a ballast, by its number among the machine's processes.
type Process struct{ PID int }

// Gap is a time in which a process did not run.
type Gap struct {
	Length   time.Duration // by its monotonic clock
	From, To time.Time     // its last moment before and its first one after, by the machine's clock
}

// Find returns the ballasts in cgroups whose path has a part, such as a Pod's UID. It
// looks at all processes; In does less.
func Find(part string) ([]Process, error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, name := range names {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			return nil, err
		}
		p := Process{pid}
		if !p.ballast() {
			continue
		}
		// What is not there any more has ended.
		if cgroup, err := os.ReadFile(p.path("cgroup")); err == nil && bytes.Contains(cgroup, []byte(part)) {
			found = append(found, p)
		}
	}
	return found, nil
}

// In returns the ballasts in the cgroups right below a directory.
func In(dir string) ([]Process, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*", "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil && !Gone(err) && !errors.Is(err, syscall.ENODEV) {
			return nil, err
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if p := (Process{pid}); p.ballast() {
				found = append(found, p)
			}
		}
	}
	return found, nil
}

// ballast says whether a process runs that program, now.
func (p Process) ballast() bool {
	comm, err := os.ReadFile(p.path("comm"))
	return err == nil && string(comm) == "ballast\n"
}

// Cgroup is the directory of the process's cgroup: of the hierarchy that counts
// processes where there are several.
func (p Process) Cgroup() (string, error) {
	data, err := os.ReadFile(p.path("cgroup"))
	if err != nil {
		return "", err
	}
	unified := ""
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		switch {
		case len(parts) != 3:
			return "", fmt.Errorf("%s has a line %q", p.path("cgroup"), line)
		case parts[1] == "pids":
			return filepath.Join("/sys/fs/cgroup/pids", parts[2]), nil
		case parts[0] == "0":
			unified = filepath.Join("/sys/fs/cgroup", parts[2])
		}
	}
	if unified == "" {
		return "", fmt.Errorf("%s names no hierarchy that counts processes", p.path("cgroup"))
	}
	return unified, nil
}

func (p Process) path(name string) string { return filepath.Join("/proc", strconv.Itoa(p.PID), name) }

// threads are those that run once the memory is filled: the first one, the one that
// answers and the one that looks at the clocks.
const threads = 3

// Ready says whether the process has filled its memory and answers.
func (p Process) Ready() (bool, error) {
	tasks, err := os.ReadDir(p.path("task"))
	return len(tasks) >= threads, err
}

// Resident is how much of the process's memory is there, in bytes.
func (p Process) Resident() (int64, error) {
	data, err := os.ReadFile(p.path("statm"))
	if err != nil {
		return 0, err
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(data), &size, &resident); err != nil {
		return 0, fmt.Errorf("%s: %w", p.path("statm"), err)
	}
	return resident * int64(os.Getpagesize()), nil
}

// gapsRead bounds what is read of a process's gaps: the last ones.
const gapsRead = 256 << 10

// Gaps returns the process's last gaps of 5 ms and more, the oldest first.
func (p Process) Gaps() ([]Gap, error) {
	f, err := os.Open(p.path("root/gaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	data := make([]byte, min(size, gapsRead))
	if _, err := f.ReadAt(data, size-int64(len(data))); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if int64(len(data)) < size { // the first line is a part of one
		data = data[bytes.IndexByte(data, '\n')+1:]
	}
	return parseGaps(string(data))
}

func parseGaps(text string) ([]Gap, error) {
	var gaps []Gap
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") { // it is being written
			break
		}
		var length, from, to int64
		if _, err := fmt.Sscan(line, &length, &from, &to); err != nil {
			return nil, fmt.Errorf("a ballast's gaps have a line %q: %w", line, err)
		}
		gaps = append(gaps, Gap{time.Duration(length), time.Unix(0, from), time.Unix(0, to)})
	}
	return gaps, nil
}

// Flush has the process write down what it knows, and waits for it.
func (p Process) Flush(ctx context.Context) error {
	asked := time.Now()
	if err := syscall.Kill(p.PID, syscall.SIGUSR1); err != nil {
		return fmt.Errorf("ask process %d for its gaps: %w", p.PID, err)
	}
	for {
		gaps, err := p.Gaps()
		if err != nil {
			return err
		}
		if len(gaps) > 0 && gaps[len(gaps)-1].To.After(asked) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d does not write down its gaps: %w", p.PID, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// within returns the process's gaps that a time has a part of.
func (p Process) within(after, before time.Time) ([]Gap, error) {
	gaps, err := p.Gaps()
	return slices.DeleteFunc(gaps, func(g Gap) bool { return !g.To.After(after) || !g.From.Before(before) }), err
}

// Longest returns the longest of the process's gaps that a time has a part of: on a busy
// machine one may have begun a little before.
func (p Process) Longest(after, before time.Time) (longest Gap, err error) {
	gaps, err := p.within(after, before)
	for _, g := range gaps {
		if g.Length > longest.Length {
			longest = g
		}
	}
	return longest, err
}

// Nearest returns the one of the process's gaps that a time has a part of whose length is
// nearest to what is known of it.
func (p Process) Nearest(length time.Duration, after, before time.Time) (Gap, error) {
	gaps, err := p.within(after, before)
	if err == nil && len(gaps) == 0 {
		err = fmt.Errorf("process %d did not stand still between %s and %s", p.PID, after.Format(time.TimeOnly), before.Format(time.TimeOnly))
	}
	if err != nil {
		return Gap{}, err
	}
	return slices.MinFunc(gaps, func(a, b Gap) int { return cmp.Compare((a.Length - length).Abs(), (b.Length - length).Abs()) }), nil
}

// Over returns the gap in which a moment lies: a restored process has one that began
// when it was captured and ended with its first instruction.
func (p Process) Over(moment time.Time) (Gap, bool, error) {
	gaps, err := p.Gaps()
	for _, g := range gaps {
		if g.From.Before(moment) && g.To.After(moment) {
			return g, true, err
		}
	}
	return Gap{}, false, err
}

// Gone says whether an error means that the process has ended.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
