package cow

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrUnfit says that the memory of a process cannot be captured this way.
var ErrUnfit = errors.New("memory cannot be captured copy-on-write")

// ErrComplete says that CRIU has written all memory: there is nothing to do.
var ErrComplete = errors.New("CRIU has written the memory itself")

// Request says what is to be captured. All paths are the host's.
type Request struct {
	Sandbox    string      `json:"sandbox"`
	Containers []Container `json:"containers"`
	// Limits are those of the memory that the containers may have.
	Limits []Limit `json:"limits,omitempty"`
	// Record is the file that says, while there are children, whose they are.
	Record string `json:"record"`
}

// Container is one that stands still, and of which CRIU has written everything else.
type Container struct {
	Name   string `json:"name"`
	Images string `json:"images"` // CRIU's
	// Freezer is the file of its cgroup that lets it go when Thaw is written to it.
	Freezer string `json:"freezer,omitempty"`
	Thaw    string `json:"thaw,omitempty"`
	// PIDs are its processes, as the host numbers them, where there is no cgroup.
	PIDs []int `json:"pids,omitempty"`
}

// members lists the processes of a container.
func (c Container) members() (pids []int, err error) {
	if c.Freezer == "" {
		return c.PIDs, nil
	}
	err = filepath.WalkDir(filepath.Dir(c.Freezer), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for field := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			pids = append(pids, pid)
		}
		return nil
	})
	return pids, err
}

// process is one whose memory is captured.
type process struct {
	container string
	dir       string // of its images
	pid       int
	start     uint64
	inner     int // its ID in the images
	old       pagemap
	mappings  []mapping
	held      []piece
	threads   []*thread
	stacks    []uint64
	suspended uintptr // PTRACE_O_SUSPEND_SECCOMP, where it has a filter
	place     place
	child     *child
}

// child is the copy of a process' memory.
type child struct {
	pid   int
	ended bool
}

func (p *process) String() string {
	return fmt.Sprintf("container %s, process %d", p.container, p.pid)
}

// capture is one capture of memory. Its methods are called by one thread.
type capture struct {
	request   Request
	log       *slog.Logger
	processes []*process
	record    record
	// settled, if set, is called before memory is read, and done when that of a process
	// has been: tests have things happen then.
	settled func()
	done    func(*process)
}

