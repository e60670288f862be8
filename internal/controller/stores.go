package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/stores"
)

const (
	// lookAtStore is how often a store is looked at while nothing happens to it.
	lookAtStore = time.Minute
	// openStore bounds the time in which a store has to answer, with its retries.
	openStore = time.Minute
	// countStore bounds the look at what it holds. What was read stays known.
	countStore = 10 * time.Minute
	// sweepStore bounds one look for what nothing uses. What it did not come to, the
	// next one does.
	sweepStore = 30 * time.Minute
	// gather is how long changes of PodCheckpoints are gathered before their store is
	// counted again.
	gather = 2 * time.Second
)

// StoreConfig says how stores are kept.
type StoreConfig struct {
	// Open opens them.
	Open stores.Opener
	// Every is how often what nothing uses is looked for.
	Every time.Duration
	// Grace is how long it stays at least, once it was seen.
	Grace time.Duration
	// Pause is made after each object that is removed, to leave the store to others.
	Pause time.Duration
}

// storekeeper looks after CheckpointStores: it makes the store where there is none, says
// whether it can be reached and how full it is, has it opened by its latest key, and
// removes what is to go: by retention, orphans, and what nothing uses.
type storekeeper struct {
	client client.Client
	// live reads past the cache: what is not there decides on an end.
	live    client.Reader
	config  StoreConfig
	clock   clock.PassiveClock
	events  recorder
	metrics *Metrics
	log     *slog.Logger

	mu     sync.Mutex
	stores map[string]*holding
}

// holding is what is remembered of a store between two looks at it. Checkpoints in a store
// never change: each is read once.
type holding struct {
	id          string
	checkpoints map[store.ID]store.Checkpoint
	orphans     map[store.ID]time.Time // when each was first seen to be one
	unreadable  int
	began       time.Time // of the last sweep
}

func (r *storekeeper) setUp(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("checkpointstore").
		For(&checkpointv1alpha1.CheckpointStore{}, withPredicates(specChanges)).
		Watches(&checkpointv1alpha1.PodCheckpoint{}, ofStores()).
		WithOptions(ctrlcontroller.Options{MaxConcurrentReconciles: concurrency}).
		Complete(r)
}

// ofStores has a store counted again soon after a checkpoint in it has come or gone.
func ofStores() handler.EventHandler {
	type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]
	later := func(q queue, o client.Object) {
		if name := storeOf(o.(*checkpointv1alpha1.PodCheckpoint)); name != "" {
			q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: name}}, gather)
		}
	}
	return handler.Funcs{
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			if e.ObjectOld.(*checkpointv1alpha1.PodCheckpoint).IsReady() != e.ObjectNew.(*checkpointv1alpha1.PodCheckpoint).IsReady() {
				later(q, e.ObjectNew)
			}
		},
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q queue) { later(q, e.Object) },
	}
}

// storeOf names the store that a checkpoint is in, or is to be in; empty if in none.
func storeOf(c *checkpointv1alpha1.PodCheckpoint) string {
	if c.Status.Store != nil {
		return c.Status.Store.Name
	}
	return c.Spec.StoreName
}

func (r *storekeeper) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var object checkpointv1alpha1.CheckpointStore
	if err := r.client.Get(ctx, req.NamespacedName, &object); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.Name)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, fmt.Errorf("read CheckpointStore %s: %w", req.Name, err)
	}
	if object.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	before := object.DeepCopy()
	err := r.look(ctx, &object)
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err()
	}
	r.judge(&object, err)
	if err := r.write(ctx, before, &object); err != nil {
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return reconcile.Result{RequeueAfter: time.Second}, nil
		}
		return reconcile.Result{}, err
	}
	r.metrics.ofStore(&object)
	// Not all stores, and not all clusters with one store, at the same moment.
	return reconcile.Result{RequeueAfter: lookAtStore*3/4 + rand.N(lookAtStore/2)}, nil
}

// look reaches a store and does what is due. An error says that it cannot be used.
func (r *storekeeper) look(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) error {
	opening, cancel := context.WithTimeout(ctx, openStore)
	defer cancel()
	s, done, err := r.config.Open.Open(opening, object)
	if errors.Is(err, store.ErrMissing) {
		s, done, err = r.config.Open.Create(opening, object)
	}
	if err != nil {
		return err
	}
	defer done()
	cluster, err := r.cluster(opening)
	if err != nil {
		return err
	}
	object.Status.StoreID, object.Status.ClusterID = s.ID(), cluster
	rotated, err := r.config.Open.Rotate(opening, object, s)
	if err != nil {
		return err
	}
	if rotated {
		r.log.InfoContext(ctx, "store rotated", "store", object.Name)
		r.events.Eventf(object, nil, corev1.EventTypeNormal, checkpointv1alpha1.EventKeyRotated, "Rotate",
			"the last key in Secret %q opens the store now, and no other: what was taken out of it may be deleted", *object.Spec.EncryptionSecretName)
	}
	counting, stop := context.WithTimeout(ctx, countStore)
	defer stop()
	k, err := r.count(counting, s, object)
	if err != nil {
		return err
	}
	return r.keep(ctx, s, object, k)
}

