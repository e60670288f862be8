package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/restoring"
)

// fieldNodeName is the selectable field by which an agent sees its own objects.
const fieldNodeName = "spec.nodeName"

const (
	defaultTimeout = 120 * time.Second
	busyRetry      = time.Second            // while another operation has the Pod, or restores use the data
	soon           = 300 * time.Millisecond // until the cache has caught up, or a cancelled operation has ended
)

// reconciler drives the PodCheckpoints of one node. What takes long happens in
// operations; a reconcile only decides.
type reconciler struct {
	nodeName string
	client   client.Client // reads from the cache, writes to the API server
	live     client.Reader // reads from the API server
	runtime  sandboxLister
	store    *store
	flights  *flights
	ops      *operations
	// users are the sandboxes of this node that need a checkpoint directory.
	users   func(dir string) ([]restoring.User, error)
	uploads *uploads
	imports *imports
	room    *room
	metrics *Metrics
	log     *slog.Logger
	now     func() time.Time
}

// Reconcile takes an object one step on.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var pcp v1alpha1.PodCheckpoint
	if err := r.client.Get(ctx, req.NamespacedName, &pcp); apierrors.IsNotFound(err) {
		return ctrl.Result{}, r.forget(ctx, req.NamespacedName)
	} else if err != nil {
		return ctrl.Result{}, err
	}
	if pcp.Spec.NodeName != r.nodeName {
		return ctrl.Result{}, nil
	}
	if !pcp.DeletionTimestamp.IsZero() {
		return r.deleted(ctx, &pcp)
	}
	if r.flights.of(pcp.UID) != nil {
		return ctrl.Result{}, nil // its end writes the status, which brings the object back
	}
	rec, err := r.store.readRecord(pcp.UID)
	switch {
	case err != nil:
		return ctrl.Result{}, err
	case rec != nil:
		return ctrl.Result{}, r.resume(ctx, rec)
	case terminal(&pcp):
		return ctrl.Result{}, nil
	case pcp.Spec.Import != nil:
		return r.importing(ctx, &pcp)
	case inProgress(&pcp):
		return ctrl.Result{}, r.interrupted(ctx, &pcp)
	}
	return r.takeUp(ctx, &pcp)
}

// takeUp begins the operation of an object that nobody has acted on.
func (r *reconciler) takeUp(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (ctrl.Result, error) {
	var pod *corev1.Pod
	var found corev1.Pod
	switch err := r.live.Get(ctx, types.NamespacedName{Namespace: pcp.Namespace, Name: pcp.Spec.SourcePodName}, &found); {
	case err == nil:
		pod = &found
	case !apierrors.IsNotFound(err):
		return ctrl.Result{}, fmt.Errorf("read the source Pod: %w", err)
	}
	src, no := checkPod(pcp, pod, r.nodeName)
	if no != nil {
		return ctrl.Result{}, r.refuse(ctx, pcp, pod, no)
	}
	fl := r.flights.begin(pcp.UID, src.pod.UID)
	if fl == nil {
		return ctrl.Result{RequeueAfter: busyRetry}, nil
	}
	started := false
	defer func() {
		if !started {
			r.flights.end(fl)
		}
	}()
	sandbox, containers, err := findSandbox(ctx, r.runtime, src)
	if errors.As(err, &no) {
		return ctrl.Result{}, r.refuse(ctx, pcp, pod, no)
	} else if err != nil {
		r.metrics.runtimeErrors.WithLabelValues(operationFindSandbox).Inc()
		return ctrl.Result{}, err
	}
	if err := r.addFinalizer(ctx, pcp); err != nil {
		return unlessConflict("add the finalizer", err)
	}
	// This write is what makes the operation happen once: it fails unless the
	// object is as it was read, not taken up and not ended.
	before := pcp.DeepCopy()
	now := metav1.NewTime(r.now())
	pcp.Status.NodeName = r.nodeName
	pcp.Status.SourcePodUID = &src.pod.UID
	pcp.Status.StartTime = &now
	setReady(&pcp.Status, pcp.Generation, now, v1alpha1.ReasonCheckpointInProgress,
		"The containers are being checkpointed: "+strings.Join(src.containers, ", "))
	if err := r.client.Status().Patch(ctx, pcp, changed(before)); err != nil {
		return unlessConflict("write the status", err)
	}
	started = r.ops.begin(ctx, operation{flight: fl, object: pcp.DeepCopy(), source: src, sandboxID: sandbox, containerIDs: containers})
	if !started {
		return ctrl.Result{}, r.interrupted(context.WithoutCancel(ctx), pcp)
	}
	return ctrl.Result{}, nil
}

// addFinalizer puts the finalizer on, unless it is there.
func (r *reconciler) addFinalizer(ctx context.Context, pcp *v1alpha1.PodCheckpoint) error {
	before := pcp.DeepCopy()
	if !controllerutil.AddFinalizer(pcp, v1alpha1.FinalizerData) {
		return nil
	}
	return r.client.Patch(ctx, pcp, changed(before))
}

// changed is the patch of what was changed since before, if nobody else has written
// meanwhile. An update would take away what this version does not know: fields that the
// next one has.
func changed(before client.Object) client.Patch {
	return client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
}

// unlessConflict returns the error of a write. A conflict is none: the object is
// not what the cache showed, and is looked at again when the cache has caught up.
func unlessConflict(doing string, err error) (ctrl.Result, error) {
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: soon}, nil
	}
	if apierrors.IsNotFound(err) {
		return ctrl.Result{}, nil
	}
	return ctrl.Result{}, fmt.Errorf("%s: %w", doing, err)
}

