package controller

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/stores"
)

const (
	// deleteFrom bounds one attempt to delete a checkpoint from its store.
	deleteFrom = 30 * time.Second
	// deleteAgain is how often a store that does not answer is tried.
	deleteAgain = 30 * time.Second
	// restoreAgain is how often a checkpoint that Pods are being restored from is looked at.
	restoreAgain = 5 * time.Second
)

// storeRelease removes deleted PodCheckpoints from their stores, and only then lets them
// go. A store that is away delays that; one whose CheckpointStore is gone does not.
type storeRelease struct {
	client client.Client
	live   client.Reader
	open   stores.Opener
	events recorder
	log    *slog.Logger
}

func (r *storeRelease) setUp(mgr ctrl.Manager) error {
	leaving := predicate.NewPredicateFuncs(func(o client.Object) bool {
		return o.GetDeletionTimestamp() != nil && slices.Contains(o.GetFinalizers(), checkpointv1alpha1.FinalizerStore)
	})
	return ctrl.NewControllerManagedBy(mgr).
		Named("podcheckpoint-store").
		For(&checkpointv1alpha1.PodCheckpoint{}, withPredicates(leaving)).
		WithOptions(ctrlcontroller.Options{MaxConcurrentReconciles: concurrency}).
		Complete(r)
}

func (r *storeRelease) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var c checkpointv1alpha1.PodCheckpoint
	if err := r.client.Get(ctx, req.NamespacedName, &c); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if c.DeletionTimestamp == nil || !slices.Contains(c.Finalizers, checkpointv1alpha1.FinalizerStore) {
		return reconcile.Result{}, nil
	}
	// Its node may still be storing it, or restoring from it. When that is over the
	// agent takes its finalizer off, which brings the object back here.
	if slices.Contains(c.Finalizers, checkpointv1alpha1.FinalizerData) {
		return reconcile.Result{}, nil
	}
	again, err := r.remove(ctx, &c)
	if err != nil || again > 0 {
		return reconcile.Result{RequeueAfter: again}, err
	}
	before := c.DeepCopy()
	controllerutil.RemoveFinalizer(&c, checkpointv1alpha1.FinalizerStore)
	err = r.client.Patch(ctx, &c, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: time.Second}, nil
	}
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("take the finalizer off PodCheckpoint %s: %w", req, err)
	}
	return reconcile.Result{}, nil
}

