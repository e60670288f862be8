package kubectl

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

// shortList is how many rows of a list are shown unless all are asked for.
const shortList = 12

// contentsWriter writes contents as a person reads them.
type contentsWriter struct {
	out io.Writer
	all bool
	err error
}

// writeContents writes what is inside a checkpoint. Everything in it was written by
// programs that are strangers here: it is shown as text and nothing else.
func writeContents(out io.Writer, c *subresourcesv1alpha1.CheckpointContents, all bool) error {
	w := &contentsWriter{out: out, all: all}
	w.head(c)
	for i := range c.Containers {
		w.container(&c.Containers[i])
	}
	var volumes [][]string
	for _, v := range c.Volumes {
		volumes = append(volumes, []string{clean(v.Name), fmt.Sprintf("%d entries", v.Files), size(v.Bytes)})
	}
	w.rows("", "Volumes", volumes)
	if len(c.Truncated) > 0 {
		w.printf("Left out, because there is too much of it: %s\n", clean(strings.Join(c.Truncated, ", ")))
	}
	return w.err
}

func (w *contentsWriter) printf(format string, args ...any) {
	if w.err == nil {
		_, w.err = fmt.Fprintf(w.out, format, args...)
	}
}

// rows prints a titled table, shortened unless all is asked for.
func (w *contentsWriter) rows(indent, title string, rows [][]string) {
	if len(rows) == 0 {
		return
	}
	w.printf("%s%s:\n", indent, title)
	left := 0
	if !w.all && len(rows) > shortList {
		rows, left = rows[:shortList], len(rows)-shortList
	}
	if w.err == nil {
		w.err = table(w.out, indent+"  ", rows)
	}
	if left > 0 {
		w.printf("%s  … and %d more (--all)\n", indent, left)
	}
}

func (w *contentsWriter) head(c *subresourcesv1alpha1.CheckpointContents) {
	pod := clean(c.Source.PodName)
	if pod != "" && c.Source.PodNamespace != "" {
		pod = clean(c.Source.PodNamespace) + "/" + pod
	}
	var cutTime, frozen string
	if c.CutTime != nil {
		cutTime = c.CutTime.UTC().Format(time.RFC3339Nano)
	}
	if c.FreezeDuration != nil {
		frozen = short(c.FreezeDuration.Duration)
	}
	head := [][]string{
		{"Checkpoint:", clean(c.Name)},
		{"Pod:", pod},
		{"Addresses:", clean(strings.Join(c.Source.PodIPs, ", "))},
		{"Moment:", cutTime},
		{"Frozen:", frozen},
		{"Capture:", captureOf(c.Capture)},
		{"Phases:", phases(c.Phases)},
		{"Engine:", clean(strings.TrimSpace(c.Engine.Name + " " + c.Engine.Version))},
		{"Runtime:", clean(c.Source.Runtime)},
		{"Platform:", clean(c.Source.Platform)},
	}
	if c.Store != nil {
		head = append(head, []string{"Store:", fmt.Sprintf("%s, which grew by %s", clean(c.Store.Name), size(c.Store.NewBytes))})
	}
	w.err = table(w.out, "", slices.DeleteFunc(head, func(row []string) bool { return row[1] == "" }))
	w.rows("", "In the store", contents.StoredTable(c.Store))
}

func (w *contentsWriter) container(c *subresourcesv1alpha1.ContainerContents) {
	w.printf("\nContainer %s, image %s, %s captured\n", clean(c.Name), clean(or(c.Image, "unknown")), size(c.ImageBytes))
	w.rows("  ", "Processes", processRows(c.Processes))
	w.rows("  ", "Biggest mappings", mappingRows(c.Processes))
	w.rows("  ", "Open files", fileRows(c.Processes))
	w.rows("  ", "Sockets", socketRows(c.Sockets))
	w.rows("  ", "Environment", environmentRows(c.Processes))
	w.rows("  ", fmt.Sprintf("Changed files, %s in all", size(c.ChangedBytes)), changeRows(c.Changes))
	var notes [][]string
	for _, note := range c.Notes {
		notes = append(notes, []string{clean(note)})
	}
	w.rows("  ", "Notes", notes)
}

