package contents

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

func (d *ContainerDifference) compareProcesses(before, after []api.Process) {
	byPID := map[int64]*api.Process{}
	for i := range after {
		byPID[after[i].PID] = &after[i]
	}
	same := map[int64]bool{}
	for i := range before {
		b := &before[i]
		a := byPID[b.PID]
		if a == nil || !sameProcess(b, a) {
			d.Ended = append(d.Ended, processName(b))
			continue
		}
		same[b.PID] = true
		if p := compareProcess(b, a); !p.empty() {
			d.Processes = append(d.Processes, p)
		}
	}
	for i := range after {
		if !same[after[i].PID] {
			d.Begun = append(d.Begun, processName(&after[i]))
		}
	}
}

// sameProcess says whether two processes of one number are the same: their program was
// started once. What has ended has no address space any more, only a name.
func sameProcess(b, a *api.Process) bool {
	if b.AddressSpace == "" || a.AddressSpace == "" {
		return b.Command == a.Command
	}
	return b.AddressSpace == a.AddressSpace
}

func processName(p *api.Process) ProcessName {
	return ProcessName{PID: p.PID, Command: p.Command, State: p.State, Arguments: p.Arguments, Captured: p.Memory.Captured}
}

func compareProcess(b, a *api.Process) ProcessDifference {
	d := ProcessDifference{PID: a.PID, Command: a.Command}
	d.Facts = facts(
		fact{"command", b.Command, a.Command},
		fact{"arguments", strings.Join(b.Arguments, " "), strings.Join(a.Arguments, " ")},
		fact{"state", b.State, a.State},
		fact{"parent", b.PPID, a.PPID},
		fact{"threads", b.Threads, a.Threads},
		fact{"user", b.UID, a.UID},
		fact{"group", b.GID, a.GID},
		fact{"capabilities", capabilityList(b), capabilityList(a)},
		fact{"working directory", b.WorkingDirectory, a.WorkingDirectory},
	)
	d.Memory = compareMemory(b.Memory, a.Memory)
	d.Mappings = compareMappings(b, a)
	d.compareFiles(b.Files, a.Files)
	d.Environment = compareEnvironment(b.Environment, a.Environment)
	return d
}

func capabilityList(p *api.Process) string {
	if p.Credentials == nil {
		return ""
	}
	return strings.Join(p.Credentials.Capabilities, " ")
}

func compareMemory(b, a api.ProcessMemory) []Amount {
	if b.Captured == a.Captured && b.Virtual == a.Virtual {
		return nil
	}
	amounts := []Amount{{"all", b.Captured, a.Captured}}
	for _, kind := range []string{kindHeap, kindStack, kindAnonymous, kindShared, kindFile, kindVDSO, kindOther} {
		if b.ByKind[kind] != a.ByKind[kind] {
			amounts = append(amounts, Amount{kind, b.ByKind[kind], a.ByKind[kind]})
		}
	}
	if b.Virtual != a.Virtual {
		amounts = append(amounts, Amount{"virtual", b.Virtual, a.Virtual})
	}
	return amounts
}

// mostMappings is how many of those that changed are told.
const mostMappings = 10

// compareMappings tells which mappings grew or shrank most. One that is in one list
// alone may only be too small for the other, unless that one has all that was captured.
func compareMappings(b, a *api.Process) []Amount {
	type key struct{ start, kind, path string }
	of := func(m *api.Mapping) key { return key{m.Start, m.Kind, m.Path} }
	was, sum := map[key]int64{}, int64(0)
	for i := range b.Mappings {
		was[of(&b.Mappings[i])] = b.Mappings[i].CapturedBytes
		sum += b.Mappings[i].CapturedBytes
	}
	wholeBefore, wholeAfter := sum == b.Memory.Captured, true
	var out []Amount
	add := func(k key, before, after int64) {
		if before != after {
			out = append(out, Amount{strings.TrimSpace(fmt.Sprintf("%s %s %s", k.start, k.kind, k.path)), before, after})
		}
	}
	sum = 0
	for i := range a.Mappings {
		m := &a.Mappings[i]
		sum += m.CapturedBytes
		before, there := was[of(m)]
		if delete(was, of(m)); there || wholeBefore {
			add(of(m), before, m.CapturedBytes)
		}
	}
	if wholeAfter = sum == a.Memory.Captured; wholeAfter {
		for k, before := range was {
			add(k, before, 0)
		}
	}
	slices.SortFunc(out, func(x, y Amount) int {
		return cmp.Or(cmp.Compare(change(y), change(x)), strings.Compare(x.Name, y.Name))
	})
	return out[:min(len(out), mostMappings)]
}

func change(a Amount) int64 { return max(a.After-a.Before, a.Before-a.After) }

func (d *ProcessDifference) compareFiles(before, after []api.OpenFile) {
	key := func(f api.OpenFile) string {
		name, _ := fileState(f)
		return fmt.Sprint(f.FD, "\x00", f.Type, "\x00", nameless(name), "\x00", f.Flags)
	}
	d.FilesClosed, d.FilesOpened = onlyIn(before, after, key)
	was := map[string]string{}
	for _, f := range before {
		_, was[key(f)] = fileState(f)
	}
	for _, f := range after {
		name, state := fileState(f)
		if b, there := was[key(f)]; there && b != state {
			d.FilesChanged = append(d.FilesChanged, FileChanged{FD: f.FD, File: name, Before: b, After: state})
		}
	}
}

// fileState takes apart what an open file is and what may change of it. How long a timer
// still runs is neither: time passes.
func fileState(f api.OpenFile) (name, state string) {
	switch f.Type {
	case "timerfd":
		return f.Type, ""
	case "eventpoll", "eventfd", "inotify", "fanotify", "signalfd":
		return f.Type, f.Path
	}
	name, state = f.Path, fmt.Sprintf("position %d", f.Position)
	if name, deleted := strings.CutSuffix(name, deletedSuffix); deleted {
		return name, state + ", deleted"
	}
	return name, state
}

// compareEnvironment compares by name; of values only those that both show.
func compareEnvironment(before, after []api.EnvironmentVariable) []Fact {
	show := func(v api.EnvironmentVariable) string {
		switch {
		case v.Masked:
			return "(masked)"
		case v.Value == "":
			return "(empty)"
		}
		return v.Value
	}
	was := map[string]api.EnvironmentVariable{}
	for _, v := range before {
		was[v.Name] = v
	}
	var out []Fact
	for _, v := range after {
		b, there := was[v.Name]
		delete(was, v.Name)
		switch {
		case !there:
			out = append(out, Fact{Name: v.Name, After: show(v)})
		case !b.Masked && !v.Masked && b.Value != v.Value:
			out = append(out, Fact{v.Name, show(b), show(v)})
		}
	}
	for _, v := range was {
		out = append(out, Fact{Name: v.Name, Before: show(v)})
	}
	slices.SortStableFunc(out, func(a, b Fact) int { return strings.Compare(a.Name, b.Name) })
	return out
}
