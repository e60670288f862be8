package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

const (
	// strayPatience is how long processes that CRIU could not capture are waited
	// for before the freeze. An exec probe is over within its timeout, 1 s by default.
	strayPatience = 10 * time.Second
	strayInterval = 20 * time.Millisecond
)

// processesOf lists the processes of each container, in the containers' order:
// those in the cgroup of its init process, and below.
func processesOf(containers []engine.Container) ([][]int, error) {
	type place struct {
		path    string
		unified bool
	}
	places := make([]place, len(containers))
	for i, c := range containers {
		path, unified, err := cgroupOf(c.PID, "freezer")
		if err != nil {
			return nil, fmt.Errorf("container %s: list its processes: %w", c.Name, err)
		}
		places[i] = place{path, unified}
	}
	// /proc/PID/cgroup is the only view of the hierarchy that needs no mount.
	all, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	pids := make([][]int, len(containers))
	for _, d := range all {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		path, unified, err := cgroupOf(pid, "freezer")
		if err != nil {
			continue // it has ended
		}
		for i, p := range places {
			if unified == p.unified && (path == p.path || strings.HasPrefix(path, p.path+"/")) {
				pids[i] = append(pids[i], pid)
			}
		}
	}
	return pids, nil
}

// stray is a process of a container that is no descendant of its init process:
// what an exec session or an exec probe started. CRIU captures a tree.
type stray struct {
	container string
	pid       int
	command   string
}

func (s stray) String() string {
	return fmt.Sprintf("container %s, process %d (%s)", s.container, s.pid, s.command)
}

// strays lists the containers' processes that CRIU would stumble on.
func strays(containers []engine.Container) ([]stray, error) {
	pids, err := processesOf(containers)
	if err != nil {
		return nil, err
	}
	return straysAmong(containers, pids)
}

// straysAmong looks among processes of the containers.
func straysAmong(containers []engine.Container, pids [][]int) ([]stray, error) {
	var found []stray
	for i, c := range containers {
		parents := map[int]int{}
		for _, pid := range pids[i] {
			parent, err := parentOf(pid)
			if errors.Is(err, errEnded) {
				continue
			} else if err != nil {
				return nil, fmt.Errorf("container %s: %w", c.Name, err)
			}
			parents[pid] = parent
		}
		for _, pid := range pids[i] {
			if _, there := parents[pid]; there && !descends(pid, c.PID, parents) {
				found = append(found, stray{c.Name, pid, commandOf(pid)})
			}
		}
	}
	return found, nil
}

// treesOf lists the processes of each container that descend from its init process. What an
// exec started is not looked at before the freeze: it is waited for (awaitStrays), and may be
// the OCI runtime itself for a moment.
func treesOf(containers []engine.Container) ([][]int, error) {
	pids, err := processesOf(containers)
	if err != nil {
		return nil, err
	}
	besides, err := straysAmong(containers, pids)
	if err != nil {
		return nil, err
	}
	for i := range pids {
		pids[i] = slices.DeleteFunc(pids[i], func(pid int) bool {
			return slices.ContainsFunc(besides, func(s stray) bool { return s.pid == pid })
		})
	}
	return pids, nil
}

// descends says whether a line of parents leads from a process to its container's
// init. One that has ended meanwhile breaks the line; the next look tells.
func descends(pid, init int, parents map[int]int) bool {
	for range len(parents) + 1 {
		if pid == init {
			return true
		}
		parent, ok := parents[pid]
		if !ok {
			return false
		}
		pid = parent
	}
	return false
}

// ended says whether something below /proc/PID could not be read because the process has
// ended: there is no such file, or what was opened before its end says ESRCH
// (proc(5) tells only of the first).
func ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

func unlessEnded(err error) error {
	if ended(err) {
		return nil
	}
	return err
}

// errEnded says that a process has ended and waits to be collected. It does
// nothing any more, and has no children.
var errEnded = errors.New("the process has ended")

func parentOf(pid int) (int, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if ended(err) {
		return 0, errEnded
	} else if err != nil {
		return 0, err
	}
	return parseParent(stat)
}

// parseParent reads the fields after the name, which may hold anything (proc_pid_stat(5)).
func parseParent(stat []byte) (int, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return 0, fmt.Errorf("%q is no process status", stat)
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return 0, fmt.Errorf("%q is no process status", stat)
	}
	if state := string(fields[0]); state == "Z" || state == "X" {
		return 0, errEnded
	}
	return parent, nil
}

// commandOf is a process' command line, shortened, for people.
func commandOf(pid int) string {
	proc := "/proc/" + strconv.Itoa(pid)
	data, err := os.ReadFile(proc + "/cmdline")
	command := strings.Join(strings.FieldsFunc(string(data), func(r rune) bool { return r < ' ' }), " ")
	if err != nil || command == "" {
		data, _ = os.ReadFile(proc + "/comm")
		command = strings.TrimSpace(string(data))
	}
	if command == "" {
		return "it has ended since"
	}
	const most = 80
	if len(command) > most {
		command = strings.ToValidUTF8(command[:most], "") + "…"
	}
	return command
}

// awaitStrays waits until the containers have no strays, for a while (P16).
func awaitStrays(ctx context.Context, containers []engine.Container) error {
	began := time.Now()
	for {
		found, err := strays(containers)
		if err != nil || len(found) == 0 {
			return err
		}
		if waited := time.Since(began); waited > strayPatience {
			return fmt.Errorf("%w: %s is no descendant of its container's first process, as an exec session is not, and cannot be captured; "+
				"it did not end within %s: end it and create another checkpoint", engine.ErrUnsupported, list(found), strayPatience)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s to end, which is no descendant of its container's first process: %w", list(found), context.Cause(ctx))
		case <-time.After(strayInterval):
		}
	}
}

func list(found []stray) string {
	const most = 3
	var names []string
	for _, s := range found[:min(most, len(found))] {
		names = append(names, s.String())
	}
	if more := len(found) - most; more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// lateStrays says that processes came between the look before the freeze and the
// freeze itself.
type lateStrays struct{ found []stray }

func (e *lateStrays) Error() string {
	return fmt.Sprintf("%v: %s began while the Pod was being frozen, and is no descendant of its container's first process, as an exec session is not; "+
		"it kept happening: checkpoint the Pod when fewer commands are run in it", engine.ErrUnsupported, list(e.found))
}

func (e *lateStrays) Unwrap() error { return engine.ErrUnsupported }

// standing lists the processes of each container of a freeze, in the containers' order. The
// Pod stands still meanwhile, so where their cgroups are known nobody else's are looked at.
func (e *Engine) standing(entry frozen, containers []engine.Container) ([][]int, error) {
	pids := make([][]int, len(containers))
	for i, c := range entry.Containers {
		f, ok := c.freezer()
		if !ok {
			return processesOf(containers)
		}
		err := e.host.Do(func() (err error) {
			pids[i], err = f.processes()
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("container %s: list its processes: %w", containers[i].Name, err)
		}
	}
	return pids, nil
}

// lookForLate looks again, while the containers are frozen.
func lookForLate(containers []engine.Container, pids [][]int) error {
	found, err := straysAmong(containers, pids)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return &lateStrays{slices.Clip(found)}
	}
	return nil
}
