// Package mappings writes what /proc/PID/smaps says of a process's mappings and their
// flags without what the kernel counts for it: it walks through all page tables, which
// takes some 30 ms for each GiB of memory. CRIU reads that file of processes that stand still
// (proc_pid_smaps(5)).
//
// The flags themselves a BPF program reads. What the kernel calls them is learned from
// what it says, at leisure, of processes that run: nothing here knows a flag.
package mappings

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ErrUnknown says that a process has a mapping with flags that have not been met yet.
var ErrUnknown = errors.New("flags that are not known yet")

// Names are those that the kernel has for flags. They are the same until it is booted again.
// Its methods may be called at one time.
type Names struct {
	mu    sync.Mutex
	flags map[uint64]string // all flags of a mapping, as smaps has them
	gates map[string]string // likewise, by their line: mappings that are every process's
	wrong error             // why they are not to be relied on
}

// NewNames returns none.
func NewNames() *Names { return &Names{flags: map[uint64]string{}, gates: map[string]string{}} }

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

// Learn sees to it that the names of all flags of a process's mappings are known. The process
// may run: what changes meanwhile is not learned from, nor is what is not seen twice.
func (n *Names) Learn(k *Kernel, pid int) error {
	areas, err := k.areas(pid)
	if err != nil {
		return err
	}
	if known, err := n.know(areas); known || err != nil {
		return err
	}
	first, err := observe(k, pid)
	if err != nil {
		return err
	}
	second, err := observe(k, pid)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for line, flags := range second.gates {
		if first.gates[line] == flags {
			n.gates[line] = flags
		}
	}
	for word, flags := range second.flags {
		switch {
		case flags == "" || first.flags[word] != flags:
		case n.flags[word] == "":
			n.flags[word] = flags
		case n.flags[word] != flags:
			n.wrong = fmt.Errorf("the kernel calls the flags %x of a mapping %q and %q", word, n.flags[word], flags)
		}
	}
	return n.wrong
}

// observe reads a process's smaps, and its mappings before and after.
func observe(k *Kernel, pid int) (seen *Names, err error) {
	seen = NewNames()
	before, err := k.areas(pid)
	if err != nil {
		return seen, err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return seen, err
	}
	after, err := k.areas(pid)
	if err != nil {
		return seen, err
	}
	entries, err := parse(data)
	if err != nil {
		return seen, err
	}
	for _, e := range entries {
		then, was := covering(before, e)
		now, is := covering(after, e)
		switch {
		case e.flags == "":
			return seen, fmt.Errorf("process %d: smaps has no flags of %s", pid, e.line)
		case !was && !is && !inside(before, e) && !inside(after, e):
			seen.gates[e.line] = e.flags
		case was && is && then == now:
			if name, met := seen.flags[now.Flags]; met && name != e.flags {
				e.flags = "" // one of them has changed meanwhile: not learned from
			}
			seen.flags[now.Flags] = e.flags
		}
	}
	return seen, nil
}

// know says whether all names are known. Those of the gates are learned with the first.
func (n *Names) know(areas []area) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.flags) > 0 && !slices.ContainsFunc(areas, func(a area) bool { return n.flags[a.Flags] == "" }), n.wrong
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
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.wrong != nil {
		return nil, n.wrong
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
