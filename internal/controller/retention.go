package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// maxRetired is how many PodCheckpoints one look deletes at most.
const maxRetired = 100

// retire deletes the PodCheckpoints that a store's retention says are to go, but for
// those that Pods are to be restored from.
func (r *storekeeper) retire(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) error {
	if object.Spec.Retention == nil {
		return nil
	}
	var list checkpointv1alpha1.PodCheckpointList
	if err := r.client.List(ctx, &list); err != nil {
		return fmt.Errorf("list PodCheckpoints: %w", err)
	}
	var in []*checkpointv1alpha1.PodCheckpoint
	for i := range list.Items {
		c := &list.Items[i]
		if c.Status.Store != nil && c.Status.Store.Name == object.Name && c.DeletionTimestamp == nil && c.IsReady() {
			in = append(in, c)
		}
	}
	var errs []error
	all := retired(object.Spec.Retention, in, r.clock.Now())
	for _, due := range all[:min(len(all), maxRetired)] {
		if err := r.retireOne(ctx, object, due); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *storekeeper) retireOne(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, due overdue) error {
	c := due.checkpoint
	pods, err := podsOf(ctx, r.live, c)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(pods, func(pod *corev1.Pod) bool { return !restored(pod) }) {
		return nil // its turn comes when they run
	}
	err = r.client.Delete(ctx, c, client.Preconditions{UID: &c.UID, ResourceVersion: &c.ResourceVersion})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete PodCheckpoint %s/%s: %w", c.Namespace, c.Name, err)
	}
	r.log.InfoContext(ctx, "checkpoint deleted by retention", "namespace", c.Namespace, "name", c.Name, "store", object.Name, "why", due.why)
	r.events.Eventf(c, object, corev1.EventTypeNormal, checkpointv1alpha1.EventDeletedByRetention, "Delete", "retention of CheckpointStore %q: %s", object.Name, due.why)
	r.metrics.retired(object.Name)
	return nil
}

// overdue is a checkpoint that is to go.
type overdue struct {
	checkpoint *checkpointv1alpha1.PodCheckpoint
	why        string
}

// retired says which of the Ready checkpoints in a store its retention no longer keeps,
// the oldest first. The latest of each namespace is not among them for its bytes alone.
func retired(by *checkpointv1alpha1.CheckpointRetention, in []*checkpointv1alpha1.PodCheckpoint, now time.Time) []overdue {
	latest := slices.Clone(in)
	slices.SortFunc(latest, func(a, b *checkpointv1alpha1.PodCheckpoint) int {
		return cmp.Or(completed(b).Compare(completed(a)), cmp.Compare(b.Namespace, a.Namespace), cmp.Compare(b.Name, a.Name))
	})
	ofPod, ofWorkload, bytes := map[[2]string]int32{}, map[[2]string]int32{}, map[string]int64{}
	kept, over := map[string]bool{}, map[string]bool{}
	var all []overdue
	for _, c := range latest {
		pod, owner := [2]string{c.Namespace, c.Spec.SourcePodName}, [2]string{c.Namespace, workload(c)}
		why := ""
		switch {
		case by.MaxAge != nil && now.Sub(completed(c)) > by.MaxAge.Duration:
			why = fmt.Sprintf("it is older than maxAge %s", by.MaxAge.Duration)
		case by.MaxPerPod != nil && ofPod[pod] >= *by.MaxPerPod:
			why = fmt.Sprintf("there are maxPerPod %d later ones of Pod %q", *by.MaxPerPod, c.Spec.SourcePodName)
		case by.MaxPerWorkload != nil && owner[1] != "" && ofWorkload[owner] >= *by.MaxPerWorkload:
			why = fmt.Sprintf("there are maxPerWorkload %d later ones of %s", *by.MaxPerWorkload, owner[1])
		case by.MaxBytesPerNamespace != nil && kept[c.Namespace] && (over[c.Namespace] || bytes[c.Namespace]+c.Status.Store.NewBytes > by.MaxBytesPerNamespace.Value()):
			why = fmt.Sprintf("later ones of namespace %q take maxBytesPerNamespace %s with it", c.Namespace, by.MaxBytesPerNamespace)
			over[c.Namespace] = true // what is older goes, too, however small
		}
		if why != "" {
			all = append(all, overdue{c, why})
			continue
		}
		ofPod[pod]++
		ofWorkload[owner]++
		bytes[c.Namespace] += c.Status.Store.NewBytes
		kept[c.Namespace] = true
	}
	slices.Reverse(all)
	return all
}

func completed(c *checkpointv1alpha1.PodCheckpoint) time.Time {
	if c.Status.CompletionTime == nil {
		return c.CreationTimestamp.Time
	}
	return c.Status.CompletionTime.Time
}

// workload is the controller of the source Pod as KIND/NAME; empty if it had none.
func workload(c *checkpointv1alpha1.PodCheckpoint) string {
	if c.Status.CheckpointedPodTemplate == nil {
		return ""
	}
	owner := metav1.GetControllerOfNoCopy(c.Status.CheckpointedPodTemplate)
	if owner == nil {
		return ""
	}
	return owner.Kind + "/" + owner.Name
}
