package controller

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
)

// orphanAge is for how long a checkpoint in a store has no PodCheckpoint before it is
// deleted there.
const orphanAge = time.Hour

// deleteOrphans deletes from a store what this cluster has no PodCheckpoint of any more:
// what an agent wrote while its object was deleted, or after it had been given up. What
// other clusters wrote is theirs.
func (r *storekeeper) deleteOrphans(ctx context.Context, s *store.Store, object *checkpointv1alpha1.CheckpointStore, k *holding) error {
	cluster, err := r.cluster(ctx)
	if err != nil {
		return err
	}
	now := r.clock.Now()
	for id, c := range k.checkpoints {
		if c.Labels[checkpointv1alpha1.StoreLabelCluster] != cluster || c.Labels[checkpointv1alpha1.StoreLabelUID] == "" {
			continue
		}
		key := types.NamespacedName{Namespace: c.Labels[checkpointv1alpha1.StoreLabelNamespace], Name: c.Labels[checkpointv1alpha1.StoreLabelName]}
		owned, err := r.owned(ctx, key, s.ID(), c)
		if err != nil {
			return err
		}
		if owned {
			delete(k.orphans, id)
			continue
		}
		if _, seen := k.orphans[id]; !seen {
			k.orphans[id] = now
		}
		if now.Sub(k.orphans[id]) < orphanAge || now.Sub(c.Created) < orphanAge {
			continue
		}
		if err := s.Delete(ctx, id); err != nil {
			return fmt.Errorf("delete checkpoint %s, of which there is no PodCheckpoint %s any more: %w", id, key, err)
		}
		delete(k.checkpoints, id)
		delete(k.orphans, id)
		r.log.InfoContext(ctx, "checkpoint without a PodCheckpoint deleted from its store", "store", object.Name, "checkpoint", id.String(), "namespace", key.Namespace, "name", key.Name)
		r.events.Eventf(object, nil, corev1.EventTypeNormal, checkpointv1alpha1.EventOrphanDeleted, "Collect",
			"checkpoint %.16s… was of PodCheckpoint %s, UID %s, which is gone", id.String(), key, c.Labels[checkpointv1alpha1.StoreLabelUID])
	}
	return nil
}

// owned says whether there is a PodCheckpoint that a checkpoint in a store is of. The
// cache's word is enough for a yes.
func (r *storekeeper) owned(ctx context.Context, key types.NamespacedName, storeID string, c store.Checkpoint) (bool, error) {
	for _, reader := range []client.Reader{r.client, r.live} {
		owner, err := get[checkpointv1alpha1.PodCheckpoint](ctx, reader, key)
		if err != nil {
			return false, err
		}
		if owner != nil && string(owner.UID) == c.Labels[checkpointv1alpha1.StoreLabelUID] && !disowned(owner, storeID, c.ID) {
			return true, nil
		}
	}
	return false, nil
}

// disowned says that a PodCheckpoint has ended without this checkpoint: it failed while it
// was stored, or was stored once more.
func disowned(owner *checkpointv1alpha1.PodCheckpoint, storeID string, id store.ID) bool {
	if !owner.IsTerminal() {
		return false
	}
	in := owner.Status.Store
	if in == nil {
		return !owner.IsReady()
	}
	return in.StoreID == storeID && in.CheckpointID != id.String()
}