// remove deletes a checkpoint from its store. It returns when to try again, or 0 when
// nothing is left to be done.
func (r *storeRelease) remove(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint) (time.Duration, error) {
	in := c.Status.Store
	if in == nil {
		// It never became Ready. What an agent may have stored is an orphan.
		return 0, nil
	}
	id, err := store.ParseID(in.CheckpointID)
	if err != nil {
		r.leave(ctx, c, "status.store.checkpointID names nothing: %v", err)
		return 0, nil
	}
	object, err := get[checkpointv1alpha1.CheckpointStore](ctx, r.live, types.NamespacedName{Name: in.Name})
	if err != nil && !meta.IsNoMatchError(err) { // while Stasis' API is deleted, stores go first
		return 0, err
	}
	if object == nil || object.DeletionTimestamp != nil {
		r.leave(ctx, c, "CheckpointStore %q is gone, and with it the way to checkpoint %.16s… in store %s, which stays where it is. "+
			"A CheckpointStore for the same place would have it deleted after an hour", in.Name, in.CheckpointID, in.StoreID)
		return 0, nil
	}
	users, err := restoringFrom(ctx, r.live, c)
	if err != nil {
		return 0, err
	}
	if len(users) > 0 {
		why := "is being restored from it"
		if begun(users[0]) {
			why = "is still being given memory of it"
		}
		r.events.Eventf(c, nil, corev1.EventTypeNormal, checkpointv1alpha1.EventDeletionDelayed, "Delete", "Pod %q %s", users[0].Name, why)
		return restoreAgain, nil
	}
	within, cancel := context.WithTimeout(ctx, deleteFrom)
	defer cancel()
	s, done, err := r.open.Open(within, object)
	if err == nil {
		defer done()
		if s.ID() != in.StoreID {
			r.leave(ctx, c, "CheckpointStore %q is of store %s now; checkpoint %.16s… was in store %s and stays where that is", in.Name, s.ID(), in.CheckpointID, in.StoreID)
			return 0, nil
		}
		err = s.Delete(within, id)
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil {
		r.log.WarnContext(ctx, "checkpoint not deleted from its store", "namespace", c.Namespace, "name", c.Name, "store", in.Name, "reason", stores.Reason(err), "error", err)
		r.events.Eventf(c, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventDeletionDelayed, "Delete",
			"it cannot be deleted from its store (%s); trying again every %s: %s", stores.Reason(err), deleteAgain, clip(err.Error()))
		return deleteAgain, nil
	}
	r.log.InfoContext(ctx, "checkpoint deleted from its store", "namespace", c.Namespace, "name", c.Name, "store", in.Name, "checkpoint", in.CheckpointID)
	return 0, nil
}

// leave says what stays in a store that nobody reaches any more.
func (r *storeRelease) leave(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint, format string, args ...any) {
	why := fmt.Sprintf(format, args...)
	r.log.WarnContext(ctx, "checkpoint left in its store", "namespace", c.Namespace, "name", c.Name, "why", why)
	r.events.Eventf(c, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventLeftInStore, "Delete", "%s", why)
}

// restoringFrom lists the Pods that are being restored from a checkpoint: those that
// admission, or the gate, has given it to, that are on a node and that do not run yet,
// or not wholly, or not with all their memory. One that waits for its place is not among
// them, nor one that its node refuses to restore now that the checkpoint is being deleted:
// they would keep it for as long as they wait.
func restoringFrom(ctx context.Context, live client.Reader, c *checkpointv1alpha1.PodCheckpoint) ([]*corev1.Pod, error) {
	pods, err := podsOf(ctx, live, c)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(pods, func(pod *corev1.Pod) bool {
		pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] == string(c.UID)
		return !pinned || pod.Spec.NodeName == "" || restored(pod) || refused(pod)
	}), nil
}

// podsOf lists the Pods that were, or are to be, restored from a checkpoint.
func podsOf(ctx context.Context, live client.Reader, c *checkpointv1alpha1.PodCheckpoint) ([]*corev1.Pod, error) {
	var list corev1.PodList
	if err := live.List(ctx, &list, client.InNamespace(c.Namespace)); err != nil {
		return nil, fmt.Errorf("list the Pods of namespace %s: %w", c.Namespace, err)
	}
	var pods []*corev1.Pod
	for i := range list.Items {
		pod := &list.Items[i]
		uid, pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]
		if pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] == c.Name && (!pinned || uid == string(c.UID)) {
			pods = append(pods, pod)
		}
	}
	return pods, nil
}

// restored says that a Pod needs its checkpoint no longer: it runs on, with all its
// memory, or has ended.
func restored(pod *corev1.Pod) bool {
	return begun(pod) && !checkpointv1alpha1.AwaitsMemory(pod)
}

// refused says that nothing of a Pod has begun, and that its agent has looked at the
// checkpoint and found it being deleted.
func refused(pod *corev1.Pod) bool {
	return !begun(pod) && !checkpointv1alpha1.AwaitsMemory(pod) && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == checkpointv1alpha1.PodConditionRestoring && c.Status == corev1.ConditionFalse && c.Reason == checkpointv1alpha1.EventCheckpointNotReady
	})
}

// begun says that all containers of a Pod go on, or have ended.
func begun(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == checkpointv1alpha1.PodConditionRestoring && c.Status == corev1.ConditionTrue {
			return pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
		}
	}
	return pod.Status.Phase != corev1.PodPending && pod.Status.Phase != ""
}
