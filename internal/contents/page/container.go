package page

import (
	"fmt"
	"math"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

type containerView struct {
	ID, Name, Image, Size string
	Processes             []processView
	Legend                []kind
	Sockets               []socketView
	Mounts                []mountView
	Changes               []changeView
	Changed               string
	Notes                 []string
}

type processView struct {
	ID, Command, Line string
	State, StateClass string
	PID, PPID         int64
	Threads           int64
	User              string
	Rails             []string // classes of what leads to it in the tree
	First, Inside     bool     // Inside says that there is more to say
	Captured, Virtual string
	// Width is how much the process has of what the biggest has, in percent.
	Width       float64
	Kinds       []segment // by kind
	Map         []segment // by address
	Mappings    []mappingView
	Uncaptured  int // mappings
	Files       []fileView
	Environment []pair
	Masked      int
	Facts       []pair
	Described   string // the bar in words
}

// segment is a part of a bar.
type segment struct {
	Class, Title string
	Grow         float64
}

// kind is one of the legend.
type kind struct{ Class, Name, Bytes string }

type mappingView struct{ Range, Protection, Class, Kind, Path, Captured string }

type fileView struct {
	FD                          int64
	Type, Path, Position, Flags string
}

type socketView struct{ Protocol, State, Local, Remote, Holders string }

type mountView struct{ Destination, Type, Source, Options string }

type changeView struct{ Path, Change, Class, Size, Mode, Time string }

func newContainer(n int, c *api.ContainerContents) containerView {
	v := containerView{
		ID: fmt.Sprintf("c%d", n), Name: show(c.Name), Image: show(c.Image), Size: contents.Bytes(c.ImageBytes),
		Changed: contents.Bytes(c.ChangedBytes), Legend: legend(c),
	}
	depth, biggest := map[int64]int{}, int64(1)
	for i := range c.Processes {
		biggest = max(biggest, c.Processes[i].Memory.Captured)
	}
	for i := range c.Processes {
		p := &c.Processes[i]
		if above, known := depth[p.PPID]; known {
			depth[p.PID] = above + 1
		} else {
			depth[p.PID] = 0
		}
		pv := newProcess(p, float64(biggest))
		pv.ID, pv.First = fmt.Sprintf("%s-p%d", v.ID, i), i == 0
		pv.Rails = rails(depth[p.PID])
		v.Processes = append(v.Processes, pv)
	}
	for _, s := range c.Sockets {
		v.Sockets = append(v.Sockets, socketView{show(s.Protocol), show(s.State), show(s.Local), show(s.Remote), strings.Trim(fmt.Sprint(s.PIDs), "[]")})
	}
	for _, m := range c.Mounts {
		v.Mounts = append(v.Mounts, mountView{show(m.Destination), show(m.Type), show(m.Source), show(strings.Join(m.Options, ", "))})
	}
	for _, f := range c.Changes {
		v.Changes = append(v.Changes, newChange(f))
	}
	for _, note := range c.Notes {
		v.Notes = append(v.Notes, show(note))
	}
	return v
}

// rails lead to a process of some depth; deeper than it shows is no deeper.
func rails(depth int) []string {
	var out []string
	for i := range min(depth, 12) {
		if i == min(depth, 12)-1 {
			out = append(out, "rail elbow")
		} else {
			out = append(out, "rail")
		}
	}
	return out
}

func newProcess(p *api.Process, biggest float64) processView {
	v := processView{
		Command: show(p.Command), Line: show(strings.Join(p.Arguments, " ")), State: show(p.State),
		PID: p.PID, PPID: p.PPID, Threads: p.Threads, User: fmt.Sprintf("%d:%d", p.UID, p.GID),
		Captured: contents.Bytes(p.Memory.Captured), Virtual: contents.Bytes(p.Memory.Virtual),
		Width: math.Round(float64(p.Memory.Captured)/biggest*1000) / 10, Facts: processFacts(p),
	}
	switch p.State {
	case "running", "stopped", "zombie":
		v.StateClass = p.State
	}
	v.Kinds, v.Described = byKind(p)
	v.Map = byAddress(p)
	for _, m := range p.Mappings {
		if m.CapturedBytes <= 0 {
			v.Uncaptured++
			continue
		}
		v.Mappings = append(v.Mappings, mappingView{show(m.Start + "–" + m.End), show(m.Protection), class(m.Kind), show(m.Kind), show(m.Path), contents.Bytes(m.CapturedBytes)})
	}
	for _, f := range p.Files {
		v.Files = append(v.Files, newFile(f))
	}
	for _, e := range p.Environment {
		if e.Masked {
			v.Masked++
			v.Environment = append(v.Environment, pair{show(e.Name), "•••"})
		} else {
			v.Environment = append(v.Environment, pair{show(e.Name), show(e.Value)})
		}
	}
	v.Inside = len(v.Files)+len(v.Map)+len(v.Facts)+len(v.Environment) > 0
	return v
}

func processFacts(p *api.Process) []pair {
	all := []pair{{"Program", show(p.Executable)}, {"Working directory", show(p.WorkingDirectory)},
		{"Threads", show(strings.Join(p.ThreadNames, ", "))}}
	if c := p.Credentials; c != nil {
		if c.EffectiveUID != p.UID || c.EffectiveGID != p.GID {
			all = append(all, pair{"Effective user and group", fmt.Sprintf("%d:%d", c.EffectiveUID, c.EffectiveGID)})
		}
		all = append(all, pair{"Groups", strings.Trim(fmt.Sprint(c.Groups), "[]")}, pair{"Capabilities", show(strings.Join(c.Capabilities, ", "))})
		confined := "seccomp " + show(c.Seccomp)
		if c.NoNewPrivileges {
			confined += ", no new privileges"
		}
		all = append(all, pair{"Confinement", confined})
	}
	var there []pair
	for _, f := range all {
		if f.Value != "" {
			there = append(there, f)
		}
	}
	return there
}

func newFile(f api.OpenFile) fileView {
	v := fileView{FD: f.FD, Type: show(f.Type), Path: show(f.Path), Flags: show(strings.ReplaceAll(f.Flags, "|", " "))}
	if f.Type == "regular" || f.Type == "memfd" {
		v.Position = fmt.Sprint(f.Position)
	}
	return v
}

func newChange(f api.FileChange) changeView {
	v := changeView{Path: show(f.Path), Change: show(f.Change), Class: "change", Mode: show(f.Mode)}
	switch f.Change {
	case "written", "removed", "replaced":
		v.Class = "change " + f.Change
	}
	if strings.HasPrefix(f.Mode, "-") {
		v.Size = contents.Bytes(f.Size)
	}
	if f.ModificationTime != nil {
		v.Time = f.ModificationTime.UTC().Format("2006-01-02 15:04:05")
	}
	return v
}
