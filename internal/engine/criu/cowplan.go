package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/criu/cow"
)

// OptionCapture is an option of this engine: how the memory of the processes is captured.
const OptionCapture = "capture"

// Values of OptionCapture, and modes in a manifest. Without the option memory is captured
// copy-on-write where that is safe and shortens the freeze window.
const (
	// CapturePlain has CRIU write it, while the Pod stands still.
	CapturePlain = "plain"
	// CaptureCOW has every process fork in the moment in which it would run on; the memory
	// is read from the children while the Pod runs (package cow).
	CaptureCOW = "cow"
)

const (
	// cowWorthwhile is how much memory there has to be: less is written as soon as forked.
	cowWorthwhile = 64 << 20
	// cowHeadroom is the part of the memory, in per cent, that has to be free in each limit:
	// what processes write to is copied.
	cowHeadroom = 25
	// cowLeast is what has to be free in any case, and cowReserve what is left free: children
	// end when it is touched.
	cowLeast   = 48 << 20
	cowReserve = 24 << 20
	// pidHeadroom is how many processes more than the children there have to be room for.
	pidHeadroom = 16
)

// plan is how the memory of a sandbox is to be captured.
type plan struct {
	mode   string
	reason string // why it is plain
	forced bool
	memory int64 // of the processes, bytes
	limits []cow.Limit
}

// told is a plan in a manifest.
func (p plan) told() *checkpoint.Capture {
	return &checkpoint.Capture{Mode: p.mode, Reason: p.reason}
}

// planCapture decides, while the Pod runs, how its memory is captured.
func (e *Engine) planCapture(s engine.Sandbox, options map[string]string) (p plan, err error) {
	if options[OptionCapture] == CapturePlain {
		return plan{mode: CapturePlain, reason: "the option says so", forced: true}, nil
	}
	p = plan{mode: CaptureCOW, forced: options[OptionCapture] == CaptureCOW}
	err = e.fitForCOW(s, &p)
	switch {
	case !errors.Is(err, cow.ErrUnfit):
		return p, err
	case p.forced:
		return p, fmt.Errorf("%w: option %s=%s: %w", engine.ErrUnsupported, OptionCapture, CaptureCOW, err)
	}
	p.mode, p.reason = CapturePlain, strings.TrimPrefix(err.Error(), cow.ErrUnfit.Error()+": ")
	return p, nil
}

