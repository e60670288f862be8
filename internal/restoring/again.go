package restoring

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

// again returns the record of a container that was let go, without that where it is to
// be restored once more: when its start came to nothing. The container runtime ends a
// container whose StartContainer fails or is given up, as when the kubelet dies in it,
// also where the OCI runtime had let the container go a moment before. To the kubelet
// it never ran.
//
// It is so for a container that is alone so far. Where others of the Pod have been
// restored the moment that all of them are of has passed: it starts anew, as a
// container does that fails.
func (s *Sessions) again(ctx context.Context, rec record, container string) (record, error) {
	alone := []string{container}
	if !slices.Equal(rec.Started, alone) || !slices.Equal(rec.Created, alone) {
		return rec, nil
	}
	workDir := filepath.Join(s.workDirs(rec.Sandbox.ID), container)
	p, err := nodeapi.ReadProgress(workDir)
	if err != nil || p.ContainerID == "" {
		return rec, err
	}
	failed, err := s.Node.StartFailed(ctx, p.Root, p.ContainerID)
	if err != nil || !failed {
		return rec, err
	}
	// Its data may have been deleted since: nothing held them any more.
	if _, _, err := checkpoint.ReadManifest(rec.Dir); errors.Is(err, checkpoint.ErrMissing) {
		return rec, nil
	} else if err != nil {
		return rec, fmt.Errorf("restore container %s again: %w", container, err)
	}
	// In this order: what the container came to is not found once more.
	if err := nodeapi.ForgetProgress(workDir); err != nil {
		return rec, err
	}
	return s.update(rec.Sandbox.ID, func(rec *record) { rec.Started, rec.Created, rec.Again = nil, nil, rec.Again+1 })
}
