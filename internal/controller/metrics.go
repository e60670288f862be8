package controller

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Metrics are the controller's, by KEP-5823's names with the prefix stasis_ (P31).
// No label holds an object's name, but for those of stores: a cluster has few of these,
// and of their namespaces no more are told than a status tells.
type Metrics struct {
	conditions *prometheus.CounterVec
	reconciles prometheus.Histogram
	stores     storeMetrics
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(registry prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		conditions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stasis_podcheckpoint_ready_condition_total",
			Help: "Changes of the Ready condition of PodCheckpoints that were seen, by the new status and reason.",
		}, []string{"status", "reason"}),
		reconciles: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "stasis_podcheckpoint_reconcile_duration_seconds",
			Help:    "How long the controller looked at a PodCheckpoint.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 8), // 1 ms to 16 s
		}),
		stores: newStoreMetrics(),
	}
	for _, c := range append(m.stores.all(), m.conditions, m.reconciles) {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// counting lets every event through and counts the changes of the Ready
// condition among them. What a list brings at the start is not a change.
func (m *Metrics) counting() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, _ := e.ObjectOld.(*checkpointv1alpha1.PodCheckpoint)
		after, _ := e.ObjectNew.(*checkpointv1alpha1.PodCheckpoint)
		if before == nil || after == nil {
			return true
		}
		was, is := before.ReadyCondition(), after.ReadyCondition()
		if is != nil && (was == nil || was.Status != is.Status || was.Reason != is.Reason) {
			m.conditions.WithLabelValues(string(is.Status), known(is.Reason)).Inc()
		}
		return true
	}}
}

// known keeps the reasons of the API as labels, and no others.
func known(reason string) string {
	switch reason {
	case checkpointv1alpha1.ReasonPending, checkpointv1alpha1.ReasonCheckpointInProgress, checkpointv1alpha1.ReasonCheckpointCompleted,
		checkpointv1alpha1.ReasonCheckpointFailed, checkpointv1alpha1.ReasonSourcePodReplaced:
		return reason
	}
	return "Other"
}

// timed measures a reconciler.
func (m *Metrics) timed(clock clock.PassiveClock, r reconcile.Reconciler) reconcile.Reconciler {
	return reconcile.Func(func(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
		defer func(began time.Time) { m.reconciles.Observe(clock.Since(began).Seconds()) }(clock.Now())
		return r.Reconcile(ctx, req)
	})
}
