package contents

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criufs "github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents/images"
)

// processes reads what the engine captured of one container.
type processes struct {
	*reader
	notes  *notes
	source *images.Source
	names  map[string]int64 // the images, with their sizes
	files  *fileTable
	shared map[uint64]*sharedMemory
	held   int64 // bytes
}

func newProcesses(r *reader, n *notes, dir fs.FS, names map[string]int64) *processes {
	// What one container's images use up is not there for the next ones.
	source := images.New(dir, r.limits.ImageBytes)
	return &processes{reader: r, notes: n, source: source, names: names, shared: map[uint64]*sharedMemory{}}
}

// hold says whether n more bytes may be held.
func (p *processes) hold(n int) bool {
	if p.held+int64(n) > p.limits.HeldBytes {
		p.notes.add("not everything was read: the images hold more than %d bytes of files and shared memory", p.limits.HeldBytes)
		return false
	}
	p.held += int64(n)
	return true
}

// failed notes why an image was not read. It returns an error only if ctx ended.
func (p *processes) failed(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	p.notes.add("%s: %v", what, err)
	return nil
}

func (p *processes) read(ctx context.Context, c *api.ContainerContents) error {
	defer func() { p.limits.ImageBytes = max(p.source.Left(), 1) }()
	if p.sayWhatIsSkipped(); p.names["pstree.img"] == 0 {
		p.notes.add("there is no image of the process tree: nothing can be said of processes")
		return p.mounts(ctx, 0, c)
	}
	p.files = newFileTable(p)
	if err := p.files.read(ctx); err != nil {
		return err
	}
	tasks, err := p.tasks(ctx)
	if err != nil {
		return err
	}
	mountNS := uint64(0)
	for i, t := range tasks {
		if !p.fits(p.at+".processes", i, p.limits.Processes, 0) {
			break
		}
		at := fmt.Sprintf("%s.processes[%d]", p.at, i)
		process, ns, err := p.process(ctx, at, t)
		if err != nil {
			return err
		}
		if mountNS == 0 {
			mountNS = ns
		}
		p.given += int64(len(process.Command) + len(process.Executable) + len(process.WorkingDirectory))
		c.Processes = append(c.Processes, *process)
	}
	c.Sockets = p.files.sockets()
	return p.mounts(ctx, mountNS, c)
}

// task is an entry of the process tree.
type task struct {
	pid, ppid uint32
	count     int      // of threads
	threads   []uint32 // of those that are named
}

// tasks reads the process tree, parents before their children.
func (p *processes) tasks(ctx context.Context) ([]task, error) {
	var tasks []task
	err := images.Messages(ctx, p.source, "pstree.img", images.PSTree, func(e *pstree.PstreeEntry) error {
		if len(tasks) > p.limits.Processes {
			return nil // one more than are given out is enough to say so
		}
		all := e.GetThreads()
		tasks = append(tasks, task{e.GetPid(), e.GetPpid(), len(all), slices.Clone(all[:min(len(all), p.limits.Threads)])})
		return nil
	})
	return inTreeOrder(tasks), p.failed(ctx, "process tree", err)
}

// inTreeOrder puts parents before their children, each subtree together. What is in
// no tree (a parent that is its own descendant) comes last.
func inTreeOrder(tasks []task) []task {
	children, known := map[uint32][]int{}, map[uint32]bool{}
	for i, t := range tasks {
		children[t.ppid] = append(children[t.ppid], i)
		known[t.pid] = true
	}
	var ordered []task
	seen := make([]bool, len(tasks))
	visit := func(stack []int) {
		for len(stack) > 0 {
			i := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if seen[i] {
				continue
			}
			seen[i] = true
			ordered = append(ordered, tasks[i])
			below := slices.Clone(children[tasks[i].pid])
			slices.Reverse(below)
			stack = append(stack, below...)
			delete(children, tasks[i].pid)
		}
	}
	for i, t := range tasks {
		if !known[t.ppid] {
			visit([]int{i})
		}
	}
	for i := range tasks {
		visit([]int{i})
	}
	return ordered
}