// keep removes what is to go. What hinders it does not make the store unusable, and is
// told in an event.
func (r *storekeeper) keep(ctx context.Context, s *store.Store, object *checkpointv1alpha1.CheckpointStore, k *holding) error {
	if err := r.retire(ctx, object); err != nil {
		r.log.ErrorContext(ctx, "checkpoints not deleted by retention", "store", object.Name, "error", err)
	}
	now := r.clock.Now()
	if now.Sub(k.began) < r.config.Every || now.Sub(collected(object)) < r.config.Every {
		return nil
	}
	// A sweep that fails is not begun again at once, nor by every look.
	k.began = now
	sweeping, cancel := context.WithTimeout(ctx, sweepStore)
	defer cancel()
	err := r.deleteOrphans(sweeping, s, object, k)
	var c store.Collection
	if err == nil {
		c, err = s.Collect(sweeping, store.CollectOptions{Grace: r.config.Grace, Pause: r.config.Pause})
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	r.metrics.collected(object.Name, c, err)
	if err != nil {
		r.log.ErrorContext(ctx, "store not collected", "store", object.Name, "error", err)
		r.events.Eventf(object, nil, corev1.EventTypeWarning, checkpointv1alpha1.EventCollectionFailed, "Collect", "%s", clip(err.Error()))
		return nil
	}
	if c.Removed > 0 {
		r.log.InfoContext(ctx, "store collected", "store", object.Name, "removed", c.Removed, "removedBytes", c.RemovedBytes, "condemned", c.Condemned)
	}
	object.Status.StoredBytes = max(0, object.Status.StoredBytes-c.RemovedBytes)
	object.Status.Stored = quantity(object.Status.StoredBytes)
	object.Status.LastCollectionTime = &metav1.Time{Time: now.Truncate(time.Second)}
	return nil
}

func collected(object *checkpointv1alpha1.CheckpointStore) time.Time {
	if object.Status.LastCollectionTime == nil {
		return time.Time{}
	}
	return object.Status.LastCollectionTime.Time
}

// judge writes the condition.
func (r *storekeeper) judge(object *checkpointv1alpha1.CheckpointStore, err error) {
	condition := metav1.Condition{
		Type: checkpointv1alpha1.CheckpointStoreReady, Status: metav1.ConditionTrue, Reason: checkpointv1alpha1.ReasonStoreReady,
		ObservedGeneration: object.Generation, LastTransitionTime: metav1.NewTime(r.clock.Now()),
	}
	if err != nil {
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, stores.Reason(err), clip(err.Error())
		// Texts of libraries hold numbers of requests and times: they do not count as a change.
		if was := meta.FindStatusCondition(object.Status.Conditions, condition.Type); was != nil && was.Reason == condition.Reason && was.ObservedGeneration == condition.ObservedGeneration &&
			condition.Reason == checkpointv1alpha1.ReasonStoreUnreachable {
			return
		}
	}
	meta.SetStatusCondition(&object.Status.Conditions, condition)
}

// write writes the status where it has changed, and tells of what a condition became.
func (r *storekeeper) write(ctx context.Context, before, object *checkpointv1alpha1.CheckpointStore) error {
	if equality.Semantic.DeepEqual(before.Status, object.Status) {
		return nil
	}
	if err := r.client.Status().Patch(ctx, object, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("write status of CheckpointStore %s: %w", object.Name, err)
	}
	was, is := meta.FindStatusCondition(before.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady), meta.FindStatusCondition(object.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady)
	if was != nil && was.Status == is.Status && was.Reason == is.Reason {
		return nil
	}
	if is.Status == metav1.ConditionTrue {
		r.log.InfoContext(ctx, "store ready", "store", object.Name, "storeID", object.Status.StoreID)
		r.events.Eventf(object, nil, corev1.EventTypeNormal, is.Reason, "Open", "store %s can be used", object.Status.StoreID)
		return nil
	}
	r.log.WarnContext(ctx, "store cannot be used", "store", object.Name, "reason", is.Reason, "message", is.Message)
	r.events.Eventf(object, nil, corev1.EventTypeWarning, is.Reason, "Open", "%s", is.Message)
	return nil
}

func (r *storekeeper) forget(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.stores, name)
	r.metrics.forgetStore(name)
}

// remembered returns what is known of a store; nothing of one that was replaced.
func (r *storekeeper) remembered(name, id string) *holding {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.stores[name]
	if k == nil || k.id != id {
		k = &holding{id: id, checkpoints: map[store.ID]store.Checkpoint{}, orphans: map[store.ID]time.Time{}}
		if r.stores == nil {
			r.stores = map[string]*holding{}
		}
		r.stores[name] = k
	}
	return k
}
