package restoring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

// To check much memory takes about as long as to bring it. So it is checked beside that,
// from the moment that the sandbox is admitted; a container that has been restored stands
// still, and is not there yet, until all memory of all containers is known to be what was
// written. An agent that is started anew meanwhile begins anew with it.

// check is a verification that is under way, or has ended.
type check struct {
	done chan struct{}
	err  error // once it is done
	end  context.CancelFunc

	mu       sync.Mutex
	restored chan struct{} // closed when CRIU has done its part; nil if it is not at work
}

// restoring says whether CRIU is at work. It has a processor to itself then: it works on
// one, and is counted to a container that may have asked for none.
func (c *check) restoring(yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case yes && c.restored == nil:
		c.restored = make(chan struct{})
	case !yes && c.restored != nil:
		close(c.restored)
		c.restored = nil
	}
}

// spare waits until CRIU needs no processor.
func (c *check) spare(ctx context.Context) {
	c.mu.Lock()
	restored := c.restored
	c.mu.Unlock()
	if restored == nil {
		return
	}
	select {
	case <-restored:
	case <-ctx.Done():
	}
}

// check starts that of a sandbox's memory, unless it has been.
func (s *Sessions) check(rec record) *check {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := rec.Sandbox.ID
	if c := s.checks[id]; c != nil {
		return c
	}
	ctx, cancel := context.WithCancel(context.Background()) // ends with the sandbox, or with this process
	c := &check{done: make(chan struct{}), end: cancel}
	s.checks[id] = c
	go func() {
		defer cancel()
		defer close(c.done)
		if c.err = pages.VerifyBeside(ctx, rec.Dir, rec.Digest, c.spare); c.err != nil {
			return
		}
		if _, err := s.update(id, func(rec *record) { rec.Unchecked = false }); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.Log.Warn("that a checkpoint's memory has been checked could not be kept, and it may be once more", "sandbox", id, "error", err)
		}
	}()
	return c
}

// settle waits for a check, and tells if it found something. The next who asks has it
// checked anew.
func (s *Sessions) settle(ctx context.Context, in nodeapi.Checked, c *check) error {
	select {
	case <-c.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if c.err == nil {
		return nil
	}
	s.mu.Lock()
	if s.checks[in.Sandbox.ID] == c {
		delete(s.checks, in.Sandbox.ID)
	}
	s.mu.Unlock()
	refusal := refusalOf(ofData(c.err))
	s.Observer.Failed(ctx, in.Sandbox, in.Container, refusal)
	return errors.Join(refusal, s.dropImages(in.Sandbox.ID, in.Container))
}

// unchecked says whether a container has to wait for the check when it has been restored.
// Where that has ended, or whoever restores cannot wait, it does so itself.
func (s *Sessions) unchecked(ctx context.Context, rec record, in nodeapi.CreateContainer) (bool, error) {
	if !rec.Unchecked {
		return false, nil
	}
	c := s.check(rec)
	if in.AsksChecked {
		select {
		case <-c.done:
		default:
			c.restoring(true)
			return true, nil
		}
	}
	return false, s.settle(ctx, nodeapi.Checked{Sandbox: in.Sandbox, Container: in.Container}, c)
}

// checked answers nodeapi.Checked.
func (s *Sessions) checked(ctx context.Context, in nodeapi.Checked) error {
	s.mu.Lock()
	rec, err := s.read(in.Sandbox.ID)
	s.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return &nodeapi.Error{Reason: reasonMissing, Message: "nothing is being restored in sandbox " + in.Sandbox.ID}
	} else if err != nil || !rec.Unchecked {
		return err
	}
	c := s.check(rec)
	c.restoring(false)
	return s.settle(ctx, in, c)
}

// ofData gives an error over a checkpoint's data its reason.
func ofData(err error) error {
	switch {
	case errors.Is(err, pages.ErrNotLazy):
		return &nodeapi.Error{Reason: reasonFailed, Message: fmt.Sprintf("annotation %s: %v", annotationMemory, err)}
	case errors.Is(err, checkpoint.ErrMissing):
		return &nodeapi.Error{Reason: reasonMissing, Message: err.Error()}
	case errors.Is(err, checkpoint.ErrCorrupt):
		return &nodeapi.Error{Reason: reasonCorrupt, Message: err.Error()}
	}
	return err
}
