package controller

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestChangesOfTheReadyConditionAreCounted(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	with := func(status metav1.ConditionStatus, reason, message string) *checkpointv1alpha1.PodCheckpoint {
		c := checkpoint("node-1")
		c.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: status, Reason: reason, Message: message}}
		return c
	}
	for _, e := range []event.UpdateEvent{
		{ObjectOld: checkpoint("node-1"), ObjectNew: with("False", "CheckpointInProgress", "")},
		{ObjectOld: with("False", "CheckpointInProgress", ""), ObjectNew: with("False", "CheckpointInProgress", "another message")},
		{ObjectOld: with("False", "CheckpointInProgress", ""), ObjectNew: with("True", "CheckpointCompleted", "")},
		{ObjectOld: checkpoint("node-1"), ObjectNew: with("False", "SomebodysName", "")},
	} {
		if !m.counting().Update(e) {
			t.Error("an event was held back")
		}
	}
	if !m.counting().Create(event.CreateEvent{Object: with("True", "CheckpointCompleted", "")}) {
		t.Error("a creation was held back")
	}
	want := `
# HELP stasis_podcheckpoint_ready_condition_total Changes of the Ready condition of PodCheckpoints that were seen, by the new status and reason.
# TYPE stasis_podcheckpoint_ready_condition_total counter
stasis_podcheckpoint_ready_condition_total{reason="CheckpointCompleted",status="True"} 1
stasis_podcheckpoint_ready_condition_total{reason="CheckpointInProgress",status="False"} 1
stasis_podcheckpoint_ready_condition_total{reason="Other",status="False"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "stasis_podcheckpoint_ready_condition_total"); err != nil {
		t.Error(err)
	}
}