// refuse ends an object that did not pass the preconditions.
func (r *reconciler) refuse(ctx context.Context, pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod, why *refusal) error {
	rec := failureRecord(pcp, r.nodeName, metav1.NewTime(r.now()), why.reason, why.message)
	if pod != nil {
		rec.PodUID = pod.UID
	}
	ended, err := r.ops.settle(ctx, rec)
	if err != nil {
		return err
	}
	if ended {
		r.log.Info("checkpoint refused", "podcheckpoint", pcp.Namespace+"/"+pcp.Name, "reason", why.reason, "message", why.message)
		r.metrics.checkpointFailed(0)
	}
	return nil
}

// interrupted ends an object that an agent had begun and not recorded an outcome
// of: the agent died, or was stopped. A checkpoint cannot be resumed.
func (r *reconciler) interrupted(ctx context.Context, pcp *v1alpha1.PodCheckpoint) error {
	var fresh v1alpha1.PodCheckpoint
	if err := r.live.Get(ctx, client.ObjectKeyFromObject(pcp), &fresh); err != nil {
		return client.IgnoreNotFound(err)
	}
	if fresh.UID != pcp.UID || terminal(&fresh) {
		return nil // the cache was behind
	}
	if err := r.store.removePartial(pcp.UID); err != nil {
		return fmt.Errorf("remove the partial checkpoint: %w", err)
	}
	rec := failureRecord(&fresh, r.nodeName, metav1.NewTime(r.now()), v1alpha1.ReasonCheckpointFailed,
		"The checkpoint was interrupted: the agent on node "+r.nodeName+" restarted while it was being taken; nothing of it was kept, create another PodCheckpoint")
	ended, err := r.ops.conclude(ctx, rec)
	if err == nil && ended {
		r.log.Info("interrupted checkpoint ended", "podcheckpoint", pcp.Namespace+"/"+pcp.Name)
		r.metrics.checkpointFailed(0)
	}
	return err
}

// resume brings an operation to its end whose outcome is on record: whatever
// came between the record and the status, it has happened.
func (r *reconciler) resume(ctx context.Context, rec *record) error {
	if rec.Data != "" {
		if err := r.store.commit(rec.UID, rec.Data); err != nil {
			// The record says that it is there and it is not: a failing disk, or
			// somebody removed it. The object must not say Ready.
			rec = rec.failed(metav1.NewTime(r.now()), "The checkpoint had been taken, and then its data could not be kept: "+err.Error())
			if err := r.store.writeRecord(rec); err != nil {
				return err
			}
		}
	}
	_, err := r.ops.conclude(ctx, rec)
	return err
}

