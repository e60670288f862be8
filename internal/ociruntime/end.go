package ociruntime

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/nodeapi"
)

// lookPatience bounds how long a container's end waits for its start.
const lookPatience = 5 * time.Second

// lastLook settles whether a container has been let go before nothing can tell any
// more: to kill it thaws it. It holds nothing up for long.
func (c call) lastLook(ctx context.Context, m *marker) {
	if !m.waiting() {
		return
	}
	if p, err := nodeapi.ReadProgress(m.WorkDir); err == nil && p.Stage != nodeapi.StageStarting {
		return
	}
	looked := make(chan error, 1)
	go func() { looked <- c.look(ctx) }()
	select {
	case err := <-looked:
		if err != nil {
			logError(c.Log, fmt.Errorf("before the end of restored container %s: %w", m.Container, err))
		}
	case <-time.After(lookPatience):
	}
}

// kill is the real runtime's.
func (c call) kill(ctx context.Context) error {
	if m, err := c.marked(c.ID); err == nil {
		c.lastLook(ctx, m)
	}
	return c.stepAside()
}

// delete lets the agent forget a sandbox that is gone.
func (c call) delete(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if m == nil {
		// It may be a container whose restore was interrupted: that must not go on while
		// the real runtime removes it.
		if err := criu.EndRestores(filepath.Dir(c.Socket), c.ID); err != nil {
			return err
		}
		return c.stepAside()
	}
	if m.Container != "" {
		c.lastLook(ctx, m)
		return c.stepAside()
	}
	if err := c.endAbandoned(ctx, c.ID, ""); err != nil {
		return err
	}
	if err := c.passOn(ctx); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Stage: nodeapi.StageDeleted})
	return nil
}

// endAbandoned ends restored containers of a sandbox, of that name or all, that wait for
// a start which will not come: the container runtime gave them up, because the kubelet
// was killed when it had asked for them, and has forgotten that they are there
// (containerd: "failed to get task pid: context canceled"). They would stand still for
// ever. The shim sees them end, as any container.
func (c call) endAbandoned(ctx context.Context, sandboxID, container string) error {
	entries, err := os.ReadDir(c.Root)
	if err != nil {
		return fmt.Errorf("look for containers that were given up: %w", err)
	}
	for _, e := range entries {
		m, err := c.marked(e.Name())
		if err != nil || !m.waiting() || e.Name() == c.ID || m.Sandbox.ID != sandboxID || container != "" && m.Container != container {
			continue // what cannot be read is of another container
		}
		if err := c.passOnAs(ctx, "delete", "--force", e.Name()); err != nil {
			return fmt.Errorf("end container %s, an earlier attempt at %s that was given up: %w", e.Name(), m.Container, err)
		}
	}
	return nil
}
