package criu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/hostns"
)

// No Pod stays frozen when the agent dies in the freeze window (P13). A container
// dies as a whole, so a process of the host's waits for that: the guard. It has
// the reading end of a pipe whose writing end the agent has. When the pipe closes
// without a good-bye it ends what is left of captures and thaws what the journal
// names, within a moment of the agent's death and long before its successor runs.

const (
	// guardReady is what the guard says when it can be relied on.
	guardReady = "ready\n"
	// guardBye is what the agent says before it ends with nothing frozen.
	guardBye = "bye\n"
	// guardPatience bounds how long a guard tries to thaw.
	guardPatience = 2 * time.Minute
)

// GuardName is the name under which stasis-runtime is the guard.
const GuardName = "stasis-guard"

// Guard is the agent's end of a running guard.
type Guard struct {
	pipe    *os.File
	process *hostns.Process
}

// StartGuard starts a guard and returns when it can be relied on. program is
// stasis-runtime under the name GuardName, on the host.
func (e *Engine) StartGuard(ctx context.Context, program string) (*Guard, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	defer read.Close()
	readyRead, readyWrite, err := os.Pipe()
	if err != nil {
		write.Close()
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	defer readyRead.Close()
	process, err := e.host.Start(hostns.Command{Name: program, Args: []string{e.runDir}, Outside: true}, read, readyWrite)
	readyWrite.Close()
	if err != nil {
		write.Close()
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	g := &Guard{pipe: write, process: process}
	stop := context.AfterFunc(ctx, func() { readyRead.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(readyRead).ReadString('\n')
	if line != guardReady {
		return nil, errors.Join(fmt.Errorf("the guard did not come up: it said %q: %w", line, err), g.Close())
	}
	return g, nil
}

// Done is closed when the guard has ended.
func (g *Guard) Done() <-chan struct{} { return g.process.Done() }

// Close takes leave of the guard. Nothing may be frozen then.
func (g *Guard) Close() error {
	_, err := io.WriteString(g.pipe, guardBye)
	if errors.Is(err, unix.EPIPE) {
		err = nil // it has ended
	}
	return errors.Join(err, g.pipe.Close())
}

// Thaw lets go of what another engine's journal below a run directory names. It is called
// again when it fails.
type Thaw func(ctx context.Context, host *hostns.Host, runDir string, log *slog.Logger) error

// RunGuard is the guard's side. in and ready are the ends of the pipes that it was
// started with; runDir is the agent's run directory. It is the guard of others, too.
func RunGuard(ctx context.Context, runDir string, in io.Reader, ready io.WriteCloser, log *slog.Logger, others ...Thaw) error {
	// Who reads the agent's log may be gone with it: that must not end the guard.
	signal.Ignore(unix.SIGPIPE)
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		return err
	}
	defer host.Close()
	e := New(Config{Host: host, RunDir: runDir, Log: log})
	if _, err := io.WriteString(ready, guardReady); err != nil {
		return err
	}
	if err := ready.Close(); err != nil {
		return err
	}
	said, err := io.ReadAll(io.LimitReader(in, 64))
	if err != nil {
		return err
	}
	if string(said) == guardBye {
		return nil
	}
	log.Warn("the agent is gone, thawing what it left frozen")
	errs := make([]error, len(others))
	var wg sync.WaitGroup
	for i, thaw := range others {
		wg.Go(func() {
			errs[i] = untilDone(ctx, log, func(ctx context.Context) error { return thaw(ctx, host, runDir, log) })
		})
	}
	entries, err := e.journal.entries()
	if err == nil {
		err = e.thawAll(ctx, entries)
	}
	wg.Wait()
	// The helpers see for themselves that the agent is gone; this is for those that were
	// killed with it.
	return errors.Join(append(errs, err, e.cleanCOW())...)
}

// thawAll thaws what an earlier agent left.
func (e *Engine) thawAll(ctx context.Context, entries []frozen) error {
	return untilDone(ctx, e.log, func(ctx context.Context) error {
		var errs []error
		for _, entry := range entries {
			errs = append(errs, e.thawLeftover(ctx, entry))
		}
		return errors.Join(errs...)
	})
}

// untilDone tries again what does not work at first: the container runtime may be being
// restarted.
func untilDone(ctx context.Context, log *slog.Logger, thaw func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, guardPatience)
	defer cancel()
	for {
		err := thaw(ctx)
		if err == nil {
			return nil
		}
		log.Error("a Pod could not be thawed, trying again", "err", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}
