// Package cgroup makes, fills, empties and removes control groups, on machines with
// version 1 hierarchies (alone or beside version 2) and with version 2 alone.
package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Hierarchies are the mounted control group hierarchies of the machine.
type Hierarchies struct {
	mounts []mount
}

type mount struct {
	dir         string
	controllers []string // version 1 only: cpuset, freezer, …; a named hierarchy has its name only
	v2          bool
}

// Find reads the hierarchies from the mount table of this process.
func Find() (Hierarchies, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Hierarchies{}, fmt.Errorf("finding control groups: %w", err)
	}
	h := parse(text)
	if len(h.mounts) == 0 {
		return Hierarchies{}, errors.New("no control group hierarchy is mounted (looked for cgroup and cgroup2 in /proc/self/mountinfo): mount them at /sys/fs/cgroup")
	}
	return h, nil
}

func parse(mountinfo []byte) Hierarchies {
	var h Hierarchies
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(rest) < 3 || fields[3] != "/" {
			continue
		}
		m := mount{dir: fields[4]}
		switch rest[0] {
		case "cgroup2":
			m.v2 = true
		case "cgroup":
			for _, option := range strings.Split(rest[2], ",") {
				if option != "rw" && option != "ro" && option != "xattr" {
					m.controllers = append(m.controllers, option)
				}
			}
		default:
			continue
		}
		if !slices.ContainsFunc(h.mounts, func(o mount) bool { return o.dir == m.dir }) {
			h.mounts = append(h.mounts, m)
		}
	}
	return h
}

// V1 says whether resources are controlled by version 1 hierarchies.
func (h Hierarchies) V1() bool {
	return slices.ContainsFunc(h.mounts, func(m mount) bool {
		return slices.Contains(m.controllers, "pids") || slices.Contains(m.controllers, "memory")
	})
}

// controlled are the hierarchies in which groups are made: on a version 1 machine all
// of that version. A version 2 hierarchy beside them controls nothing and is left alone.
func (h Hierarchies) controlled() []mount {
	v1 := h.V1()
	var out []mount
	for _, m := range h.mounts {
		if m.v2 != v1 {
			out = append(out, m)
		}
	}
	return out
}

// tracking is the hierarchy by whose groups processes are found again. On version 1 it is
// pids: every OCI runtime puts its containers into a group of their own there.
func (h Hierarchies) tracking() (mount, error) {
	for _, m := range h.controlled() {
		if m.v2 || slices.Contains(m.controllers, "pids") {
			return m, nil
		}
	}
	return mount{}, errors.New("no control group hierarchy with the pids controller is mounted: mount one (cgroup version 1) or cgroup2 at /sys/fs/cgroup")
}

// Make makes the group in every hierarchy, with its parents.
func (h Hierarchies) Make(group string) error {
	for _, m := range h.controlled() {
		path := m.dir
		for _, name := range strings.Split(strings.Trim(group, "/"), "/") {
			parent := path
			path = filepath.Join(path, name)
			if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("making the control group: %w", err)
			}
			if err := prepare(m, parent, path); err != nil {
				return fmt.Errorf("making the control group %s: %w", path, err)
			}
		}
	}
	return nil
}