// attach finds out what is to be read, and has all threads stop as soon as they are let
// go. Nothing is changed yet.
func (c *capture) attach() error {
	if !supported {
		return fmt.Errorf("%w: this processor's registers are not known", ErrUnfit)
	}
	for _, container := range c.request.Containers {
		found, err := c.find(container)
		if err != nil {
			return fmt.Errorf("container %s: %w", container.Name, err)
		}
		c.processes = append(c.processes, found...)
	}
	budget := int64(maxHeld)
	for _, p := range c.processes {
		var err error
		if p.held, err = hold(p.pid, p.mappings, &budget); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if p.place, err = findPlace(p.pid); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	if err := c.record.begin(c.request, c.processes); err != nil {
		return err
	}
	for _, p := range c.processes {
		if err := p.seize(); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// find joins a container's images with its processes.
func (c *capture) find(container Container) ([]*process, error) {
	members, err := container.members()
	if err != nil {
		return nil, err
	}
	inner := map[int]int{}
	for _, pid := range members {
		id, err := innerPID(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		} else if err != nil {
			return nil, err
		}
		inner[id] = pid
	}
	ids, err := readTree(container.Images)
	if err != nil {
		return nil, err
	}
	var all []*process
	for _, id := range ids {
		pid, there := inner[id]
		if _, err := os.Stat(filepath.Join(container.Images, fmt.Sprintf("mm-%d.img", id))); errors.Is(err, fs.ErrNotExist) {
			continue // it had ended, and has no memory
		}
		if !there {
			return nil, fmt.Errorf("%w: process %d of the images is not there", ErrUnfit, id)
		}
		s, err := readStat(pid)
		if err != nil {
			return nil, err
		}
		if s.state == 'Z' {
			return nil, fmt.Errorf("%w: the first thread of process %d has ended", ErrUnfit, pid)
		}
		p := &process{container: container.Name, dir: container.Images, pid: pid, start: s.start, inner: id}
		if p.old, err = readPagemap(p.dir, id); err != nil {
			return nil, err
		}
		if p.mappings, err = readMappings(p.dir, id); err != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		for _, r := range p.old.runs {
			for _, m := range p.mappings {
				if r.start < m.end && r.end() > m.start {
					return nil, ErrComplete
				}
			}
		}
		all = append(all, p)
	}
	return all, nil
}

// seize attaches to all threads. They stand still, so none is added meanwhile.
func (p *process) seize() error {
	if filter, err := statusOf(p.pid, "Seccomp"); err == nil && filter != "0" {
		p.suspended = unix.PTRACE_O_SUSPEND_SECCOMP
	}
	tids, err := threadsOf(p.pid)
	if err != nil {
		return err
	}
	for _, tid := range tids {
		options := uintptr(traceOptions)
		if tid == p.pid {
			options |= p.suspended
		}
		t, err := seize(tid, options)
		if errors.Is(err, errGone) && tid != p.pid {
			continue
		}
		if err != nil {
			return err
		}
		p.threads = append(p.threads, t)
	}
	return nil
}

// leader is the thread that forks.
func (p *process) leader() *thread { return p.threads[0] }

// fork lets the containers go and has every process fork before it executes anything.
// When it returns without error all of them run.
func (c *capture) fork() error {
	for _, container := range c.request.Containers {
		if container.Freezer == "" {
			continue
		}
		if err := os.WriteFile(container.Freezer, []byte(container.Thaw), 0); err != nil {
			return fmt.Errorf("container %s: let it go: %w", container.Name, err)
		}
	}
	for _, p := range c.processes {
		for _, t := range p.threads {
			if err := t.await(); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			p.stacks = append(p.stacks, t.own.stack())
		}
		if err := ptrace(unix.PTRACE_SETOPTIONS, p.leader().tid, 0, forkOptions|p.suspended); err != nil {
			return fmt.Errorf("%s: %w", p, gone(err))
		}
	}
	// All fork at the same time, as far as there are processors.
	waiting := c.processes
	for range attempts {
		var err error
		if waiting, err = c.forkOnce(waiting); err != nil {
			return err
		}
		if len(waiting) == 0 {
			return c.release()
		}
	}
	return fmt.Errorf("%s: signals kept coming", waiting[0])
}

// forkOnce has processes fork, and returns those of which a signal kept it. No thread is
// left on its way: also when there is an error it waits for those that it has sent.
func (c *capture) forkOnce(waiting []*process) (again []*process, err error) {
	var sent []*process
	for _, p := range waiting {
		// No descriptors are copied: the child gives up its share of them when it settles.
		if err = p.leader().enter(p.place, true, unix.SYS_CLONE, [5]uint64{unix.CLONE_FILES | unix.CLONE_FS}); err == nil {
			err = gone(unix.PtraceSyscall(p.leader().tid, 0))
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", p, err)
			break
		}
		sent = append(sent, p)
	}
	errs := []error{err}
	for _, p := range sent {
		result, pid, ok, err := p.leader().leave()
		if pid != 0 {
			p.child = &child{pid: pid}
			// From here on the kernel ends it with us.
			err = errors.Join(err, c.bind(p))
		}
		switch {
		case err != nil:
		case !ok:
			again = append(again, p)
		case result < 0:
			err = fmt.Errorf("it could not be forked: %w", unix.Errno(-result))
		case pid == 0:
			err = errors.New("it forked, and the kernel did not tell")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p, err))
		}
	}
	return again, errors.Join(errs...)
}

// bind waits for a newborn child and ties its life to this process'.
func (c *capture) bind(p *process) error {
	if _, err := wait(p.child.pid); err != nil {
		return fmt.Errorf("wait for its child: %w", err)
	}
	options := uintptr(traceOptions|unix.PTRACE_O_EXITKILL) | p.suspended
	if err := ptrace(unix.PTRACE_SETOPTIONS, p.child.pid, 0, options); err != nil {
		return fmt.Errorf("tie its child: %w", gone(err))
	}
	// What is sent to its process group is not for it.
	all := ^uint64(0)
	if err := ptrace(setSignalMask, p.child.pid, unsafe.Sizeof(all), uintptr(unsafe.Pointer(&all))); err != nil {
		return fmt.Errorf("tie its child: %w", gone(err))
	}
	return nil
}

const setSignalMask = 0x420b // PTRACE_SETSIGMASK

// adopt finds children of processes that were killed while they forked: then nobody has
// told of the child.
func (c *capture) adopt() {
	known := map[int]bool{}
	for _, p := range c.processes {
		for _, t := range p.threads {
			known[t.tid] = true
		}
		if p.child != nil {
			known[p.child.pid] = true
		}
	}
	for range c.processes {
		var info struct {
			unix.Siginfo
		}
		if err := unix.Waitid(unix.P_ALL, 0, &info.Siginfo, unix.WSTOPPED|unix.WNOHANG|unix.WALL, nil); err != nil {
			return
		}
		const offset = 16 // of si_pid
		pid := int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), offset)))
		if pid == 0 {
			return
		}
		for _, p := range c.processes {
			if !known[pid] && p.child == nil && ending(p.pid) {
				p.child = &child{pid: pid}
				known[pid] = true
				ptrace(unix.PTRACE_SETOPTIONS, pid, 0, uintptr(traceOptions|unix.PTRACE_O_EXITKILL)|p.suspended)
			}
		}
	}
}

// release lets all processes go on as they were.
func (c *capture) release() error {
	var errs []error
	for _, p := range c.processes {
		for i, t := range p.threads {
			if i == 0 && t.stopped {
				if err := p.place.clear(t.tid); err != nil && !errors.Is(err, errGone) {
					errs = append(errs, fmt.Errorf("%s: %w", p, err))
				}
			}
			if err := t.release(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", p, err))
			}
		}
	}
	return errors.Join(errs...)
}

// closeRangeUnshare gives up a shared table of descriptors without copying any of it.
const closeRangeUnshare = 1 << 1

