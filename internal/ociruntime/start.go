package ociruntime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"podstasis.dev/stasis/internal/nodeapi"
)

// A restored container is let go once, and it is known of each whether it has been,
// though this process may be killed at any moment. Before the real runtime is called
// to resume it, the container's progress says "starting"; afterwards, "started".
// Where it is left at "starting", whoever comes next asks the real runtime whether the
// container stands still: settle.

// start lets a restored container go, or all that go together when it is the last
// of them; other containers are the real runtime's.
func (c call) start(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if !m.waiting() {
		return c.stepAside()
	}
	ids, err := c.arrive(*m)
	if err != nil {
		return err
	}
	// An agent that does not answer must not come between two that go together.
	var gone []nodeapi.Report
	defer func() {
		for _, r := range gone {
			c.report(ctx, r)
		}
	}()
	for _, id := range ids {
		m, err := c.letGo(ctx, id)
		switch {
		case err != nil && id == c.ID:
			return fmt.Errorf("let the restored container go: %w", err)
		case err != nil:
			// The other one's affair: it may have been killed while it waited.
			logError(c.Log, fmt.Errorf("let the restored container %s go: %w", id, err))
		case m != nil:
			gone = append(gone, nodeapi.Report{Sandbox: m.Sandbox, Container: m.Container, Stage: nodeapi.StageStarted})
		}
	}
	return nil
}

// arrive notes that a container was asked to start, and returns the IDs of those
// that are to be let go now: none while others are waited for.
func (c call) arrive(m marker) (ids []string, err error) {
	// Starts of one sandbox's containers must not miss each other.
	lock, err := c.lock(m.Sandbox.ID)
	if err != nil {
		return nil, fmt.Errorf("find the sandbox of the restored container: %w", err)
	}
	defer lock.Close()
	sandbox, err := c.marked(m.Sandbox.ID)
	if err != nil {
		return nil, err
	}
	if sandbox == nil || !slices.Contains(sandbox.Together, m.Container) {
		return []string{c.ID}, nil
	}
	if sandbox.Arrived == nil {
		sandbox.Arrived = map[string]string{}
	}
	sandbox.Arrived[m.Container] = c.ID
	if err := c.mark(m.Sandbox.ID, *sandbox); err != nil {
		return nil, err
	}
	for _, name := range sandbox.Together {
		id, arrived := sandbox.Arrived[name]
		if !arrived {
			return nil, nil
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// letGo thaws a restored container, unless it has been before or is not there any
// more; then it returns nil.
func (c call) letGo(ctx context.Context, id string) (*marker, error) {
	m, err := c.marked(id)
	if err != nil || !m.waiting() {
		return nil, err
	}
	lock, err := c.lock(id)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if m, err = c.marked(id); err != nil || !m.waiting() {
		return nil, err
	}
	stage, err := c.settle(ctx, id, *m)
	if err != nil {
		return nil, err
	}
	if stage != nodeapi.StageStarted {
		if err := c.resume(ctx, lock, id, *m); err != nil {
			return nil, err
		}
	}
	m.Started = true
	return m, c.mark(id, *m)
}

// resume calls the real runtime, which holds the lock too: whoever wants to know
// what became of this waits for its end, also when this process is gone.
func (c call) resume(ctx context.Context, lock *os.File, id string, m marker) error {
	if err := c.note(id, m, nodeapi.StageStarting); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, c.Runtime, slices.Concat(c.Global, []string{"resume", id})...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, []*os.File{lock}
	err := cmd.Run()
	if err == nil {
		return c.note(id, m, nodeapi.StageStarted)
	}
	err = fmt.Errorf("%s resume: %w", filepath.Base(c.Runtime), err)
	if cmd.ProcessState == nil || cmd.ProcessState.Exited() { // it did not, and says so; if it was killed it may have
		err = errors.Join(err, c.note(id, m, nodeapi.StageCreated))
	}
	return err
}

// settle says how far a container has come, and finds it out where a start was
// interrupted. The caller holds its lock.
func (c call) settle(ctx context.Context, id string, m marker) (nodeapi.ReportStage, error) {
	p, err := nodeapi.ReadProgress(m.WorkDir)
	if err != nil {
		return "", err
	}
	if p.ContainerID != id {
		return "", errors.New("another container has been restored in its place")
	}
	if p.Stage != nodeapi.StageStarting {
		return p.Stage, nil
	}
	out, err := exec.CommandContext(ctx, c.Runtime, slices.Concat(c.Global, []string{"state", id})...).Output()
	if err != nil {
		return "", fmt.Errorf("find out whether the container was let go: %s state: %w", filepath.Base(c.Runtime), err)
	}
	var state struct{ Status string }
	if err := json.Unmarshal(out, &state); err != nil {
		return "", fmt.Errorf("find out whether the container was let go: %w", err)
	}
	switch state.Status {
	case "paused":
		p.Stage = nodeapi.StageCreated
	case "running", "stopped": // what stands still does not end by itself
		p.Stage = nodeapi.StageStarted
	default:
		return "", fmt.Errorf("find out whether the container was let go: it is %q", state.Status)
	}
	return p.Stage, nodeapi.WriteProgress(m.WorkDir, p)
}

// look settles whether a container has been let go (nodeapi.LookCommand).
func (c call) look(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if !m.waiting() {
		return nil
	}
	if m.Runsc != nil {
		return c.lookRunsc(ctx, *m)
	}
	lock, err := c.lock(c.ID)
	if err != nil {
		return err
	}
	defer lock.Close()
	_, err = c.settle(ctx, c.ID, *m)
	return err
}
