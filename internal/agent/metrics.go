package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"podstasis.dev/stasis/internal/checkpoint"
)

// Values of the label "result".
const (
	resultSuccess = "success"
	resultFailure = "failure"
)

// Values of the label "operation_type".
const (
	operationCheckpoint  = "checkpoint_pod"
	operationRestore     = "restore_pod"
	operationFindSandbox = "find_sandbox"
)

// Metrics are the agent's, by KEP-5823's names with the prefix stasis_ (P31).
// None has the name of an object as a label.
type Metrics struct {
	checkpoints        *prometheus.CounterVec
	checkpointDuration *prometheus.HistogramVec
	checkpointSize     prometheus.Histogram
	checkpointFreeze   *prometheus.HistogramVec
	restores           *prometheus.CounterVec
	restoreDuration    prometheus.Histogram
	runtimeErrors      *prometheus.CounterVec
	fetchedBytes       prometheus.Counter
	fetchDuration      *prometheus.HistogramVec
}

// NewMetrics makes the agent's metrics and registers them.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		checkpoints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stasis_pod_checkpoint_operations_total",
			Help: "PodCheckpoints that ended on this node, by result.",
		}, []string{"result"}),
		checkpointDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "stasis_pod_checkpoint_duration_seconds",
			Help:    "Time from taking a PodCheckpoint up to its outcome.",
			Buckets: prometheus.ExponentialBuckets(0.1, 2, 12), // 0.1 s to 205 s
		}, []string{"result"}),
		checkpointSize: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "stasis_pod_checkpoint_size_bytes",
			Help:    "Logical size of completed checkpoints.",
			Buckets: prometheus.ExponentialBuckets(1<<20, 4, 10), // 1 MiB to 256 GiB
		}),
		checkpointFreeze: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "stasis_pod_checkpoint_freeze_seconds",
			Help:    "How long the processes of a Pod stood still for its checkpoint, by the way in which its memory was captured; empty where the engine has one only.",
			Buckets: prometheus.ExponentialBuckets(0.025, 2, 12), // 25 ms to 51 s
		}, []string{"capture"}),
		restores: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stasis_pod_restore_operations_total",
			Help: "Restores of Pods on this node, by result. A refused sandbox counts each time that it is tried.",
		}, []string{"result"}),
		restoreDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "stasis_pod_restore_duration_seconds",
			Help:    "Time from the sandbox of a restoring Pod to its last container's start.",
			Buckets: prometheus.ExponentialBuckets(0.1, 2, 12),
		}),
		runtimeErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stasis_runtime_operations_errors_total",
			Help: "Operations of the container runtime or of the engine that failed, by operation. A refused restore never came so far.",
		}, []string{"operation_type"}),
		fetchedBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "stasis_checkpoint_fetched_bytes_total",
			Help: "Bytes of checkpoints that came from other nodes, also those that came more than once.",
		}),
		fetchDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "stasis_checkpoint_fetch_duration_seconds",
			Help:    "Time from the first question for a checkpoint of another node until it is here, or has been given up for now.",
			Buckets: prometheus.ExponentialBuckets(0.1, 3, 10), // 0.1 s to 33 min
		}, []string{"result"}),
	}
	registry.MustRegister(m.checkpoints, m.checkpointDuration, m.checkpointSize, m.checkpointFreeze,
		m.restores, m.restoreDuration, m.runtimeErrors, m.fetchedBytes, m.fetchDuration)
	// Every series is there from the start: a rate over one that begins with its
	// first failure would not show that failure.
	for _, result := range []string{resultSuccess, resultFailure} {
		m.checkpoints.WithLabelValues(result)
		m.restores.WithLabelValues(result)
		m.fetchDuration.WithLabelValues(result)
	}
	for _, operation := range []string{operationCheckpoint, operationRestore, operationFindSandbox} {
		m.runtimeErrors.WithLabelValues(operation)
	}
	return m
}

func (m *Metrics) checkpointFailed(took time.Duration) {
	m.checkpoints.WithLabelValues(resultFailure).Inc()
	m.checkpointDuration.WithLabelValues(resultFailure).Observe(took.Seconds())
}

func (m *Metrics) checkpointSucceeded(took time.Duration, taken *checkpoint.Manifest) {
	m.checkpoints.WithLabelValues(resultSuccess).Inc()
	m.checkpointDuration.WithLabelValues(resultSuccess).Observe(took.Seconds())
	m.checkpointSize.Observe(float64(taken.LogicalBytes()))
	m.checkpointFreeze.WithLabelValues(mode(taken.Capture)).Observe(taken.FreezeDuration.Seconds())
	for _, f := range taken.EarlierFreezes {
		m.checkpointFreeze.WithLabelValues(mode(taken.Capture)).Observe(f.Duration.Seconds())
	}
}

// mode is an engine's word for the way in which memory is captured; empty if it has one only.
func mode(c *checkpoint.Capture) string {
	if c == nil {
		return ""
	}
	return c.Mode
}
