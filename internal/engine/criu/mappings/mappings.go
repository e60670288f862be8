// Package mappings writes what /proc/PID/smaps says of a process's mappings and their
// flags without what the kernel counts for it: it walks through all page tables, which
// takes some 30 ms for each GiB of memory. CRIU reads that file of processes that stand still
// (proc_pid_smaps(5)).
//
// The flags themselves a BPF program reads. What the kernel calls them is learned from what
// it says of this process, which makes mappings of many kinds for that: nothing here knows a
// flag, and nothing is learned from processes that others run.
package mappings

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ErrUnknown says that a process has a mapping with flags of a kind that was not learned.
var ErrUnknown = errors.New("flags that are not known")

// Names are those that the kernel has for flags. They are the same until it is booted again.
type Names struct {
	flags map[uint64]string // all flags of a mapping, as smaps has them
	gates map[string]string // likewise, by their line: mappings that are every process's
}

// entry is what smaps says of a mapping.
type entry struct {
	start, end uint64
	line       string // as in maps
	flags      string
}

const flagsPrefix = "VmFlags: "

// parse reads maps, or smaps.
func parse(data []byte) (entries []entry, err error) {
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		if flags, ok := strings.CutPrefix(line, flagsPrefix); ok && len(entries) > 0 {
			entries[len(entries)-1].flags = flags
			continue
		}
		if first, _, _ := strings.Cut(line, " "); strings.HasSuffix(first, ":") {
			continue // a count
		}
		e := entry{line: line}
		span, _, _ := strings.Cut(line, " ")
		start, end, _ := strings.Cut(span, "-")
		var bad [2]error
		e.start, bad[0] = strconv.ParseUint(start, 16, 64)
		e.end, bad[1] = strconv.ParseUint(end, 16, 64)
		if err := errors.Join(bad[:]...); err != nil {
			return nil, fmt.Errorf("a list of mappings has a line %q: %w", line, err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// Learn returns the names of the flags that mappings have which this process has or makes.
// What changes meanwhile is not learned from, nor what is not seen twice.
func Learn(k *Kernel) (*Names, error) {
	defer makeMany()()
	first, err := observe(k, os.Getpid())
	if err != nil {
		return nil, err
	}
	second, err := observe(k, os.Getpid())
	if err != nil {
		return nil, err
	}
	differ := func(of map[string]string) func(line, flags string) bool {
		return func(line, flags string) bool { return of[line] != flags }
	}
	maps.DeleteFunc(second.gates, differ(first.gates))
	maps.DeleteFunc(second.flags, func(word uint64, flags string) bool { return flags == "" || first.flags[word] != flags })
	return second, nil
}

// observe reads a process's smaps, and its mappings before and after.
func observe(k *Kernel, pid int) (*Names, error) {
	before, err := k.areas(pid)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return nil, err
	}
	after, err := k.areas(pid)
	if err != nil {
		return nil, err
	}
	entries, err := parse(data)
	if err != nil {
		return nil, err
	}
	seen := &Names{flags: map[uint64]string{}, gates: map[string]string{}}
	for _, e := range entries {
		then, was := covering(before, e)
		now, is := covering(after, e)
		switch {
		case e.flags == "":
			return nil, fmt.Errorf("process %d: smaps has no flags of %s", pid, e.line)
		case !was && !is && !inside(before, e) && !inside(after, e):
			seen.gates[e.line] = e.flags
		case was && is && then == now:
			if name, met := seen.flags[now.Flags]; met && name != e.flags {
				e.flags = "" // not the names alone: not to be relied on
			}
			seen.flags[now.Flags] = e.flags
		}
	}
	return seen, nil
}

// covering returns the area that an entry is of.
func covering(areas []area, e entry) (area, bool) {
	i, found := slices.BinarySearchFunc(areas, e.start, func(a area, start uint64) int {
		switch {
		case a.Start < start:
			return -1
		case a.Start > start:
			return 1
		}
		return 0
	})
	if !found || areas[i].End != e.end {
		return area{}, false
	}
	return areas[i], true
}

// inside says whether an entry lies before the end of the last area.
func inside(areas []area, e entry) bool {
	return len(areas) == 0 || e.start < areas[len(areas)-1].End
}

// Of writes what smaps says of a process that stands still, as much as CRIU reads: for each
// mapping its line and its flags. It is nothing for one that has ended and waits to be
// collected.
func (n *Names) Of(k *Kernel, pid int) ([]byte, error) {
	areas, err := k.areas(pid)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	entries, err := parse(data)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	left := len(areas)
	for _, e := range entries {
		flags := n.gates[e.line]
		if a, ok := covering(areas, e); ok {
			flags = n.flags[a.Flags]
			left--
		}
		if flags == "" {
			return nil, fmt.Errorf("process %d: %w: of %s", pid, ErrUnknown, e.line)
		}
		out.WriteString(e.line + "\n" + flagsPrefix + flags + "\n")
	}
	if left != 0 {
		return nil, fmt.Errorf("process %d: maps and the kernel differ by %d mappings of %d", pid, left, len(areas))
	}
	return out.Bytes(), nil
}