// fitForCOW looks for what would keep memory from being captured copy-on-write, or could
// do harm (cow.ErrUnfit).
func (e *Engine) fitForCOW(s engine.Sandbox, p *plan) error {
	unfit := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{cow.ErrUnfit}, args...)...)
	}
	if e.cowHelper == "" {
		return unfit("no helper is installed")
	}
	if err := e.host.Do(func() error { _, err := os.Stat(e.cowHelper); return err }); err != nil {
		return unfit("no helper is installed: %w", err)
	}
	if err := cow.Supported(); err != nil {
		return err
	}
	if e.wroteMemory.Load() {
		return unfit("this node's CRIU writes memory in any case: use the one that Stasis installs")
	}
	pids, err := treesOf(s.Containers)
	if err != nil {
		return err
	}
	processes := 0
	for _, pid := range slices.Concat(pids...) {
		m, err := memoryOf(pid)
		if err != nil {
			return fmt.Errorf("look at the memory of process %d: %w", pid, err)
		}
		p.memory += m.private
		processes++
	}
	if p.memory < cowWorthwhile && !p.forced {
		return unfit("with %d MiB of memory it would not be faster", p.memory>>20)
	}
	var kept int64
	for i, c := range s.Containers {
		filters := 0
		if l := c.Spec.Linux; l != nil && l.Seccomp != nil {
			if filters = 1; slices.Contains([]specs.LinuxSeccompAction{specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap}, l.Seccomp.DefaultAction) {
				return unfit("container %s: its seccomp profile ends who makes a system call that it does not name (%s)", c.Name, l.Seccomp.DefaultAction)
			}
		}
		for _, pid := range pids[i] {
			if err := ownFilter(pid, filters); err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			n, err := cow.Examine(pid)
			if errors.Is(err, cow.ErrUnfit) {
				return fmt.Errorf("%w: container %s, process %d (%s): %s", cow.ErrUnfit, c.Name, pid, commandOf(pid), strings.TrimPrefix(err.Error(), cow.ErrUnfit.Error()+": "))
			} else if err != nil {
				return fmt.Errorf("container %s: look at process %d: %w", c.Name, pid, err)
			}
			kept += n
		}
	}
	if kept > cow.MaxKept {
		return unfit("%d MiB of memory are kept from children (MADV_DONTFORK, MADV_WIPEONFORK)", kept>>20)
	}
	if strict, err := os.ReadFile("/proc/sys/vm/overcommit_memory"); err == nil && strings.TrimSpace(string(strict)) == "2" {
		return unfit("the node promises no more memory than it has (vm.overcommit_memory=2)")
	}
	free, err := cow.Available()
	if err != nil {
		return err
	}
	if need := p.memory*cowHeadroom/100 + cowLeast + cow.NodeReserve; free < need {
		return unfit("the node has %d MiB of memory available, %d MiB have to be", free>>20, need>>20)
	}
	return e.host.Do(func() error {
		for i, c := range s.Containers {
			f, err := freezerOf(c.PID)
			if err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			if !strings.Contains(filepath.Base(f.path), c.ID) {
				return unfit("container %s: its first process is in a cgroup of its own, %s", c.Name, f.path)
			}
			if err := roomForProcesses(c.PID, processes); err != nil {
				return fmt.Errorf("%w: container %s: %w", cow.ErrUnfit, c.Name, err)
			}
			if err := roomForUsers(pids[i]); err != nil {
				return fmt.Errorf("%w: container %s: %w", cow.ErrUnfit, c.Name, err)
			}
			limits, err := memoryLimits(c.PID, p.memory)
			if err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			for _, l := range limits {
				if slices.ContainsFunc(p.limits, func(o cow.Limit) bool { return o.Usage == l.Usage }) {
					continue
				}
				free, err := l.Free()
				if err != nil {
					return fmt.Errorf("container %s: %w", c.Name, err)
				}
				if free < l.Need {
					return unfit("container %s: %d MiB of its memory limit of %d MiB are free, %d MiB have to be", c.Name, max(0, free)>>20, l.Bytes>>20, l.Need>>20)
				}
				p.limits = append(p.limits, l.Limit)
			}
		}
		return nil
	})
}

// ownFilter says whether a process has more seccomp filters than its container gave it.
// They are lifted while it forks; if the helper is killed in just that moment the kernel
// puts them back, and they may well end a process that forks.
func ownFilter(pid, given int) error {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return unlessEnded(err)
	}
	filtered, has := false, 0
	for line := range strings.Lines(string(status)) {
		switch name, value, _ := strings.Cut(line, ":"); name {
		case "Seccomp":
			filtered = strings.TrimSpace(value) != "0"
		case "Seccomp_filters": // since Linux 5.9
			if has, err = strconv.Atoi(strings.TrimSpace(value)); err != nil {
				return fmt.Errorf("process %d: %w", pid, err)
			}
		}
	}
	if has > given || filtered && given == 0 {
		return fmt.Errorf("%w: process %d (%s) has a seccomp filter of its own", cow.ErrUnfit, pid, commandOf(pid))
	}
	return nil
}

type memoryLimit struct {
	cow.Limit
	Need int64
}

// cgroupsUp lists the directories of a process' cgroup for a controller and of those
// around it, on the host. It runs in the host's mount namespace.
func cgroupsUp(pid int, controller string) (dirs []string, unified bool, err error) {
	path, unified, err := cgroupOf(pid, controller)
	if err != nil {
		return nil, false, err
	}
	mount, err := cgroupMount(controller, unified)
	if err != nil {
		return nil, false, err
	}
	for ; path != "/" && path != "."; path = filepath.Dir(path) {
		dirs = append(dirs, filepath.Join(mount, path))
	}
	return dirs, unified, nil
}