// processRows are the processes as a tree.
func processRows(processes []subresourcesv1alpha1.Process) [][]string {
	if len(processes) == 0 {
		return nil
	}
	rows := [][]string{{"PID", "USER", "THREADS", "MEMORY", "STATE", "COMMAND"}}
	depth := map[int64]int{}
	for i := range processes {
		p := &processes[i]
		if parent, ok := depth[p.PPID]; ok {
			depth[p.PID] = parent + 1
		} else {
			depth[p.PID] = 0
		}
		command := p.Command
		if len(p.Arguments) > 0 {
			command = strings.Join(p.Arguments, " ")
		}
		branch := ""
		if d := min(depth[p.PID], 20); d > 0 {
			branch = strings.Repeat("  ", d-1) + "└ "
		}
		rows = append(rows, []string{strconv.FormatInt(p.PID, 10), fmt.Sprintf("%d:%d", p.UID, p.GID), strconv.FormatInt(p.Threads, 10),
			size(p.Memory.Captured), clean(p.State), branch + cut(clean(command), 100)})
	}
	return rows
}

// mappingRows are the biggest mappings of all processes.
func mappingRows(processes []subresourcesv1alpha1.Process) [][]string {
	type held struct {
		pid int64
		m   *subresourcesv1alpha1.Mapping
	}
	var mappings []held
	for i := range processes {
		for j := range processes[i].Mappings {
			if processes[i].Mappings[j].CapturedBytes > 0 {
				mappings = append(mappings, held{processes[i].PID, &processes[i].Mappings[j]})
			}
		}
	}
	if len(mappings) == 0 {
		return nil
	}
	slices.SortStableFunc(mappings, func(a, b held) int { return cmp.Compare(b.m.CapturedBytes, a.m.CapturedBytes) })
	rows := [][]string{{"PID", "SIZE", "KIND", "PROT", "ADDRESS", "PATH"}}
	for _, h := range mappings {
		rows = append(rows, []string{strconv.FormatInt(h.pid, 10), size(h.m.CapturedBytes), clean(h.m.Kind), clean(h.m.Protection), clean(h.m.Start), cut(clean(h.m.Path), 80)})
	}
	return rows
}

func fileRows(processes []subresourcesv1alpha1.Process) [][]string {
	rows := [][]string{{"PID", "FD", "TYPE", "FLAGS", "POSITION", "PATH"}}
	for i := range processes {
		for _, f := range processes[i].Files {
			position := ""
			if f.Position != 0 {
				position = strconv.FormatInt(f.Position, 10)
			}
			rows = append(rows, []string{strconv.FormatInt(processes[i].PID, 10), strconv.FormatInt(f.FD, 10), clean(f.Type), clean(f.Flags), position, cut(clean(f.Path), 100)})
		}
	}
	return unlessEmpty(rows)
}

func socketRows(sockets []subresourcesv1alpha1.Socket) [][]string {
	rows := [][]string{{"PROTOCOL", "STATE", "LOCAL", "REMOTE", "PIDS"}}
	for _, s := range sockets {
		pids := make([]string, 0, len(s.PIDs))
		for _, pid := range s.PIDs {
			pids = append(pids, strconv.FormatInt(pid, 10))
		}
		rows = append(rows, []string{clean(s.Protocol), clean(s.State), cut(clean(s.Local), 80), cut(clean(s.Remote), 80), strings.Join(pids, ",")})
	}
	return unlessEmpty(rows)
}

// environmentRows are the variables of the first process that has any: the others'
// are mostly the same, and -o json has them.
func environmentRows(processes []subresourcesv1alpha1.Process) [][]string {
	var rows [][]string
	for i := range processes {
		for _, e := range processes[i].Environment {
			value := clean(e.Value)
			if e.Masked {
				value = "(masked)"
			}
			rows = append(rows, []string{clean(e.Name), cut(value, 100)})
		}
		if len(rows) > 0 {
			break
		}
	}
	return rows
}

func changeRows(changes []subresourcesv1alpha1.FileChange) [][]string {
	var rows [][]string
	for _, c := range changes {
		bytes := ""
		if c.Size > 0 {
			bytes = size(c.Size)
		}
		rows = append(rows, []string{clean(c.Change), clean(c.Mode), bytes, cut(clean(c.Path), 120)})
	}
	return rows
}

// unlessEmpty is a table, nothing where it has a heading only.
func unlessEmpty(rows [][]string) [][]string {
	if len(rows) == 1 {
		return nil
	}
	return rows
}
