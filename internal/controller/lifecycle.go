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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// agentLabels are on the Pods of the agent's DaemonSet (config/agent).
var agentLabels = client.MatchingLabels{
	"app.kubernetes.io/name":      "stasis",
	"app.kubernetes.io/component": "agent",
}

const (
	// headStart is how long a PodCheckpoint is left to its agent before anybody asks
	// whether there is one.
	headStart = 3 * time.Second
	// concurrency is how many PodCheckpoints are looked at side by side.
	concurrency = 4
)

// indexNode finds PodCheckpoints by the node that owns them.
const indexNode = "spec.nodeName"

// lifecycle ends the PodCheckpoints that no agent owns, and releases those whose
// data went with their node. Taking checkpoints is not its affair.
type lifecycle struct {
	client client.Client
	// live reads past the cache: whether a node or a Pod exists decides on an end
	// that cannot be taken back.
	live      client.Reader
	namespace string // where the agents run
	clock     clock.PassiveClock
	since     time.Time // when it began to look
	events    recorder
	log       *slog.Logger
}

func (r *lifecycle) setUp(ctx context.Context, mgr ctrl.Manager, metrics *Metrics) error {
	r.since = r.clock.Now()
	err := mgr.GetFieldIndexer().IndexField(ctx, &checkpointv1alpha1.PodCheckpoint{}, indexNode, func(o client.Object) []string {
		return []string{o.(*checkpointv1alpha1.PodCheckpoint).Spec.NodeName}
	})
	if err != nil {
		return fmt.Errorf("index PodCheckpoints by node: %w", err)
	}
	return ctrl.NewControllerManagedBy(mgr).
		Named("podcheckpoint-lifecycle").
		For(&checkpointv1alpha1.PodCheckpoint{}, withPredicates(metrics.counting())).
		WatchesMetadata(&corev1.Node{}, handler.EnqueueRequestsFromMapFunc(r.ofNode), onlyDeletes).
		WithOptions(ctrlcontroller.Options{MaxConcurrentReconciles: concurrency}).
		Complete(metrics.timed(r.clock, r))
}

// ofNode lists the checkpoints of a node that is gone.
func (r *lifecycle) ofNode(ctx context.Context, node client.Object) []reconcile.Request {
	var list checkpointv1alpha1.PodCheckpointList
	if err := r.client.List(ctx, &list, client.MatchingFields{indexNode: node.GetName()}); err != nil {
		r.log.ErrorContext(ctx, "checkpoints of a deleted node not found", "node", node.GetName(), "error", err)
		return nil
	}
	requests := make([]reconcile.Request, 0, len(list.Items))
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

func (r *lifecycle) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := r.client.Get(ctx, req.NamespacedName, &checkpoint); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if checkpoint.DeletionTimestamp != nil {
		return reconcile.Result{}, r.release(ctx, &checkpoint)
	}
	if checkpoint.IsTerminal() {
		return reconcile.Result{}, nil
	}
	// Agents begin at once and most are done within this: the controller then costs
	// the API server nothing, however many PodCheckpoints are made.
	if age := r.clock.Since(checkpoint.CreationTimestamp.Time); checkpoint.Spec.NodeName != "" && age < headStart {
		return reconcile.Result{RequeueAfter: headStart - age}, nil
	}
	f, err := r.look(ctx, &checkpoint)
	if err != nil {
		return reconcile.Result{}, err
	}
	v := judge(&checkpoint, f, r.clock.Now())
	// Where Stasis was disabled and is enabled again, the controller may be there
	// before the agents, which have outcomes to tell (P33).
	if waits := settle - r.clock.Since(r.since); checkpoint.Spec.NodeName != "" && v.reason == checkpointv1alpha1.ReasonCheckpointFailed && waits > 0 {
		return reconcile.Result{RequeueAfter: waits}, nil
	}
	if v.reason != "" {
		if err := r.write(ctx, &checkpoint, v); err != nil {
			if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
				// Somebody else wrote; their change brings the object back here.
				return reconcile.Result{RequeueAfter: time.Second}, nil
			}
			return reconcile.Result{}, err
		}
	}
	return reconcile.Result{RequeueAfter: v.again}, nil
}