func (p *processes) process(ctx context.Context, at string, t task) (*api.Process, uint64, error) {
	out := &api.Process{PID: int64(t.pid), PPID: int64(t.ppid), Threads: int64(max(t.count, 1)), State: "unknown"}
	core, err := p.source.ReadTask(ctx, t.pid)
	if err := p.failed(ctx, fmt.Sprintf("process %d", t.pid), err); err != nil {
		return nil, 0, err
	}
	if core == nil {
		return out, 0, nil
	}
	out.Command, out.State = p.clean(core.Command), state(core.State)
	p.credentials(out, at, core)
	if core.State != images.StateAlive && core.State != images.StateStopped {
		return out, core.MountNS, nil
	}
	for _, step := range []func(context.Context, string, task, *images.Task, *api.Process) error{
		p.threadNames, p.memory, p.openFiles, p.directory,
	} {
		if err := step(ctx, at, t, core, out); err != nil {
			return nil, 0, err
		}
	}
	return out, core.MountNS, nil
}

func state(s uint64) string {
	switch s {
	case images.StateAlive:
		return "running"
	case images.StateStopped:
		return "stopped"
	case images.StateDead, images.StateZombie:
		return "zombie"
	}
	return fmt.Sprintf("state %d", s)
}

func (p *processes) credentials(out *api.Process, at string, core *images.Task) {
	c := core.Creds
	if c == nil {
		return
	}
	out.UID, out.GID = int64(c.GetUid()), int64(c.GetGid())
	out.Credentials = &api.Credentials{
		EffectiveUID: int64(c.GetEuid()), EffectiveGID: int64(c.GetEgid()),
		Capabilities:    capabilities(c),
		NoNewPrivileges: c.GetNoNewPrivs() != 0,
		Seccomp:         map[uint64]string{images.SeccompDisabled: "disabled", images.SeccompStrict: "strict", images.SeccompFilter: "filter"}[core.Seccomp],
	}
	for i, g := range c.GetGroups() {
		if !p.fits(at+".credentials.groups", i, p.limits.Variables, 0) {
			break
		}
		out.Credentials.Groups = append(out.Credentials.Groups, int64(g))
	}
}

func capabilities(c *creds.CredsEntry) []string {
	var names []string
	for i, word := range c.GetCapEff() {
		for bit := range 32 {
			if word&(1<<bit) != 0 && i < 2 {
				names = append(names, capabilityName(32*i+bit))
			}
		}
	}
	return names
}

func (p *processes) threadNames(ctx context.Context, at string, t task, _ *images.Task, out *api.Process) error {
	if t.count < 2 {
		return nil // it is the command
	}
	if t.count > len(t.threads) {
		p.cuts(at + ".threadNames")
	}
	for i, id := range t.threads {
		if !p.fits(at+".threadNames", i, p.limits.Threads, 16) {
			break
		}
		thread, err := p.source.ReadTask(ctx, id)
		if err := p.failed(ctx, fmt.Sprintf("thread %d of process %d", id, t.pid), err); err != nil {
			return err
		}
		name := ""
		if thread != nil {
			name = thread.Command
		}
		out.ThreadNames = append(out.ThreadNames, p.clean(name))
	}
	return nil
}

func (p *processes) directory(ctx context.Context, _ string, t task, _ *images.Task, out *api.Process) error {
	name := fmt.Sprintf("fs-%d.img", t.pid)
	err := images.Messages(ctx, p.source, name, images.FS, func(e *criufs.FsEntry) error {
		out.WorkingDirectory = p.files.path(uint64(e.GetCwdId()))
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it shares another's
	}
	return p.failed(ctx, fmt.Sprintf("working directory of process %d", t.pid), err)
}
