package contents

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// Write writes a difference as text for a terminal: "-" is what is gone, "+" what has
// come, "~" what changed. Names are escaped by Printable.
func (d *Difference) Write(w io.Writer) error {
	t := &text{w: bufio.NewWriter(w)}
	if d.Empty() {
		t.line(0, "", "nothing differs")
	}
	for _, name := range d.ContainersEnded {
		t.line(0, "-", "container %s", name)
	}
	for _, name := range d.ContainersBegun {
		t.line(0, "+", "container %s", name)
	}
	for i := range d.Containers {
		t.container(&d.Containers[i])
	}
	if len(d.Incomplete) > 0 {
		t.line(0, "", "cut in one of the two, so something may be missing: %s", strings.Join(d.Incomplete, ", "))
	}
	return t.w.Flush()
}

type text struct {
	w *bufio.Writer
}

// line writes one line; what is wrong with w, Flush says.
func (t *text) line(depth int, sign, format string, args ...any) {
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = Printable(s)
		}
	}
	indent := strings.Repeat("  ", depth)
	if sign != "" {
		sign += " "
	}
	fmt.Fprintf(t.w, indent+sign+format+"\n", args...)
}

func (t *text) container(d *ContainerDifference) {
	t.line(0, "", "container %s", d.Name)
	t.facts(1, d.Facts)
	if len(d.Ended)+len(d.Begun)+len(d.Processes) > 0 {
		t.line(1, "", "processes")
	}
	for _, p := range d.Ended {
		t.line(2, "-", "%d %s, %s, %s", p.PID, commandOf(p), p.State, Bytes(p.Captured))
	}
	for _, p := range d.Begun {
		t.line(2, "+", "%d %s, %s, %s", p.PID, commandOf(p), p.State, Bytes(p.Captured))
	}
	for i := range d.Processes {
		t.process(&d.Processes[i])
	}
	t.sockets(d)
	t.mounts(d)
	if len(d.RootFileSystem) > 0 {
		t.line(1, "", "root file system, against the image")
	}
	for _, f := range d.RootFileSystem {
		t.file(f)
	}
}

func commandOf(p ProcessName) string {
	if len(p.Arguments) == 0 {
		return p.Command
	}
	return strings.Join(p.Arguments, " ")
}

func (t *text) process(d *ProcessDifference) {
	t.line(2, "~", "%d %s", d.PID, d.Command)
	t.facts(4, d.Facts)
	for _, a := range d.Memory {
		what := "memory"
		if a.Name != "all" {
			what = "  " + a.Name
		}
		t.amount(4, what, a)
	}
	for i, a := range d.Mappings {
		if i == 0 {
			t.line(4, "", "mappings")
		}
		t.amount(5, a.Name, a)
	}
	if len(d.FilesOpened)+len(d.FilesClosed)+len(d.FilesChanged) > 0 {
		t.line(4, "", "open files")
	}
	for _, f := range d.FilesClosed {
		t.openFile("-", f)
	}
	for _, f := range d.FilesOpened {
		t.openFile("+", f)
	}
	for _, f := range d.FilesChanged {
		t.line(5, "~", "%d %s: %s → %s", f.FD, f.File, f.Before, f.After)
	}
	for i, v := range d.Environment {
		if i == 0 {
			t.line(4, "", "environment")
		}
		switch {
		case v.Before == "":
			t.line(5, "+", "%s=%s", v.Name, v.After)
		case v.After == "":
			t.line(5, "-", "%s=%s", v.Name, v.Before)
		default:
			t.line(5, "~", "%s=%s → %s", v.Name, v.Before, v.After)
		}
	}
}

func (t *text) facts(depth int, all []Fact) {
	for _, f := range all {
		t.line(depth, "", "%s: %s → %s", f.Name, orNone(f.Before), orNone(f.After))
	}
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}

func (t *text) amount(depth int, what string, a Amount) {
	sign := ""
	if a.After > a.Before {
		sign = "+"
	}
	t.line(depth, "", "%s: %s → %s (%s)", what, Bytes(a.Before), Bytes(a.After), sign+Bytes(a.After-a.Before))
}

func (t *text) openFile(sign string, f api.OpenFile) {
	t.line(5, sign, "%s", strings.TrimSpace(fmt.Sprintf("%d %s %s %s", f.FD, f.Type, f.Path, f.Flags)))
}

func (t *text) sockets(d *ContainerDifference) {
	if len(d.SocketsClosed)+len(d.SocketsOpened) > 0 {
		t.line(1, "", "sockets")
	}
	show := func(sign string, s api.Socket) {
		text := strings.TrimSpace(s.Protocol + " " + s.State + " " + s.Local)
		if s.Remote != "" {
			text += " → " + s.Remote
		}
		t.line(2, sign, "%s", text)
	}
	for _, s := range d.SocketsClosed {
		show("-", s)
	}
	for _, s := range d.SocketsOpened {
		show("+", s)
	}
}

func (t *text) mounts(d *ContainerDifference) {
	if len(d.MountsRemoved)+len(d.MountsAdded) > 0 {
		t.line(1, "", "mounts")
	}
	for _, m := range d.MountsRemoved {
		t.line(2, "-", "%s %s", m.Destination, m.Type)
	}
	for _, m := range d.MountsAdded {
		t.line(2, "+", "%s %s", m.Destination, m.Type)
	}
}

func (t *text) file(f FileDifference) {
	switch f.Change {
	case written:
		what := Bytes(f.After)
		if strings.HasPrefix(f.Mode, "d") {
			what = "directory"
		}
		t.line(2, "+", "%s, %s", f.Path, what)
	case removed:
		t.line(2, "-", "%s", f.Path)
	case replaced:
		t.line(2, "~", "%s: all that the image has there is gone", f.Path)
	case "undone":
		t.line(2, "~", "%s: no longer differs from the image", f.Path)
	default:
		t.line(2, "~", "%s: %s → %s", f.Path, Bytes(f.Before), Bytes(f.After))
	}
}
