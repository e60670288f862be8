package gvisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/gvisor/pausing"
	"podstasis.dev/stasis/internal/hostns"
)

// A sandbox is saved with all that runs in it, also with what an exec session or an exec
// probe has started. In a restored Pod nobody is at the other end of that, and it would run
// on there: it is waited for, and a checkpoint is refused that it outlasts (P16, P18).

const (
	// strayPatience is how long such processes are waited for. An exec probe is over within
	// its timeout, 1 s by default; of several, none may run when it is looked, which takes
	// a while itself.
	strayPatience = 20 * time.Second
	strayInterval = 50 * time.Millisecond
	maxTold       = 3 // in an error
)

// errStray says that one began in the moment before the sandbox was paused.
var errStray = fmt.Errorf("%w: something was started from outside while the sandbox was being paused, as by an exec session", engine.ErrUnsupported)

// process is one as runsc lists it.
type process struct {
	PID  int
	PPID int // 0: none of the sandbox's has started it
	Cmd  string
}

// strayAmong are those of a container's processes that somebody from outside has started
// besides the first.
func strayAmong(all []process) []process {
	roots := slices.DeleteFunc(slices.Clone(all), func(p process) bool { return p.PPID != 0 })
	slices.SortFunc(roots, func(a, b process) int { return cmp.Compare(a.PID, b.PID) })
	return roots[min(1, len(roots)):]
}

// strays names them, of all containers.
func (e *Engine) strays(ctx context.Context, r runsc, containers []engine.Container) ([]string, error) {
	found, errs := make([][]string, len(containers)), make([]error, len(containers))
	var all sync.WaitGroup
	for i, c := range containers {
		all.Go(func() {
			processes, err := e.processes(ctx, r.Runsc, c.ID)
			if err != nil {
				errs[i] = fmt.Errorf("list the processes of container %s: %w", c.Name, err)
			}
			for _, p := range strayAmong(processes) {
				found[i] = append(found[i], fmt.Sprintf("container %s, process %d (%s)", c.Name, p.PID, p.Cmd))
			}
		})
	}
	all.Wait()
	return slices.Concat(found...), errors.Join(errs...)
}

func (e *Engine) processes(ctx context.Context, r pausing.Runsc, id string) ([]process, error) {
	out, err := e.Host.Run(ctx, hostns.Command{Name: r.Binary, Args: []string{"--root", r.Root, "ps", "--format", "table", id}})
	if err != nil {
		return nil, err
	}
	return parseProcesses(out.Stdout)
}

// parseProcesses reads the table that runsc ps prints: its JSON has no more than the PIDs.
func parseProcesses(table string) (all []process, err error) {
	lines := strings.Split(strings.TrimSpace(table), "\n")
	titles := strings.Fields(lines[0])
	pid, ppid, cmd := slices.Index(titles, "PID"), slices.Index(titles, "PPID"), slices.Index(titles, "CMD")
	if pid < 0 || ppid < 0 || cmd != len(titles)-1 {
		return nil, fmt.Errorf("runsc ps printed a table of %.100q", lines[0])
	}
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		if len(fields) <= cmd {
			return nil, fmt.Errorf("runsc ps printed the line %.100q", line)
		}
		p := process{Cmd: strings.Join(fields[cmd:], " ")}
		for _, number := range []struct {
			column int
			into   *int
		}{{pid, &p.PID}, {ppid, &p.PPID}} {
			if *number.into, err = strconv.Atoi(fields[number.column]); err != nil {
				return nil, fmt.Errorf("runsc ps printed the line %.100q", line)
			}
		}
		all = append(all, p)
	}
	return all, nil
}

// awaitStrays waits until nothing runs that is not a container's own.
func (e *Engine) awaitStrays(ctx context.Context, r runsc, containers []engine.Container, deadline time.Time) error {
	for {
		found, err := e.strays(ctx, r, containers)
		if err != nil || len(found) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: %s", engine.ErrUnsupported, strings.Join(toldOf(found[:min(maxTold, len(found))]), "; "))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(strayInterval):
		}
	}
}

func toldOf(strays []string) (problems []string) {
	for _, s := range strays {
		problems = append(problems, s+" was started from outside, as by an exec session, and would run on in a restored Pod: end it first")
	}
	return problems
}
