package controller

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/admission"
	"podstasis.dev/stasis/internal/placement"
)

// indexRestoreFrom finds the Pods that wait for a PodCheckpoint.
const indexRestoreFrom = "restoreFrom"

// remind is how often a Pod that waits says why: events are forgotten after an
// hour.
const remind = 10 * time.Minute

// gate lets Pods go whose checkpoint has become Ready: it pins them to the
// checkpoint and the nodes that can restore it and takes the scheduling gate off, in one write. Until
// then it says in an event what a Pod waits for (P23).
type gate struct {
	client    client.Client
	live      client.Reader
	namespace string // of the agents' Leases
	clock     clock.PassiveClock
	events    recorder
	log       *slog.Logger
}

func (r *gate) setUp(ctx context.Context, mgr ctrl.Manager) error {
	err := mgr.GetFieldIndexer().IndexField(ctx, &corev1.Pod{}, indexRestoreFrom, func(o client.Object) []string {
		name, asked := o.GetAnnotations()[checkpointv1alpha1.AnnotationRestoreFrom]
		if !asked || !placement.Held(o.(*corev1.Pod)) {
			return nil
		}
		return []string{name}
	})
	if err != nil {
		return fmt.Errorf("index Pods by the checkpoint that they wait for: %w", err)
	}
	waiting := predicate.NewPredicateFuncs(func(o client.Object) bool {
		_, asked := o.GetAnnotations()[checkpointv1alpha1.AnnotationRestoreFrom]
		return asked && placement.Held(o.(*corev1.Pod))
	})
	return ctrl.NewControllerManagedBy(mgr).
		Named("restore-gate").
		For(&corev1.Pod{}, withPredicates(waiting)).
		Watches(&checkpointv1alpha1.PodCheckpoint{}, handler.EnqueueRequestsFromMapFunc(r.waitingFor)).
		Complete(r)
}

// waitingFor lists the Pods that wait for a checkpoint.
func (r *gate) waitingFor(ctx context.Context, checkpoint client.Object) []reconcile.Request {
	var pods corev1.PodList
	err := r.client.List(ctx, &pods, client.InNamespace(checkpoint.GetNamespace()), client.MatchingFields{indexRestoreFrom: checkpoint.GetName()})
	if err != nil {
		r.log.ErrorContext(ctx, "Pods that wait for a checkpoint not found", "namespace", checkpoint.GetNamespace(), "name", checkpoint.GetName(), "error", err)
		return nil
	}
	requests := make([]reconcile.Request, 0, len(pods.Items))
	for i := range pods.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&pods.Items[i])})
	}
	return requests
}

func (r *gate) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pod corev1.Pod
	if err := r.client.Get(ctx, req.NamespacedName, &pod); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	name, asked := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom]
	if !asked || !placement.Held(&pod) || pod.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	checkpoint, err := get[checkpointv1alpha1.PodCheckpoint](ctx, r.client, types.NamespacedName{Namespace: pod.Namespace, Name: name})
	if err != nil {
		return reconcile.Result{}, err
	}
	if obstacle := placement.Obstacle(checkpoint, name); obstacle != "" {
		r.events.Eventf(&pod, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventCheckpointNotReady, "Restore", "%s", obstacle)
		return reconcile.Result{RequeueAfter: remind}, nil
	}
	// The Pod was admitted without a template to compare it with.
	if errs := admission.Mismatch(checkpoint, &pod); len(errs) > 0 {
		r.events.Eventf(&pod, checkpoint, corev1.EventTypeWarning, checkpointv1alpha1.EventPodSpecMismatch, "Restore",
			"%s", clip(errs.ToAggregate().Error()))
		return reconcile.Result{RequeueAfter: remind}, nil
	}

	agents, err := placement.Agents(ctx, r.live, r.namespace)
	if err != nil {
		return reconcile.Result{}, err
	}
	where := placement.Find(checkpoint, agents, r.clock.Now())
	before := pod.DeepCopy()
	placement.Pin(&pod, checkpoint, where)
	err = r.client.Patch(ctx, &pod, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return reconcile.Result{RequeueAfter: time.Second}, nil
	}
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("let Pod %s/%s go: %w", pod.Namespace, pod.Name, err)
	}
	r.log.InfoContext(ctx, "restoring Pod let go", "namespace", pod.Namespace, "pod", pod.Name, "podCheckpoint", name, "holder", where.Holder, "others", len(where.Others()))
	return reconcile.Result{}, nil
}

// clip keeps a text within what an event may hold.
func clip(s string) string {
	const most = 1000
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
