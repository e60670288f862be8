// Package pausing pauses sandboxes of gVisor and sees to it that none stays so (P13). It is
// apart from the engine, because the guard is made of it too, which is small.
package pausing

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/hostns"
)

// pauseEnv marks every runsc that pauses or saves a sandbox, with the name of the pause, so
// that it is waited for when the agent that started it is gone.
const pauseEnv = "STASIS_GVISOR_PAUSE"

// runscPatience bounds one attempt to resume a sandbox, patience all of them. They do not
// end with the operation's context: to resume is what makes up for its end.
const (
	runscPatience = 30 * time.Second
	patience      = 10 * time.Minute
)

// ErrNoSandbox says that runsc does not know the sandbox (any more).
var ErrNoSandbox = errors.New("no such sandbox")

// Runsc is a runsc as the shim of a sandbox calls it.
type Runsc struct {
	Binary string `json:"binary"`
	Root   string `json:"root"`
}

// Paused is what it takes to undo a pause: one journal entry, durable before runsc is
// asked to pause, removed when the sandbox runs again.
type Paused struct {
	SandboxID string `json:"sandboxID"`
	// Pause is a random name for this one: a sandbox is paused many times.
	Pause string `json:"pause"`
	Runsc Runsc  `json:"runsc"`
}

// Pauses are those of one node.
type Pauses struct {
	host    *hostns.Host
	journal journal
	log     *slog.Logger
}

// New keeps the journal below a run directory on memory, such as /run/stasis, of the host.
func New(host *hostns.Host, runDir string, log *slog.Logger) *Pauses {
	return &Pauses{host: host, journal: journal{host: host, dir: filepath.Join(runDir, "paused")}, log: log}
}

// Begin notes that a sandbox is about to be paused. From here on it is let go by LetGo, or
// by whoever comes after the end of this process.
func (e *Pauses) Begin(sandboxID string, runsc Runsc) (Paused, error) {
	p := Paused{SandboxID: sandboxID, Pause: rand.Text(), Runsc: runsc}
	return p, e.journal.write(p)
}

// Run calls runsc outside of the agent's cgroups, whose end it survives: runsc is not to
// be killed between what it has the sandbox do and what it writes down of that.
func (e *Pauses) Run(ctx context.Context, p Paused, args ...string) (hostns.Output, error) {
	out, err := e.host.Run(ctx, hostns.Command{
		Name: p.Runsc.Binary, Args: append([]string{"--root", p.Runsc.Root}, args...),
		Env: []string{pauseEnv + "=" + p.Pause}, Outside: true,
	})
	if err != nil {
		return out, fmt.Errorf("%s: %w", args[0], err)
	}
	return out, nil
}

// State asks runsc for the status of a container: "running", "paused", …. It waits for a
// pause that is under way.
func (e *Pauses) State(ctx context.Context, r Runsc, id string) (string, error) {
	out, err := e.host.Run(ctx, hostns.Command{Name: r.Binary, Args: []string{"--root", r.Root, "state", id}})
	if err != nil {
		if strings.Contains(out.Stderr, "does not exist") {
			return "", ErrNoSandbox
		}
		return "", fmt.Errorf("state: %w", err)
	}
	var s struct{ Status string }
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil {
		return "", fmt.Errorf("read the state of sandbox %s: %w", id, err)
	}
	return s.Status, nil
}

// resume lets a paused sandbox run, unless it is gone or runs, and closes its journal
// entry. One whose pause is still under way is waited for.
func (e *Pauses) resume(ctx context.Context, p Paused) error {
	if err := awaitMarked(ctx, p.Pause); err != nil {
		return err
	}
	status, err := e.State(ctx, p.Runsc, p.SandboxID)
	if err == nil && status == "paused" {
		_, err = e.Run(ctx, p, "resume", p.SandboxID)
	}
	if err != nil && !errors.Is(err, ErrNoSandbox) {
		return fmt.Errorf("resume sandbox %s: %w", p.SandboxID, err)
	}
	return e.journal.remove(p.SandboxID)
}

// LetGo lets a sandbox run again. It does not give up for long: nobody else tries.
func (e *Pauses) LetGo(ctx context.Context, p Paused) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, runscPatience)
			defer cancel()
			return e.resume(ctx, p)
		}()
		if err == nil {
			return nil
		}
		e.log.ErrorContext(ctx, "a paused sandbox could not be resumed, trying again", "sandbox", p.SandboxID, "err", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}

// ThawLeftovers resumes what the journal still names.
func (e *Pauses) ThawLeftovers(ctx context.Context) error {
	if err := e.journal.removeTemporary(); err != nil {
		e.log.WarnContext(ctx, "what a killed agent had half written could not be removed", "error", err)
	}
	entries, err := e.journal.entries()
	errs := []error{err}
	for _, p := range entries {
		errs = append(errs, e.resumeLeftover(ctx, p))
	}
	return errors.Join(errs...)
}

// resumeLeftover undoes a pause that an earlier agent journalled. Agent and guard may both
// try: only one does at a time, and never what is not that pause.
func (e *Pauses) resumeLeftover(ctx context.Context, p Paused) error {
	unlock, err := e.journal.lock()
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := e.journal.entries()
	if err != nil {
		return err
	}
	for _, now := range entries {
		if now.SandboxID == p.SandboxID && now.Pause == p.Pause {
			e.log.WarnContext(ctx, "resuming a sandbox that an earlier run left paused", "sandbox", p.SandboxID)
			return e.resume(ctx, p)
		}
	}
	return nil // undone meanwhile
}

// awaitMarked waits until no process is left that is marked with a pause. What the sandbox
// saves it saves to the end, whoever asked for it.
func awaitMarked(ctx context.Context, pause string) error {
	mark := []byte(pauseEnv + "=" + pause)
	for {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		var alive []string
		for _, entry := range entries {
			if _, err := strconv.Atoi(entry.Name()); err != nil {
				continue
			}
			env, err := os.ReadFile("/proc/" + entry.Name() + "/environ")
			if err != nil {
				continue // it has ended, or is a kernel thread
			}
			for setting := range bytes.SplitSeq(env, []byte{0}) {
				if bytes.Equal(setting, mark) {
					alive = append(alive, entry.Name())
				}
			}
		}
		if len(alive) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("runsc (process %s) is still at work: %w", strings.Join(alive, ", "), context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