// settle is for children what can wait until the processes run: they keep nothing open
// that the processes close (a peer would wait for the end of a stream), and are what the
// kernel ends first when memory runs out.
func (c *capture) settle() error {
	for _, p := range c.processes {
		if err := p.callInChild("close_range", unix.SYS_CLOSE_RANGE, [5]uint64{0, math.MaxUint32, closeRangeUnshare}); err != nil {
			return fmt.Errorf("%s: prepare its child: %w", p, err)
		}
		score := filepath.Join("/proc", strconv.Itoa(p.child.pid), "oom_score_adj")
		if err := os.WriteFile(score, []byte("1000"), 0); err != nil {
			return fmt.Errorf("%s: prepare its child: %w", p, err)
		}
	}
	return nil
}

// read writes the memory of a process into its images. It may be called by any thread.
func (p *process) read(ctx context.Context, progress *atomic.Int64, spent func(span)) (int64, error) {
	n, err := writePages(ctx, p.dir, p.inner, p.old, p.mappings, p.held, p.stacks, p.child.pid, progress, spent)
	if err != nil {
		return n, fmt.Errorf("%s: %w", p, err)
	}
	return n, nil
}

// forget has the child of a process give up memory that has been read. A page that nobody
// else has is the process' own again: to write to it, it needs no copy, which takes memory
// and, of a process with several threads, an interrupt of all processors that run these.
func (p *process) forget(s span) error {
	return p.callInChild("madvise", unix.SYS_MADVISE, [5]uint64{s.start, s.end - s.start, unix.MADV_DONTNEED})
}

// callInChild has the child of a process execute a system call that returns 0.
func (p *process) callInChild(name string, nr uint64, args [5]uint64) error {
	t := &thread{tid: p.child.pid, stopped: true}
	var err error
	if t.own, err = getRegisters(t.tid); err != nil {
		return gone(err)
	}
	result, err := t.call(p.place, nr, args)
	if err == nil && result != 0 {
		err = fmt.Errorf("%s: %w", name, unix.Errno(-result))
	}
	return err
}

// watchInterval is how often limits are looked at while there are children.
const watchInterval = 4 * time.Millisecond

// readAll reads the memory of all processes, and ends each child as soon as it can.
func (c *capture) readAll(ctx context.Context) (total int64, err error) {
	for _, p := range c.processes {
		n, err := c.readBeside(ctx, p)
		if total += n; err != nil {
			return total, err
		}
		if c.done != nil {
			c.done(p)
		}
		if err := c.reap(p); err != nil {
			c.log.Warn("a child could not be collected yet", "process", p.pid, "child", p.child.pid, "err", err)
		}
	}
	return total, nil
}

// readBeside reads the memory of a process while all run, as long as there is memory for
// what they write.
func (c *capture) readBeside(ctx context.Context, p *process) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type outcome struct {
		bytes int64
		err   error
	}
	var progress atomic.Int64
	begun, done, spent := make(chan readingThread), make(chan outcome, 1), make(chan span, 1)
	go func() {
		runtime.LockOSThread() // and ends with it: its priority is nobody else's
		r, err := newReadingThread()
		if err != nil {
			c.log.Warn("memory is read with the priority of everybody", "err", err)
		}
		begun <- r
		n, err := p.read(ctx, &progress, func(s span) {
			select {
			case spent <- s:
			case <-ctx.Done():
			}
		})
		done <- outcome{n, err}
	}()
	reading := <-begun
	hurry := sync.OnceFunc(func() {
		if err := reading.hurry(); err != nil {
			c.log.Warn("memory is read, and children are collected, with a low priority", "err", err)
		}
	})
	defer hurry() // a parent stands still while it collects its child
	giveUp := func(why error) (int64, error) {
		c.endChildren() // first: each moment counts
		hurry()
		cancel(why)
		return (<-done).bytes, why
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var since time.Time // of what has a pace: not of listing the pages
	var before time.Duration
	forgets := true
	for {
		select {
		case s := <-spent:
			if !forgets {
				continue
			}
			if err := p.forget(s); err != nil {
				forgets = false // it has it until it ends
				c.log.Warn("a child keeps memory that has been read", "process", p.pid, "child", p.child.pid, "err", err)
			}
		case o := <-done:
			return o.bytes, o.err
		case <-ctx.Done():
			return giveUp(context.Cause(ctx))
		case <-tick.C:
			if progress.Load() == 0 {
				since, before = time.Now(), reading.used()
			}
			if exceeded(c.request.Limits, hurryReserves) == nil && getsOn(reading.used()-before, time.Since(since)) {
				continue
			}
			hurry()
			if why := exceeded(c.request.Limits, 1); why != nil {
				return giveUp(why)
			}
		}
	}
}

// endChildren kills all children at once, but those whose end their parent would see (see
// reap). They are collected later.
func (c *capture) endChildren() {
	for _, p := range c.processes {
		if p.child == nil || p.child.ended {
			continue
		}
		if s, err := readStat(p.child.pid); err == nil && s.parent == p.pid {
			unix.Kill(p.child.pid, unix.SIGKILL)
		}
	}
}
