package contents

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// Compare tells what changed from one checkpoint to another: of one Pod at two times,
// or of a Pod and one restored from it. Containers are matched by name, processes by
// number and address space: a process whose program was started anew counts as ended
// and begun.
func Compare(before, after *api.CheckpointContents) *Difference {
	d := &Difference{Incomplete: slices.Compact(slices.Sorted(slices.Values(slices.Concat(before.Truncated, after.Truncated))))}
	byName := map[string]*api.ContainerContents{}
	for i := range after.Containers {
		byName[after.Containers[i].Name] = &after.Containers[i]
	}
	for i := range before.Containers {
		b := &before.Containers[i]
		a, there := byName[b.Name]
		if !there {
			d.ContainersEnded = append(d.ContainersEnded, b.Name)
			continue
		}
		delete(byName, b.Name)
		if c := compareContainers(b, a); !c.empty() {
			d.Containers = append(d.Containers, c)
		}
	}
	for _, a := range after.Containers {
		if _, left := byName[a.Name]; left {
			d.ContainersBegun = append(d.ContainersBegun, a.Name)
		}
	}
	return d
}

func compareContainers(b, a *api.ContainerContents) ContainerDifference {
	d := ContainerDifference{Name: a.Name, Facts: facts(fact{"image", b.Image, a.Image})}
	d.compareProcesses(b.Processes, a.Processes)
	d.SocketsClosed, d.SocketsOpened = onlyIn(b.Sockets, a.Sockets, func(s api.Socket) string {
		return nameless(strings.Join([]string{s.Protocol, s.State, s.Local, s.Remote}, "\x00"))
	})
	d.MountsRemoved, d.MountsAdded = onlyIn(b.Mounts, a.Mounts, func(m api.Mount) string {
		return m.Destination + "\x00" + m.Type // sources are the node's, another Pod has others
	})
	d.RootFileSystem = compareChanges(b.Changes, a.Changes)
	return d
}

// unnamed matches what the kernel numbers: pipes, sockets without a name.
var unnamed = regexp.MustCompile(`(pipe|socket):\[[0-9]+\]`)

// nameless takes the kernel's numbers out: they are others after a restore.
func nameless(s string) string { return unnamed.ReplaceAllString(s, "$1:[]") }

// onlyIn tells which items are in one list alone. Items with the same key are alike
// and counted.
func onlyIn[T any](before, after []T, key func(T) string) (gone, come []T) {
	count := map[string]int{}
	for _, item := range after {
		count[key(item)]++
	}
	for _, item := range before {
		if k := key(item); count[k] > 0 {
			count[k]--
		} else {
			gone = append(gone, item)
		}
	}
	// What is left of a key are the last ones of the list.
	for _, item := range slices.Backward(after) {
		if k := key(item); count[k] > 0 {
			count[k]--
			come = append(come, item)
		}
	}
	slices.Reverse(come)
	return gone, come
}

type fact struct {
	name          string
	before, after any
}

// facts lists those that changed.
func facts(all ...fact) []Fact {
	var out []Fact
	for _, f := range all {
		if b, a := fmt.Sprint(f.before), fmt.Sprint(f.after); b != a {
			out = append(out, Fact{f.name, b, a})
		}
	}
	return out
}

// compareChanges compares what the two have changed against their image.
func compareChanges(before, after []api.FileChange) []FileDifference {
	was := map[string]api.FileChange{}
	for _, c := range before {
		was[c.Path] = c
	}
	var out []FileDifference
	for _, c := range after {
		b, there := was[c.Path]
		delete(was, c.Path)
		switch {
		case !there || b.Change != c.Change:
			out = append(out, FileDifference{Path: c.Path, Change: c.Change, Before: b.Size, After: c.Size, Mode: c.Mode})
		case !alike(b, c):
			out = append(out, FileDifference{Path: c.Path, Change: "changed", Before: b.Size, After: c.Size, Mode: c.Mode})
		}
	}
	for _, c := range was {
		out = append(out, FileDifference{Path: c.Path, Change: "undone", Before: c.Size})
	}
	slices.SortStableFunc(out, func(a, b FileDifference) int { return strings.Compare(a.Path, b.Path) })
	return out
}

func alike(a, b api.FileChange) bool {
	if a.Digest != "" && b.Digest != "" {
		return a.Digest == b.Digest && a.Mode == b.Mode
	}
	return a.Size == b.Size && a.Mode == b.Mode && a.ModificationTime.Equal(b.ModificationTime)
}
