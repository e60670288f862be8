// Package supervise keeps the programs of one place running, as systemd would with
// Restart=always and KillMode=process: a program that ends is started again after a short
// delay, what it has started itself is left alone, and orphans are reaped.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// firstDelay is systemd's RestartSec; a program that keeps failing is retried ever more slowly.
	firstDelay = 100 * time.Millisecond
	lastDelay  = 5 * time.Second
	// settled is how long a program must have run for its next failure to count as a first one.
	settled = 10 * time.Second
)

// Component is a program to keep running.
type Component struct {
	Name string `json:"name"`
	// Args starts with the program's path as seen in the place.
	Args []string `json:"args"`
	Env  []string `json:"env"`
	// Log is the file, on the machine, that output is appended to.
	Log string `json:"log"`
}

// State of a component.
type State string

const (
	Running State = "running"
	Waiting State = "waiting" // ended, about to be started again
	Down    State = "down"    // stopped, or killed to stay down
)

// Status is what there is to know about a component.
type Status struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	PID      int       `json:"pid,omitempty"`
	Since    time.Time `json:"since"`
	Restarts int       `json:"restarts"`
	LastExit string    `json:"lastExit,omitempty"`
}

// Supervisor keeps components running. Make it with New.
type Supervisor struct {
	pids  string // directory of files that name running processes, for a successor
	spawn chan<- spawnRequest
	log   *slog.Logger

	mu       sync.Mutex
	changed  *sync.Cond // a process was started or ended, or the supervisor closed
	programs []*program
	closed   bool
}

type program struct {
	Component
	state    State
	wanted   bool
	pid      int
	started  time.Time
	since    time.Time
	restarts int
	lastExit string
	delay    time.Duration
	timer    *time.Timer
}

type spawnRequest struct {
	argv []string
	attr *syscall.ProcAttr
	done chan<- spawnResult
}

type spawnResult struct {
	pid int
	err error
}

// New makes a supervisor. enter is called once on a thread of its own, which it may move to
// other namespaces: all programs are started from that thread. pids is a directory.
func New(pids string, enter func() error, log *slog.Logger) (*Supervisor, error) {
	if err := os.MkdirAll(pids, 0o755); err != nil {
		return nil, fmt.Errorf("making the directory of process numbers: %w", err)
	}
	// Orphans of the place (shims of a containerd that ended) come here instead of to the machine's init.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("becoming the reaper of orphans: %w", err)
	}
	requests := make(chan spawnRequest)
	entered := make(chan error)
	go func() {
		entered <- enter()
		for r := range requests {
			pid, err := syscall.ForkExec(r.argv[0], r.argv, r.attr)
			r.done <- spawnResult{pid, err}
		}
	}()
	if err := <-entered; err != nil {
		return nil, err
	}
	s := &Supervisor{pids: pids, spawn: requests, log: log}
	s.changed = sync.NewCond(&s.mu)
	go s.reap()
	return s, nil
}

// Start starts the component and keeps it running from now on. One that runs already is
// left alone; the description counts from its next start.
func (s *Supervisor) Start(c Component) error {
	if len(c.Args) == 0 || c.Name == "" {
		return errors.New("a component needs a name and a program")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.find(c.Name)
	if p == nil {
		s.endPredecessor(c.Name)
		p = &program{state: Down, since: time.Now()}
		s.programs = append(s.programs, p)
	}
	p.Component = c
	return s.startLocked(p)
}

// StartKnown starts a component that has been started before.
func (s *Supervisor) StartKnown(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.get(name)
	if err != nil {
		return err
	}
	return s.startLocked(p)
}

func (s *Supervisor) startLocked(p *program) error {
	p.wanted = true
	p.delay = 0
	if p.state == Running {
		return nil
	}
	if p.timer != nil {
		p.timer.Stop()
	}
	return s.launch(p)
}

// launch starts the program's process. The lock is held all the time, so that the reaper
// cannot see the process end before it is known.
func (s *Supervisor) launch(p *program) error {
	fail := func(err error) error {
		err = fmt.Errorf("starting %s: %w", p.Name, err)
		p.lastExit = err.Error()
		s.retryLater(p)
		return err
	}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fail(err)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	done := make(chan spawnResult, 1)
	s.spawn <- spawnRequest{p.Args, &syscall.ProcAttr{
		Dir: "/", Env: p.Env, Files: []uintptr{null.Fd(), log.Fd(), log.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	}, done}
	result := <-done
	if result.err != nil {
		return fail(result.err)
	}
	now := time.Now()
	p.state, p.pid, p.started, p.since = Running, result.pid, now, now
	s.writePID(p.Name, result.pid)
	s.log.Info("component started", "component", p.Name, "pid", result.pid)
	s.changed.Broadcast()
	return nil
}

// retryLater plans the next start of a program that is wanted and does not run.
func (s *Supervisor) retryLater(p *program) {
	p.state, p.pid, p.since = Waiting, 0, time.Now()
	p.delay = min(max(2*p.delay, firstDelay), lastDelay)
	p.timer = time.AfterFunc(p.delay, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if p.state != Waiting || !p.wanted || s.closed {
			return
		}
		p.restarts++
		if err := s.launch(p); err != nil {
			s.log.Error("component does not start", "component", p.Name, "error", err)
		}
	})
}

// reap collects every process that ends: programs and orphans.
func (s *Supervisor) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		s.mu.Lock()
		if err != nil { // no children at all
			for !s.closed && !s.anyRunning() {
				s.changed.Wait()
			}
			// One that was started just before the end is still to be collected.
			over := s.closed && !s.anyRunning()
			s.mu.Unlock()
			if over {
				return
			}
			continue
		}
		if p := s.byPID(pid); p != nil && (status.Exited() || status.Signaled()) {
			s.ended(p, status)
		}
		s.mu.Unlock()
	}
}

