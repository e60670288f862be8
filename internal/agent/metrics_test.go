package agent

import (
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
)

func TestCountersAreThereBeforeAnythingHappens(t *testing.T) {
	registry := prometheus.NewRegistry()
	NewMetrics(registry)
	want := `
# HELP stasis_pod_checkpoint_operations_total PodCheckpoints that ended on this node, by result.
# TYPE stasis_pod_checkpoint_operations_total counter
stasis_pod_checkpoint_operations_total{result="failure"} 0
stasis_pod_checkpoint_operations_total{result="success"} 0
# HELP stasis_pod_restore_operations_total Restores of Pods on this node, by result. A refused sandbox counts each time that it is tried.
# TYPE stasis_pod_restore_operations_total counter
stasis_pod_restore_operations_total{result="failure"} 0
stasis_pod_restore_operations_total{result="success"} 0
# HELP stasis_runtime_operations_errors_total Operations of the container runtime or of the engine that failed, by operation. A refused restore never came so far.
# TYPE stasis_runtime_operations_errors_total counter
stasis_runtime_operations_errors_total{operation_type="checkpoint_pod"} 0
stasis_runtime_operations_errors_total{operation_type="find_sandbox"} 0
stasis_runtime_operations_errors_total{operation_type="restore_pod"} 0
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "stasis_pod_checkpoint_operations_total",
		"stasis_pod_restore_operations_total", "stasis_runtime_operations_errors_total"); err != nil {
		t.Error(err)
	}
}

func TestACheckpointIsMeasuredByItsOutcome(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := NewMetrics(registry)
	m.checkpointSucceeded(2*time.Second, &checkpoint.Manifest{
		FreezeDuration: 175 * time.Millisecond, EarlierFreezes: []checkpoint.EarlierFreeze{{Duration: 125 * time.Millisecond, Reason: "an exec began"}}, Capture: &checkpoint.Capture{Mode: "cow"}, Files: []checkpoint.File{{Size: 5 << 20}},
	})
	m.checkpointFailed(time.Second)
	for _, result := range []string{resultSuccess, resultFailure} {
		if n := testutil.ToFloat64(m.checkpoints.WithLabelValues(result)); n != 1 {
			t.Errorf("%v of result %s counted", n, result)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]float64{}
	for _, f := range families {
		for _, series := range f.GetMetric() {
			if f.GetName() == "stasis_pod_checkpoint_freeze_seconds" && series.GetLabel()[0].GetValue() != "cow" {
				t.Errorf("the freeze is told of as %v", series.GetLabel())
			}
			if h := series.GetHistogram(); h != nil {
				sums[f.GetName()] += h.GetSampleSum()
			}
		}
	}
	for name, want := range map[string]float64{
		"stasis_pod_checkpoint_duration_seconds": 3, // both outcomes
		"stasis_pod_checkpoint_freeze_seconds":   0.3,
		"stasis_pod_checkpoint_size_bytes":       5 << 20,
	} {
		if sums[name] != want {
			t.Errorf("%s adds up to %v, want %v", name, sums[name], want)
		}
	}
}

func TestARestoreThatIsRefusedAndOneThatFailsAreToldApart(t *testing.T) {
	h := newHarness(t)
	m := NewMetrics(prometheus.NewRegistry())
	o := &observer{store: h.store, metrics: m, log: slog.New(slog.NewTextHandler(io.Discard, nil)), now: time.Now}
	failures, errors := m.restores.WithLabelValues(resultFailure), m.runtimeErrors.WithLabelValues(operationRestore)
	o.Refused(t.Context(), restoringSandbox(), deny(v1alpha1.EventCheckpointWrongNode, "it is elsewhere"))
	if f, e := testutil.ToFloat64(failures), testutil.ToFloat64(errors); f != 1 || e != 0 {
		t.Errorf("after a refusal: %v failures, %v errors of the runtime", f, e)
	}
	o.Failed(t.Context(), restoringSandbox(), "a", deny(v1alpha1.EventRestoreFailed, "criu: no such pid"))
	if f, e := testutil.ToFloat64(failures), testutil.ToFloat64(errors); f != 2 || e != 1 {
		t.Errorf("after a failure: %v failures, %v errors of the runtime", f, e)
	}
	o.Failed(t.Context(), restoringSandbox(), "a", deny(v1alpha1.EventCheckpointDataCorrupt, "pages-1.img"))
	if f, e := testutil.ToFloat64(failures), testutil.ToFloat64(errors); f != 3 || e != 1 {
		t.Errorf("after one over data: %v failures, %v errors of the runtime", f, e)
	}
}
