package restoring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
)

// A report of the OCI runtime is lost when the agent is away, and nobody repeats it.
// So reports only make things fast, and this file brings the records in step with the
// node: what containers have come to is in their nodeapi.Progress, which sandboxes are
// gone says the container runtime. A question that fails decides nothing.

const (
	// interval is how often Run looks without having been told of anything.
	interval = 30 * time.Second
	// makingPatience is how long the container runtime may take to make a sandbox
	// that it does not list yet. The kubelet gives it four minutes.
	makingPatience = 10 * time.Minute
)

// Node is asked for what is known on the node alone.
type Node interface {
	// SandboxesUp returns the IDs of all sandboxes that the container runtime has
	// made and that have not ended. A sandbox that is none of them any more never is
	// again.
	SandboxesUp(ctx context.Context) (map[string]bool, error)
	// LookAtStart has the OCI runtime find out whether a container runs whose start
	// was interrupted, and keep it in the container's nodeapi.Progress. It waits for
	// a start that is under way.
	LookAtStart(ctx context.Context, root, containerID string) error
	// StartFailed says whether the container runtime has a container down as one
	// that it could not start.
	StartFailed(ctx context.Context, root, containerID string) (bool, error)
	// Kill kills a container.
	Kill(ctx context.Context, root, containerID string) error
}

