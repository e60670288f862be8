package contents

import (
	"bytes"
	"fmt"
	"sort"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents/images"
)

// maxWindow is the most that is read of a command line or an environment.
const maxWindow = 128 << 10

// window is a range of a process's memory that is read.
type window struct {
	start, end uint64
	runs       []images.Pages // that lie in it
	cut        bool           // there is more
}

func newWindow(start, end uint64) *window {
	w := &window{start: start, end: end}
	if end < start {
		w.end = start
	}
	if w.end-w.start > maxWindow {
		w.end, w.cut = start+maxWindow, true
	}
	return w
}

// found takes note of a run of pages. There are as many as the window has pages at most.
func (w *window) found(run images.Pages) {
	if run.Start >= w.end || run.End <= w.start || run.Offset < 0 || run.Start == run.End {
		return
	}
	start := max(run.Start, w.start)
	run.Offset += int64(start - run.Start)
	run.Start, run.End = start, min(run.End, w.end)
	w.runs = append(w.runs, run)
}

// read returns the window's bytes, as far as they are known: a page that was not
// captured is one of zeros where the mapping has no file behind it.
func (p *processes) readWindow(w *window, pagesID uint32, mappings []images.Mapping) (b []byte, whole bool) {
	b = make([]byte, w.end-w.start)
	at := w.start
	for _, run := range w.runs {
		if !zeros(mappings, at, run.Start) {
			return b[:at-w.start], false
		}
		if err := p.source.ReadPages(pagesID, b[run.Start-w.start:run.End-w.start], run.Offset); err != nil {
			p.notes.add("captured memory: %v", err)
			return b[:run.Start-w.start], false
		}
		at = run.End
	}
	if !zeros(mappings, at, w.end) {
		return b[:at-w.start], false
	}
	return b, !w.cut
}

// zeros says whether memory that was not captured was never written.
func zeros(mappings []images.Mapping, start, end uint64) bool {
	if start == end {
		return true
	}
	i := sort.Search(len(mappings), func(i int) bool { return mappings[i].End > start })
	return i < len(mappings) && mappings[i].Start <= start && mappings[i].End >= end &&
		mappings[i].Mode&images.StatusAnonPrivate != 0 && mappings[i].Mode&images.StatusFilePrivate == 0
}

func (p *processes) commandLine(at string, t task, mm *images.Memory, pagesID uint32, args, env *window, out *api.Process) {
	text, whole := p.readWindow(args, pagesID, mm.Mappings)
	if !whole {
		p.notes.add("process %d: its command line was not captured as a whole", t.pid)
	}
	environment, whole := p.readWindow(env, pagesID, mm.Mappings)
	if !whole {
		p.notes.add("process %d: its environment was not captured as a whole", t.pid)
	}
	p.arguments(at, text, environment, args.end == env.start, out)
	p.environment(at, t, environment, out)
}

// arguments splits a command line. A process that gives itself a title writes over
// its arguments, and the title may go on in the environment; the kernel then shows
// it up to its first NUL (proc_pid_cmdline), and so does this.
func (p *processes) arguments(at string, text, environment []byte, adjacent bool, out *api.Process) {
	var items [][]byte
	if n := len(text); n > 0 && text[n-1] != 0 {
		if adjacent && bytes.IndexByte(text, 0) < 0 {
			text = append(text[:n:n], environment...)
		}
		title, _, _ := bytes.Cut(text, []byte{0})
		items = [][]byte{title}
	} else {
		items = split(text)
	}
	for i, item := range items {
		if !p.fits(at+".arguments", i, p.limits.Arguments, len(item)) {
			return
		}
		out.Arguments = append(out.Arguments, p.clean(string(item)))
	}
}

// split splits at NUL bytes; the last one ends the last item. Zeros at the end are
// no empty items.
func split(b []byte) [][]byte {
	if b = bytes.TrimRight(b, "\x00"); len(b) == 0 {
		return nil
	}
	return bytes.Split(b, []byte{0})
}

// environment gives out the variables. What does not look like a variable may be a
// part of a value whose beginning was written over, and is left out.
func (p *processes) environment(at string, t task, text []byte, out *api.Process) {
	strange := 0
	for _, item := range split(text) {
		name, value, ok := strings.Cut(string(item), "=")
		if !ok || !isVariable(name) {
			if len(item) > 0 {
				strange++
			}
			continue
		}
		v := api.EnvironmentVariable{Name: p.clean(name)}
		if v.Masked = !p.show && !harmless(name); !v.Masked {
			v.Value = p.clean(value)
		}
		if !p.fits(at+".environment", len(out.Environment), p.limits.Variables, len(v.Name)+len(v.Value)) {
			break
		}
		out.Environment = append(out.Environment, v)
	}
	if strange > 0 {
		p.notes.add("%s", fmt.Sprintf("process %d: %d strings where its environment was are no variables, and left out", t.pid, strange))
	}
}

// isVariable says whether a name is one that programs give variables.
func isVariable(name string) bool {
	for i, c := range []byte(name) {
		letter := c == '_' || 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (i == 0 || !('0' <= c && c <= '9' || c == '.' || c == '-')) {
			return false
		}
	}
	return name != ""
}