// deleted removes the data of an object that is being deleted, then lets it go.
func (r *reconciler) deleted(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(pcp, v1alpha1.FinalizerData) {
		return ctrl.Result{}, nil
	}
	if fl := r.flights.of(pcp.UID); fl != nil {
		fl.stop(errDeleted)
		return ctrl.Result{RequeueAfter: soon}, nil
	}
	if !r.ops.storing.stop(pcp.UID) {
		return ctrl.Result{RequeueAfter: soon}, nil
	}
	if uid := pcp.Status.SourcePodUID; uid != nil && inProgress(pcp) && pcp.Spec.Import == nil {
		// Its operation was abandoned, or died with an agent before this one.
		if err := r.ops.marker.clear(ctx, podRef{pcp.Namespace, pcp.Spec.SourcePodName, *uid}, v1alpha1.PodConditionCheckpointing); err != nil {
			return ctrl.Result{}, err
		}
	}
	held, err := r.store.held()
	if err != nil {
		return ctrl.Result{}, err
	}
	if name := held[pcp.UID]; name != "" {
		why, err := r.heldUp(ctx, pcp, r.store.dataPath(name))
		if err != nil {
			return ctrl.Result{}, err
		}
		if why != "" { // P29
			r.ops.recorder.Eventf(pcp, nil, corev1.EventTypeNormal, v1alpha1.EventDeletionDelayed, actionDelete, "%s", why)
			return ctrl.Result{RequeueAfter: busyRetry}, nil
		}
	}
	r.uploads.forget(pcp.UID)
	if err := r.store.removeData(pcp.UID); err != nil {
		return ctrl.Result{}, err
	}
	before := pcp.DeepCopy()
	controllerutil.RemoveFinalizer(pcp, v1alpha1.FinalizerData)
	if err := r.client.Patch(ctx, pcp, changed(before)); err != nil {
		return unlessConflict("take the finalizer off", err)
	}
	r.log.Info("checkpoint data removed", "podcheckpoint", pcp.Namespace+"/"+pcp.Name, "uid", pcp.UID)
	return ctrl.Result{}, nil
}

// forget removes what is kept for an object that is gone though nobody took the
// finalizer off here.
func (r *reconciler) forget(ctx context.Context, name types.NamespacedName) error {
	held, err := r.store.held()
	if err != nil {
		return err
	}
	for _, data := range held {
		if strings.HasPrefix(data, name.Namespace+"_") {
			return r.removeOrphans(ctx)
		}
	}
	return nil
}

// removeOrphans removes the data of objects that no longer exist, and of those
// that ended without a checkpoint. What is held is listed before the objects
// are, and those from the API server itself: nothing that has just been made can
// be taken for an orphan.
func (r *reconciler) removeOrphans(ctx context.Context) error {
	held, err := r.store.held()
	if err != nil {
		return err
	}
	if len(held) == 0 {
		return nil
	}
	var list v1alpha1.PodCheckpointList
	if err := r.live.List(ctx, &list, client.MatchingFields{fieldNodeName: r.nodeName}); err != nil {
		return fmt.Errorf("list this node's PodCheckpoints: %w", err)
	}
	for i := range list.Items {
		pcp := &list.Items[i]
		rec, err := r.store.readRecord(pcp.UID)
		if err != nil {
			return err
		}
		if ready(pcp) || !terminal(pcp) || rec != nil {
			delete(held, pcp.UID)
		}
	}
	var failures []error
	for uid, data := range held {
		if r.flights.of(uid) != nil {
			continue
		}
		if gone, err := r.reallyGone(ctx, uid, data); err != nil {
			failures = append(failures, err)
			continue
		} else if !gone {
			continue
		}
		if err := r.store.removeData(uid); err != nil {
			failures = append(failures, err)
			continue
		}
		r.log.Info("data of a PodCheckpoint that is gone removed", "uid", uid, "directory", data)
	}
	return errors.Join(failures...)
}

// reallyGone asks for the object by name before its data are removed, lest a
// list that left it out costs a checkpoint.
func (r *reconciler) reallyGone(ctx context.Context, uid types.UID, data string) (bool, error) {
	namespace, rest, ok := strings.Cut(data, "_")
	if !ok {
		return true, nil // a partial checkpoint or a record: no data are lost
	}
	name, _, _ := strings.Cut(rest, "_")
	var pcp v1alpha1.PodCheckpoint
	err := r.live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: name}, &pcp)
	if apierrors.IsNotFound(err) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("look for the PodCheckpoint of %s: %w", data, err)
	}
	return pcp.UID != uid || terminal(&pcp) && !ready(&pcp), nil
}

// forgetPods drops what is remembered of restored Pods that no longer exist.
func (r *reconciler) forgetPods(ctx context.Context) error {
	pods, err := r.store.restoredPods()
	if err != nil {
		return err
	}
	for uid, name := range pods {
		var pod corev1.Pod
		err := r.live.Get(ctx, name, &pod)
		if err == nil && pod.UID == uid {
			continue
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("look for restored Pod %s: %w", name, err)
		}
		if err := r.store.forgetRestored(uid); err != nil {
			return fmt.Errorf("forget restored Pod %s: %w", name, err)
		}
	}
	return nil
}