func (s *Supervisor) ended(p *program, status unix.WaitStatus) {
	p.lastExit = describe(status)
	_ = os.Remove(s.pidFile(p.Name)) // a left-over file is recognised by the start time in it
	s.log.Info("component ended", "component", p.Name, "pid", p.pid, "exit", p.lastExit)
	if time.Since(p.started) >= settled {
		p.delay = 0
	}
	if p.wanted && !s.closed {
		s.retryLater(p)
	} else {
		p.state, p.pid, p.since = Down, 0, time.Now()
	}
	s.changed.Broadcast()
}

// Kill ends the component by SIGKILL. It is started again like after any other end, unless down is set.
func (s *Supervisor) Kill(name string, down bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.get(name)
	if err != nil {
		return err
	}
	if p.state == Down {
		return fmt.Errorf("%s is down already", name)
	}
	if down {
		p.wanted = false
	}
	if p.state == Waiting {
		if down {
			p.timer.Stop()
			p.state, p.since = Down, time.Now()
			return nil
		}
		return fmt.Errorf("%s does not run at the moment (%s); it is about to be started again", name, p.lastExit)
	}
	pid := p.pid
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing %s: %w", name, err)
	}
	for p.pid == pid {
		s.changed.Wait()
	}
	return nil
}

// Stop ends the component by SIGTERM, after the grace time by SIGKILL; it stays down.
func (s *Supervisor) Stop(name string, grace time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.get(name)
	if err != nil {
		return err
	}
	p.wanted = false
	if p.state == Waiting {
		p.timer.Stop()
		p.state, p.since = Down, time.Now()
	}
	if p.state == Down {
		return nil
	}
	pid := p.pid
	if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stopping %s: %w", name, err)
	}
	timer := time.AfterFunc(grace, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if p.pid == pid {
			s.log.Warn("component does not stop and is killed", "component", name, "pid", pid, "grace", grace)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
	defer timer.Stop()
	for p.pid == pid {
		s.changed.Wait()
	}
	return nil
}

// Close stops all components at the same time and ends the supervision.
func (s *Supervisor) Close(grace time.Duration) {
	s.mu.Lock()
	s.closed = true
	var names []string
	for _, p := range s.programs {
		names = append(names, p.Name)
	}
	s.mu.Unlock()
	var all sync.WaitGroup
	for _, name := range names {
		all.Go(func() {
			if err := s.Stop(name, grace); err != nil {
				s.log.Error("component does not stop", "component", name, "error", err)
			}
		})
	}
	all.Wait()
	s.mu.Lock()
	s.changed.Broadcast()
	s.mu.Unlock()
}

// Status lists the components in the order of their first start.
func (s *Supervisor) Status() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Status, len(s.programs))
	for i, p := range s.programs {
		out[i] = Status{p.Name, p.state, p.pid, p.since, p.restarts, p.lastExit}
	}
	return out
}

func (s *Supervisor) find(name string) *program {
	for _, p := range s.programs {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func (s *Supervisor) get(name string) (*program, error) {
	if p := s.find(name); p != nil {
		return p, nil
	}
	var names []string
	for _, p := range s.programs {
		names = append(names, p.Name)
	}
	return nil, fmt.Errorf("no component %q here; there are: %s", name, strings.Join(names, ", "))
}

func (s *Supervisor) byPID(pid int) *program {
	for _, p := range s.programs {
		if p.pid == pid {
			return p
		}
	}
	return nil
}

func (s *Supervisor) anyRunning() bool {
	for _, p := range s.programs {
		if p.state == Running {
			return true
		}
	}
	return false
}

func (s *Supervisor) pidFile(name string) string { return filepath.Join(s.pids, name) }

// writePID leaves word for a successor of this supervisor, should it be killed.
func (s *Supervisor) writePID(name string, pid int) {
	start, err := startTime(pid)
	if err == nil {
		err = os.WriteFile(s.pidFile(name), []byte(fmt.Sprintf("%d %s\n", pid, start)), 0o644)
	}
	if err != nil {
		s.log.Warn("process number not recorded", "component", name, "pid", pid, "error", err)
	}
}

// endPredecessor kills the process that a supervisor before this one has left running.
func (s *Supervisor) endPredecessor(name string) {
	text, err := os.ReadFile(s.pidFile(name))
	if err != nil {
		return
	}
	fields := strings.Fields(string(text))
	if len(fields) != 2 {
		return
	}
	pid, err := strconv.Atoi(fields[0])
	if err != nil || pid <= 1 {
		return
	}
	for range 500 {
		// Another process may have got the number since: the start time tells.
		if start, err := startTime(pid); err != nil || start != fields[1] {
			return
		}
		_ = unix.Kill(pid, unix.SIGKILL)
		time.Sleep(10 * time.Millisecond)
	}
	s.log.Warn("process of an earlier supervisor does not end", "component", name, "pid", pid)
}

// startTime returns when the process started, in clock ticks since the machine did. A zombie counts as gone.
func startTime(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The command, in parentheses, may hold anything; fields after it are numbered from 3.
	_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	if fields[0] == "Z" {
		return "", os.ErrProcessDone
	}
	return fields[19], nil
}

func describe(status unix.WaitStatus) string {
	if status.Signaled() {
		return "ended by " + unix.SignalName(status.Signal())
	}
	return "exit code " + strconv.Itoa(status.ExitStatus())
}

// Serve answers requests on the socket of the given name until a request or a signal ends
// it; then all components are stopped.
func (s *Supervisor) Serve(ctx context.Context, socket string) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	return s.serve(ctx, socket)
}
