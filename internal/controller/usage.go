package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
)

// maxNamespaces is how many namespaces a status tells the usage of: those that use most.
const maxNamespaces = 1000

// count finds out what a store holds, and writes it into the status. A checkpoint that
// cannot be read is told of; the others count.
func (r *storekeeper) count(ctx context.Context, s *store.Store, object *checkpointv1alpha1.CheckpointStore) (*holding, error) {
	ids, err := s.IDs(ctx)
	if err != nil {
		return nil, err
	}
	k := r.remembered(object.Name, s.ID())
	there := make(map[store.ID]bool, len(ids))
	var broken []error
	for _, id := range ids {
		there[id] = true
		if _, known := k.checkpoints[id]; known {
			continue
		}
		c, err := s.Describe(ctx, id)
		switch {
		case errors.Is(err, store.ErrMissing):
			there[id] = false // it went meanwhile
		case errors.Is(err, store.ErrCorrupt):
			broken = append(broken, err)
		case err != nil:
			return nil, err
		default:
			k.checkpoints[id] = c
		}
	}
	for id := range k.checkpoints {
		if !there[id] {
			delete(k.checkpoints, id)
			delete(k.orphans, id)
		}
	}
	bytes, err := s.Bytes(ctx)
	if err != nil {
		return nil, err
	}
	cluster, err := r.cluster(ctx)
	if err != nil {
		return nil, err
	}
	if len(broken) > k.unreadable {
		r.events.Eventf(object, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventCheckpointsUnusable, "Count",
			"%d checkpoints in it cannot be read, and nothing is collected until they are deleted or mended: %s", len(broken), clip(broken[0].Error()))
	}
	k.unreadable = len(broken)
	k.fill(&object.Status, cluster, bytes)
	return k, nil
}

// fill writes usage into a status: of namespaces, those of this cluster.
func (k *holding) fill(status *checkpointv1alpha1.CheckpointStoreStatus, cluster string, bytes int64) {
	status.Checkpoints, status.LogicalBytes, status.StoredBytes = int32(len(k.checkpoints)+k.unreadable), 0, bytes
	byName := map[string]*checkpointv1alpha1.NamespaceUsage{}
	for _, c := range k.checkpoints {
		status.LogicalBytes += c.LogicalBytes
		name := c.Labels[checkpointv1alpha1.StoreLabelNamespace]
		if c.Labels[checkpointv1alpha1.StoreLabelCluster] != cluster || name == "" {
			continue
		}
		of := byName[name]
		if of == nil {
			of = &checkpointv1alpha1.NamespaceUsage{Name: name}
			byName[name] = of
		}
		of.Checkpoints++
		of.StoredBytes += c.NewBytes
	}
	status.Namespaces = nil
	for _, of := range byName {
		status.Namespaces = append(status.Namespaces, *of)
	}
	slices.SortFunc(status.Namespaces, func(a, b checkpointv1alpha1.NamespaceUsage) int {
		return cmp.Or(cmp.Compare(b.StoredBytes, a.StoredBytes), cmp.Compare(a.Name, b.Name))
	})
	status.Namespaces = status.Namespaces[:min(len(status.Namespaces), maxNamespaces)]
	slices.SortFunc(status.Namespaces, func(a, b checkpointv1alpha1.NamespaceUsage) int { return cmp.Compare(a.Name, b.Name) })
	status.Logical, status.Stored = quantity(status.LogicalBytes), quantity(status.StoredBytes)
}

// quantity writes bytes with three digits or so: "12Mi", "1230Ki".
func quantity(bytes int64) string {
	unit := int64(1)
	for bytes/unit >= 10240 && unit < 1<<40 {
		unit <<= 10
	}
	return resource.NewQuantity((bytes+unit/2)/unit*unit, resource.BinarySI).String()
}

// cluster is what stands for this cluster in stores that several share: the UID of the
// namespace kube-system, which every cluster has for its whole life.
func (r *storekeeper) cluster(ctx context.Context) (string, error) {
	namespace, err := get[corev1.Namespace](ctx, r.live, types.NamespacedName{Name: metav1.NamespaceSystem})
	if err != nil {
		return "", err
	}
	if namespace == nil || namespace.UID == "" {
		return "", fmt.Errorf("namespace %s has no UID", metav1.NamespaceSystem)
	}
	return string(namespace.UID), nil
}
