package restoring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Memory says how memory is given to processes while they run.
type Memory struct {
	Policy pages.Policy
	// Bandwidth bounds what is streamed to a container in a second, in bytes; 0: nothing does.
	Bandwidth int64
	// Patience is how long a process waits for a page before its container is killed.
	Patience time.Duration
	// OrderDir keeps in which order pages were asked for; may be empty.
	OrderDir string
}

// planMemory writes which memory a container is to be given while it runs, and says
// whether there is any.
func (s *Sessions) planMemory(ctx context.Context, rec record, container, workDir string) (bool, error) {
	if !rec.Lazy {
		return false, nil
	}
	l, err := pages.Look(ctx, rec.Dir, rec.Digest)
	if err != nil {
		return false, fmt.Errorf("look for the memory of container %s: %w", container, err)
	}
	plan, err := l.Plan(container)
	if err != nil || len(plan.Processes) == 0 {
		return false, err
	}
	plan.Partial = rec.Partial
	plan.Bandwidth, plan.Patience = s.Memory.Bandwidth, s.Memory.Patience
	if s.Memory.OrderDir != "" {
		digest := strings.TrimPrefix(rec.Digest, "sha256:")
		plan.Order = filepath.Join(s.Memory.OrderDir, digest[:min(len(digest), 32)]+"."+container)
	}
	return true, plan.Write(filepath.Join(workDir, lazy.PlanFile))
}

// block answers who gives memory to a container, and has not got all of it.
func (s *Sessions) block(ctx context.Context, in nodeapi.Block) (nodeapi.Response, error) {
	s.mu.Lock()
	rec, err := s.read(in.Sandbox.ID)
	s.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return nodeapi.Response{}, &nodeapi.Error{Reason: reasonMissing, Message: "nothing is being restored in sandbox " + in.Sandbox.ID}
	} else if err != nil {
		return nodeapi.Response{}, err
	}
	in.Sandbox = rec.Sandbox
	ctx, cancel := context.WithTimeout(ctx, nodeapi.BlockWait)
	defer cancel()
	there, trouble, err := s.Blocks.Block(ctx, rec.Dir, in)
	return nodeapi.Response{Block: &nodeapi.BlockState{There: there, Trouble: trouble}}, err
}

// reconcileMemory tells the observer what has become of the memory of containers, once.
func (s *Sessions) reconcileMemory(ctx context.Context, rec record) (record, error) {
	if !rec.Lazy {
		return rec, nil
	}
	var errs []error
	for _, name := range rec.Containers {
		if slices.Contains(rec.MemoryTold, name) {
			continue
		}
		workDir := filepath.Join(s.workDirs(rec.Sandbox.ID), name)
		status, err := lazy.ReadStatus(workDir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if status.Stage != lazy.StageComplete && status.Stage != lazy.StageLost || !slices.Contains(rec.Created, name) {
			continue // it is told when it comes to that, or its restore has failed anyway
		}
		if status.Stage == lazy.StageLost {
			// Whoever lost it has killed the container, unless it was killed itself.
			p, err := nodeapi.ReadProgress(workDir)
			if err == nil && p.ContainerID == status.ContainerID {
				err = s.Node.Kill(ctx, p.Root, p.ContainerID)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("container %s, whose memory was lost: %w", name, err))
			}
		}
		if err := s.Observer.Memory(ctx, rec.Sandbox, name, status); err != nil {
			errs = append(errs, err)
			continue
		}
		next, err := s.update(rec.Sandbox.ID, func(rec *record) { rec.MemoryTold = add(rec.MemoryTold, name) })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		rec = next
	}
	if err := s.endMemory(ctx, rec); err != nil {
		errs = append(errs, err)
	}
	return rec, errors.Join(errs...)
}

// endMemory tells the observer that all has come that comes.
func (s *Sessions) endMemory(ctx context.Context, rec record) error {
	if !rec.Partial || rec.MemoryEnded || !rec.whole() || s.givesMemory(rec) {
		return nil
	}
	var lost []string
	for _, name := range rec.Containers {
		status, err := lazy.ReadStatus(filepath.Join(s.workDirs(rec.Sandbox.ID), name))
		if err != nil {
			return err
		}
		if status.Stage == lazy.StageLost {
			lost = append(lost, name)
		}
	}
	if err := s.Observer.MemoryEnded(ctx, rec.Sandbox, lost); err != nil {
		return err
	}
	_, err := s.update(rec.Sandbox.ID, func(rec *record) { rec.MemoryEnded = true })
	return ifKept(err)
}

// givesMemory says whether a container is still being given its memory.
func (s *Sessions) givesMemory(rec record) bool {
	return rec.Lazy && slices.ContainsFunc(rec.Containers, func(name string) bool {
		status, err := lazy.ReadStatus(filepath.Join(s.workDirs(rec.Sandbox.ID), name))
		return err != nil || status.Stage == lazy.StageServing
	})
}
