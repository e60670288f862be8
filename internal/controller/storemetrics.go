package controller

import (
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/api/meta"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
)

// storeMetrics tell of CheckpointStores. The replica that reconciles has them.
type storeMetrics struct {
	ready, checkpoints, logical, stored, capacity *prometheus.GaugeVec
	ofNamespace                                   *prometheus.GaugeVec
	collections, removed, retired                 *prometheus.CounterVec
}

func newStoreMetrics() storeMetrics {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "stasis_store_" + name, Help: help}, append([]string{"store"}, labels...))
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stasis_store_" + name, Help: help}, append([]string{"store"}, labels...))
	}
	return storeMetrics{
		ready:       gauge("ready", "Whether the CheckpointStore can be used: 1 or 0."),
		checkpoints: gauge("checkpoints", "Checkpoints in the store, with those of other clusters."),
		logical:     gauge("logical_bytes", "What the checkpoints in the store would take without it."),
		stored:      gauge("stored_bytes", "What the store takes."),
		capacity:    gauge("capacity_bytes", "The capacity of the CheckpointStore, where it has one."),
		ofNamespace: gauge("namespace_stored_bytes", "What the store grew by when checkpoints of this cluster's namespace were written that it still holds.", "namespace"),
		collections: counter("collections_total", "Looks for what no checkpoint uses, by their result: ok or error.", "result"),
		removed:     counter("collected_bytes_total", "Bytes that were removed because no checkpoint used them."),
		retired:     counter("retention_deletions_total", "PodCheckpoints that were deleted by the store's retention."),
	}
}

func (m *storeMetrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.ready, m.checkpoints, m.logical, m.stored, m.capacity, m.ofNamespace, m.collections, m.removed, m.retired}
}

// ofStore shows what the status of a store says.
func (m *Metrics) ofStore(object *checkpointv1alpha1.CheckpointStore) {
	ready := 0.0
	if meta.IsStatusConditionTrue(object.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady) {
		ready = 1
	}
	m.stores.ready.WithLabelValues(object.Name).Set(ready)
	m.stores.checkpoints.WithLabelValues(object.Name).Set(float64(object.Status.Checkpoints))
	m.stores.logical.WithLabelValues(object.Name).Set(float64(object.Status.LogicalBytes))
	m.stores.stored.WithLabelValues(object.Name).Set(float64(object.Status.StoredBytes))
	m.stores.capacity.DeleteLabelValues(object.Name)
	if c := object.Spec.Capacity; c != nil {
		m.stores.capacity.WithLabelValues(object.Name).Set(c.AsApproximateFloat64())
	}
	m.stores.ofNamespace.DeletePartialMatch(prometheus.Labels{"store": object.Name})
	for _, of := range object.Status.Namespaces {
		m.stores.ofNamespace.WithLabelValues(object.Name, of.Name).Set(float64(of.StoredBytes))
	}
}

// collected counts a look for what nothing uses.
func (m *Metrics) collected(name string, c store.Collection, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.stores.collections.WithLabelValues(name, result).Inc()
	m.stores.removed.WithLabelValues(name).Add(float64(c.RemovedBytes))
}

// retired counts a PodCheckpoint that retention deleted.
func (m *Metrics) retired(name string) { m.stores.retired.WithLabelValues(name).Inc() }

// forgetStore drops what is told of a store that is gone.
func (m *Metrics) forgetStore(name string) {
	for _, c := range m.stores.all() {
		switch vec := c.(type) {
		case *prometheus.GaugeVec:
			vec.DeletePartialMatch(prometheus.Labels{"store": name})
		case *prometheus.CounterVec:
			vec.DeletePartialMatch(prometheus.Labels{"store": name})
		}
	}
}