// write sets the Ready condition and tells of an end.
func (r *lifecycle) write(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint, v verdict) error {
	before := checkpoint.DeepCopy()
	changed := meta.SetStatusCondition(&checkpoint.Status.Conditions, metav1.Condition{
		Type:               checkpointv1alpha1.PodCheckpointReady,
		Status:             metav1.ConditionFalse,
		Reason:             v.reason,
		Message:            v.message,
		ObservedGeneration: checkpoint.Generation,
		LastTransitionTime: metav1.NewTime(r.clock.Now()),
	})
	if !changed {
		return nil
	}
	if err := r.client.Status().Patch(ctx, checkpoint, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("write status of PodCheckpoint %s/%s: %w", checkpoint.Namespace, checkpoint.Name, err)
	}
	if v.reason == checkpointv1alpha1.ReasonPending {
		return nil
	}
	r.log.InfoContext(ctx, "checkpoint ended without an agent", "namespace", checkpoint.Namespace, "name", checkpoint.Name,
		"reason", v.reason, "message", v.message)
	r.events.Eventf(checkpoint, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventCheckpointFailed, "Checkpoint", "%s", v.message)
	return nil
}

// look finds out who could act on a checkpoint.
func (r *lifecycle) look(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint) (facts, error) {
	var f facts
	var err error
	if c.Spec.NodeName == "" {
		f.source, err = get[corev1.Pod](ctx, r.live, types.NamespacedName{Namespace: c.Namespace, Name: c.Spec.SourcePodName})
		return f, err
	}
	if f.node, err = get[corev1.Node](ctx, r.live, types.NamespacedName{Name: c.Spec.NodeName}); err != nil || f.node == nil {
		return f, err
	}
	var agents corev1.PodList
	err = r.live.List(ctx, &agents, client.InNamespace(r.namespace), agentLabels, client.MatchingFields{"spec.nodeName": c.Spec.NodeName})
	if err != nil {
		return f, fmt.Errorf("look for the agent of node %s: %w", c.Spec.NodeName, err)
	}
	for i := range agents.Items {
		// While one is replaced there are two: the one that is Ready counts.
		if f.agent == nil || podReady(&agents.Items[i]) {
			f.agent = &agents.Items[i]
		}
	}
	return f, nil
}

// release takes the finalizer off a PodCheckpoint whose node is gone with the
// data, or that never had any. On a node that exists the agent does it, once it
// has removed the data (P29).
func (r *lifecycle) release(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint) error {
	if !slices.Contains(c.Finalizers, checkpointv1alpha1.FinalizerData) {
		return nil
	}
	if holder := c.Spec.NodeName; holder != "" {
		node, err := get[corev1.Node](ctx, r.live, types.NamespacedName{Name: holder})
		if err != nil || node != nil {
			return err
		}
	}
	before := c.DeepCopy()
	controllerutil.RemoveFinalizer(c, checkpointv1alpha1.FinalizerData)
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if err := r.client.Patch(ctx, c, patch); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("take the finalizer off PodCheckpoint %s/%s: %w", c.Namespace, c.Name, err))
	}
	r.log.InfoContext(ctx, "checkpoint released: its node is gone", "namespace", c.Namespace, "name", c.Name, "node", c.Spec.NodeName)
	return nil
}

// onlyDeletes lets only deletions through.
var onlyDeletes = withPredicates(predicate.Funcs{
	CreateFunc:  func(event.CreateEvent) bool { return false },
	UpdateFunc:  func(event.UpdateEvent) bool { return false },
	GenericFunc: func(event.GenericEvent) bool { return false },
	DeleteFunc:  func(event.DeleteEvent) bool { return true },
})
