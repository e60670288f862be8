package agent

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Calls knows the CheckpointPod calls that the agent's CRI server is at work on.
// A client's call is over as soon as its context is; the server then still has a
// Pod to thaw and files to remove, and both must be done before the directory is
// reused or the agent ends.
type Calls struct {
	mu     sync.Mutex
	active map[string]*call // by output path
}

type call struct {
	done chan struct{}
	err  error // what the server answered; read after done
}

// Intercept is the server's interceptor.
func (c *Calls) Intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	checkpointing, ok := req.(*runtimeapi.CheckpointPodRequest)
	if !ok {
		return handler(ctx, req)
	}
	this := &call{done: make(chan struct{})}
	c.mu.Lock()
	if c.active == nil {
		c.active = map[string]*call{}
	}
	if c.active[checkpointing.OutputPath] == nil {
		c.active[checkpointing.OutputPath] = this
	}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		if c.active[checkpointing.OutputPath] == this {
			delete(c.active, checkpointing.OutputPath)
		}
		c.mu.Unlock()
		close(this.done)
	}()
	resp, err := handler(ctx, req)
	this.err = err
	return resp, err
}

// Wait waits until the server no longer works on a directory, and returns what
// it answered if it was still at work.
func (c *Calls) Wait(ctx context.Context, path string) (answer error, err error) {
	c.mu.Lock()
	current := c.active[path]
	c.mu.Unlock()
	if current == nil {
		return nil, nil
	}
	select {
	case <-current.done:
		return current.err, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