// Run keeps the records in step with the node until ctx ends.
func (s *Sessions) Run(ctx context.Context) {
	for {
		if err := s.Reconcile(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("what restores have come to is not all known or told yet, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-time.After(interval):
		}
	}
}

// Wake makes Run look at once.
func (s *Sessions) Wake() {
	select {
	case s.wake <- struct{}{}:
	default: // it will
	}
}

// Reconcile brings the records in step with the node, tells the observer of restores
// that are complete, and forgets sandboxes that are gone. It is not to be called
// beside Run: whatever the observer is told, it is told by one.
func (s *Sessions) Reconcile(ctx context.Context) error {
	// The records are read first: of a sandbox that is made after the container
	// runtime was asked its answer says nothing.
	records, err := s.records()
	if err != nil || len(records) == 0 {
		return err
	}
	up, err := s.Node.SandboxesUp(ctx)
	errs := []error{err}
	for _, rec := range records {
		if err := s.reconcile(ctx, rec, up); err != nil {
			errs = append(errs, fmt.Errorf("sandbox %s of Pod %s/%s: %w", rec.Sandbox.ID, rec.Sandbox.Namespace, rec.Sandbox.Name, err))
		}
	}
	return errors.Join(errs...)
}

// reconcile looks at one sandbox; up is nil where the container runtime did not answer.
func (s *Sessions) reconcile(ctx context.Context, before record, up map[string]bool) error {
	id := before.Sandbox.ID
	rec, unclear, err := s.catchUp(ctx, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // forgotten meanwhile
	} else if err != nil {
		return err
	}
	if err := s.dropRestored(id); err != nil {
		return err
	}
	if up[id] && !rec.Seen {
		if rec, err = s.update(id, func(rec *record) { rec.Seen = true }); err != nil {
			return ifKept(err)
		}
	}
	if rec.whole() && !rec.Told {
		s.endTurn(id)
		if err := s.Observer.Remember(rec.Sandbox); err != nil {
			return err
		}
		if err := s.Observer.Succeeded(ctx, rec.Sandbox, s.restored(rec)); err != nil {
			return err
		}
		if rec, err = s.update(id, func(rec *record) { rec.Told = true }); err != nil {
			return ifKept(err)
		}
	}
	rec, memoryErr := s.reconcileMemory(ctx, rec)
	if rec.Gone || up != nil && !up[id] && (before.Seen || s.Now().Sub(rec.Since) > makingPatience) {
		s.endTurn(id)
		return s.forget(id)
	}
	errs := []error{memoryErr}
	for container, why := range unclear {
		errs = append(errs, fmt.Errorf("container %s: %w", container, why))
	}
	return errors.Join(errs...)
}

// restored are the IDs of the containers that were restored, by name. One whose
// progress cannot be read is left out.
func (s *Sessions) restored(rec record) map[string]string {
	ids := map[string]string{}
	for _, name := range rec.Containers {
		p, err := nodeapi.ReadProgress(filepath.Join(s.workDirs(rec.Sandbox.ID), name))
		if err != nil {
			s.Log.Warn("which container was restored cannot be read", "sandbox", rec.Sandbox.ID, "container", name, "error", err)
		} else if p.ContainerID != "" {
			ids[name] = p.ContainerID
		}
	}
	return ids
}

// ifKept is the error of a change to a record, which may have been forgotten.
func ifKept(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// catchUp brings a sandbox's record in step with its containers' progress, and says
// of which it stays unclear whether they have been let go.
func (s *Sessions) catchUp(ctx context.Context, sandboxID string) (rec record, unclear map[string]error, err error) {
	s.mu.Lock()
	rec, err = s.read(sandboxID)
	s.mu.Unlock()
	if err != nil || rec.Ordinary || rec.whole() {
		return rec, nil, err
	}
	entries, err := os.ReadDir(s.workDirs(sandboxID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rec, nil, err
	}
	var created, started []string
	unclear = map[string]error{}
	for _, e := range entries {
		if slices.Contains(rec.Started, e.Name()) {
			continue
		}
		stage, err := s.progress(ctx, filepath.Join(s.workDirs(sandboxID), e.Name()))
		switch {
		case err != nil:
			unclear[e.Name()] = err
			created = append(created, e.Name())
		case stage == nodeapi.StageCreated:
			created = append(created, e.Name())
		case stage == nodeapi.StageStarted:
			created, started = append(created, e.Name()), append(started, e.Name())
		}
	}
	if len(created) == 0 {
		return rec, unclear, nil
	}
	then := rec.Again
	rec, err = s.update(sandboxID, func(rec *record) {
		if rec.Again != then {
			return
		}
		for _, name := range created {
			rec.Created = add(rec.Created, name)
		}
		for _, name := range started {
			rec.Started = add(rec.Started, name)
		}
	})
	if rec.whole() {
		s.Wake()
	}
	return rec, unclear, err
}

// progress says how far a container has come, by what is kept in its work directory.
func (s *Sessions) progress(ctx context.Context, dir string) (nodeapi.ReportStage, error) {
	p, err := nodeapi.ReadProgress(dir)
	if err != nil || p.Stage != nodeapi.StageStarting {
		return p.Stage, err
	}
	looked := s.Node.LookAtStart(ctx, p.Root, p.ContainerID)
	if p, err = nodeapi.ReadProgress(dir); err == nil && p.Stage == nodeapi.StageStarting {
		err = looked
		if err == nil {
			err = errors.New("its start goes on") // another one than was looked at
		}
	}
	return p.Stage, err
}

// rememberEarlier makes sure that a Pod whose restore was completed in an earlier
// sandbox is known to have been, before anybody decides on another.
func (s *Sessions) rememberEarlier(ctx context.Context, sandbox nodeapi.Sandbox) error {
	records, err := s.earlier(sandbox)
	if err != nil {
		return err
	}
	for _, rec := range records {
		rec, unclear, err := s.catchUp(ctx, rec.Sandbox.ID)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return err
		case rec.whole():
			if err := s.Observer.Remember(rec.Sandbox); err != nil {
				return err
			}
			s.Wake()
		case rec.wholeWith(unclear):
			for container, why := range unclear {
				err = errors.Join(err, fmt.Errorf("container %s: %w", container, why))
			}
			return fmt.Errorf("nobody knows whether this Pod was restored in its sandbox %s, where a start was interrupted: restore another Pod: %w", rec.Sandbox.ID, err)
		}
	}
	return nil
}