// memoryLimits lists the limits that bound a process' memory, and how much of each has to
// be free for memory to be captured.
func memoryLimits(pid int, memory int64) ([]memoryLimit, error) {
	dirs, unified, err := cgroupsUp(pid, "memory")
	if err != nil {
		return nil, err
	}
	most, used := "memory.limit_in_bytes", "memory.usage_in_bytes"
	if unified {
		most, used = "memory.max", "memory.current"
	}
	var limits []memoryLimit
	for _, dir := range dirs {
		bytes, err := readLimit(filepath.Join(dir, most))
		if err != nil {
			return nil, err
		}
		if bytes == 0 {
			continue
		}
		l := memoryLimit{cow.Limit{Usage: filepath.Join(dir, used), Stat: filepath.Join(dir, "memory.stat"), Bytes: bytes, Reserve: min(cowReserve, bytes/16)}, 0}
		l.Need = memory*cowHeadroom/100 + cowLeast
		// Where the kernel ends all processes of a container when memory runs out, and not
		// the child first, it must not run out.
		if group, err := os.ReadFile(filepath.Join(dir, "memory.oom.group")); err == nil && strings.TrimSpace(string(group)) == "1" {
			l.Need = memory + cowLeast
		}
		limits = append(limits, l)
	}
	return limits, nil
}

// readLimit reads a limit of a cgroup; 0 is none.
func readLimit(file string) (int64, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	const none = 1 << 60 // what cgroups of version 1 call unlimited is more
	if n >= none || n < 0 {
		return 0, nil
	}
	return n, nil
}

// roomForProcesses says whether a container may have as many processes more.
func roomForProcesses(pid, more int) error {
	dirs, _, err := cgroupsUp(pid, "pids")
	if err != nil {
		return nil // no such controller, no limit
	}
	for _, dir := range dirs {
		most, err := readLimit(filepath.Join(dir, "pids.max"))
		if err != nil {
			return err
		}
		if most == 0 {
			continue
		}
		now, err := readLimit(filepath.Join(dir, "pids.current"))
		if err != nil {
			return err
		}
		if now+int64(more+pidHeadroom) > most {
			return fmt.Errorf("it has %d processes and may have %d", now, most)
		}
	}
	return nil
}

// roomForUsers says whether the users of processes may have one more for each
// (RLIMIT_NPROC, which counts threads on the whole node).
func roomForUsers(pids []int) error {
	more := map[string]int64{}
	most := map[string]int64{}
	for _, pid := range pids {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(limits)) {
			rest, ok := strings.CutPrefix(line, "Max processes")
			if words := strings.Fields(rest); ok && len(words) > 0 && words[0] != "unlimited" {
				n, err := strconv.ParseInt(words[0], 10, 64)
				if err != nil {
					return err
				}
				user := userOf(pid)
				if more[user]++; most[user] == 0 || n < most[user] {
					most[user] = n
				}
			}
		}
	}
	if len(most) == 0 {
		return nil
	}
	now := map[string]int64{}
	all, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, d := range all {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if user := userOf(pid); most[user] > 0 {
			threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
			now[user] += int64(len(threads))
		}
	}
	for user, limit := range most {
		if user != "0" && now[user]+more[user]+pidHeadroom > limit {
			return fmt.Errorf("user %s has %d threads on this node and may have %d", user, now[user], limit)
		}
	}
	return nil
}

// userOf is the real user of a process; empty if it has ended.
func userOf(pid int) string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "Uid:"); ok {
			if words := strings.Fields(rest); len(words) > 0 {
				return words[0]
			}
		}
	}
	return ""
}

// cowGrowth is how much longer a Pod stands still for a GiB of memory that is forked.
const cowGrowth = 30e6 // nanoseconds

// forking is how long that takes for an amount of memory, in nanoseconds.
func forking(memory int64) float64 { return float64(memory) / (1 << 30) * cowGrowth }