// prepare gives a new group what it does not inherit by itself.
func prepare(m mount, parent, path string) error {
	if m.v2 {
		controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, c := range strings.Fields(string(controllers)) {
			// Not every controller can be handed down everywhere; the kubelet says what it misses.
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0o644)
		}
		return nil
	}
	if !slices.Contains(m.controllers, "cpuset") {
		return nil
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(path, file))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(have)) != "" {
			continue
		}
		value, err := os.ReadFile(filepath.Join(parent, file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(path, file), value, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Join moves process pid (0: the calling one) to the group, in the hierarchy by which
// processes are found again. The group must exist.
func (h Hierarchies) Join(group string, pid int) error {
	m, err := h.tracking()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(m.dir, group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return fmt.Errorf("joining the control group: %w", err)
	}
	return nil
}

// Processes returns the processes in the group and in all groups below it.
func (h Hierarchies) Processes(group string) ([]int, error) {
	m, err := h.tracking()
	if err != nil {
		return nil, err
	}
	var pids []int
	err = filepath.WalkDir(filepath.Join(m.dir, group), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if !d.IsDir() {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return fmt.Errorf("%s holds %q, not a process number", path, field)
			}
			if pid > 0 && pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing the processes of control group %s: %w", group, err)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Doomed is a set of processes that are to end. The zero value is empty.
type Doomed struct {
	started map[int]string // process → when it started, so that a number used again is left alone
}

// Add adds the processes and all that descend from them.
func (d *Doomed) Add(pids ...int) {
	if d.started == nil {
		d.started = map[int]string{}
	}
	for _, pid := range withDescendants(pids) {
		if s, ok := readStat(pid); ok {
			d.started[pid] = s.started
		}
	}
}

// Kill ends every process of the group and of those below it, what descends from them
// elsewhere (a container runtime puts containers into other groups), and the doomed. It
// returns when none is left or the time is over. Frozen processes are thawed: they do not
// die otherwise.
func (h Hierarchies) Kill(group string, doomed *Doomed, within time.Duration) error {
	for deadline := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		pids, err := h.Processes(group)
		if err != nil {
			return err
		}
		doomed.Add(pids...)
		left := 0
		for pid, started := range doomed.started {
			s, ok := readStat(pid)
			if !ok || s.started != started || s.zombie {
				delete(doomed.started, pid)
				continue
			}
			left = pid
			_ = unix.Kill(pid, unix.SIGKILL) // it may have gone meanwhile
			h.thaw(pid)
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes do not end, among them pid %d (%s): look at /proc/%d/stack, then run devcluster down again", len(doomed.started), left, command(left), left)
		}
	}
}

// withDescendants adds to the processes all that descend from them.
func withDescendants(pids []int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return pids
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, ok := readStat(pid); ok && s.parent > 0 {
			children[s.parent] = append(children[s.parent], pid)
		}
	}
	seen := map[int]bool{os.Getpid(): true}
	var out []int
	for queue := slices.Clone(pids); len(queue) > 0; queue = queue[1:] {
		pid := queue[0]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		out = append(out, pid)
		queue = append(queue, children[pid]...)
	}
	return out
}

// stat is what counts of /proc/PID/stat.
type stat struct {
	parent  int
	started string // in clock ticks since the machine started
	zombie  bool
}

func readStat(pid int) (s stat, ok bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, false
	}
	// The command, in parentheses, may hold anything. Fields after it are numbered from 3.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return stat{}, false
	}
	parent, err := strconv.Atoi(fields[1])
	return stat{parent, fields[19], fields[0] == "Z" || fields[0] == "X"}, err == nil
}

// member is a group that a process is in.
type member struct {
	controllers []string // none: version 2
	path        string
}

func groupsOf(pid int) []member {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil // it has gone
	}
	var all []member
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 {
			all = append(all, member{strings.FieldsFunc(parts[1], func(r rune) bool { return r == ',' }), filepath.Clean(parts[2])})
		}
	}
	return all
}

// thaw thaws the group that process pid is in, and those above it.
func (h Hierarchies) thaw(pid int) {
	for _, in := range groupsOf(pid) {
		for _, m := range h.controlled() {
			file, value := "cgroup.freeze", "0"
			if !m.v2 {
				file, value = "freezer.state", "THAWED"
			}
			if m.v2 != (len(in.controllers) == 0) || !m.v2 && !(slices.Contains(in.controllers, "freezer") && slices.Contains(m.controllers, "freezer")) {
				continue
			}
			for group := in.path; group != "/" && group != "."; group = filepath.Dir(group) {
				_ = os.WriteFile(filepath.Join(m.dir, group, file), []byte(value), 0o644) // the caller sees whether the process dies
			}
		}
	}
}

// Groups returns the groups below prefix that hold doomed processes.
func (d *Doomed) Groups(prefix string) []string {
	var found []string
	for pid := range d.started {
		for _, in := range groupsOf(pid) {
			if strings.HasPrefix(in.path, prefix+"/") && !slices.Contains(found, in.path) {
				found = append(found, in.path)
			}
		}
	}
	return found
}

// RemoveEmpty removes the group itself where no other group is below it.
func (h Hierarchies) RemoveEmpty(group string) {
	for _, m := range h.mounts {
		_ = unix.Rmdir(filepath.Join(m.dir, group)) // it stays where it is in use
	}
}

// Remove removes the group and all groups below it. They must hold no process.
func (h Hierarchies) Remove(group string) error {
	var failed error
	for _, m := range h.mounts {
		var dirs []string
		_ = filepath.WalkDir(filepath.Join(m.dir, group), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			// A group stays busy for a moment after its last process is gone.
			err := unix.Rmdir(dir)
			for i := 0; errors.Is(err, unix.EBUSY) && i < 50; i++ {
				time.Sleep(10 * time.Millisecond)
				err = unix.Rmdir(dir)
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				failed = errors.Join(failed, fmt.Errorf("removing the control group %s: %w", dir, err))
			}
		}
	}
	return failed
}

// Exists says whether the group exists in any hierarchy.
func (h Hierarchies) Exists(group string) bool {
	return slices.ContainsFunc(h.mounts, func(m mount) bool {
		_, err := os.Stat(filepath.Join(m.dir, group))
		return err == nil
	})
}

func command(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(text) == 0 {
		return "gone"
	}
	return strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))
}
