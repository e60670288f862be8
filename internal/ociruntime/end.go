package ociruntime

import (
	"context"
	"fmt"
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
			logError(c.log, fmt.Errorf("before the end of restored container %s: %w", m.Container, err))
		}
	case <-time.After(lookPatience):
	}
}

// kill is the real runtime's.
func (c call) kill(ctx context.Context) error {
	if m, err := c.marked(c.id); err == nil {
		c.lastLook(ctx, m)
	}
	return c.stepAside()
}

// delete lets the agent forget a sandbox that is gone.
func (c call) delete(ctx context.Context) error {
	m, err := c.marked(c.id)
	if err != nil {
		return err
	}
	if m == nil {
		// It may be a container whose restore was interrupted: that must not go on while
		// the real runtime removes it.
		if err := criu.EndRestores(c.id); err != nil {
			return err
		}
		return c.stepAside()
	}
	if m.Container != "" {
		c.lastLook(ctx, m)
		return c.stepAside()
	}
	if err := c.passOn(ctx); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Stage: nodeapi.StageDeleted})
	return nil
}
