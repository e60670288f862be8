package controller

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

var born = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func checkpoint(node string) *checkpointv1alpha1.PodCheckpoint {
	timeout := int32(10)
	return &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c", CreationTimestamp: metav1.NewTime(born)},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "p", NodeName: node, TimeoutSeconds: &timeout},
	}
}

func nodeThat(ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
}

func agentThat(ready corev1.ConditionStatus) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "stasis-agent-x"},
		Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}}}
}

func TestACheckpointIsEndedOnlyWhenNobodyWillActOnIt(t *testing.T) {
	started := metav1.NewTime(born.Add(5 * time.Second))
	tests := map[string]struct {
		facts   facts
		started bool
		age     time.Duration
		reason  string // empty: left alone
		message string
		again   time.Duration
	}{
		"an agent at hand":                      {facts{node: nodeThat("True"), agent: agentThat("True")}, false, time.Second, "", "", 69 * time.Second},
		"an agent at work":                      {facts{node: nodeThat("True"), agent: agentThat("True")}, true, 6 * time.Second, "", "", 69 * time.Second},
		"an agent that is slow":                 {facts{node: nodeThat("True"), agent: agentThat("True")}, true, time.Hour, "", "", time.Minute},
		"no node yet seen missing for long":     {facts{}, false, time.Second, "", "", 29 * time.Second},
		"no node":                               {facts{}, false, time.Minute, "CheckpointFailed", `node "node-1", which ran Pod "p", no longer exists`, 0},
		"no node, at work":                      {facts{}, true, time.Minute, "CheckpointFailed", `node "node-1", which ran Pod "p", no longer exists`, 0},
		"no agent for a moment":                 {facts{node: nodeThat("True")}, false, time.Second, "Pending", `no stasis-agent runs on node "node-1" yet`, 29 * time.Second},
		"no agent":                              {facts{node: nodeThat("True")}, false, time.Minute, "CheckpointFailed", `no stasis-agent runs on node "node-1"`, 0},
		"an agent replaced while at work":       {facts{node: nodeThat("True")}, true, time.Minute, "", "", 15 * time.Second},
		"an agent gone while at work":           {facts{node: nodeThat("True")}, true, 2 * time.Minute, "CheckpointFailed", `no stasis-agent runs on node "node-1", and nothing was heard of this checkpoint for its timeout of 10s and 1m0s more`, 0},
		"an agent that starts":                  {facts{node: nodeThat("True"), agent: agentThat("False")}, false, time.Second, "Pending", `stasis-agent "stasis-agent-x" on node "node-1" is not Ready`, 69 * time.Second},
		"an agent that never starts":            {facts{node: nodeThat("True"), agent: agentThat("False")}, false, 70 * time.Second, "CheckpointFailed", "is not Ready, and nothing was heard", 0},
		"a node that is away":                   {facts{node: nodeThat("Unknown"), agent: agentThat("True")}, true, 20 * time.Second, "", "", 55 * time.Second},
		"a node that stays away":                {facts{node: nodeThat("Unknown"), agent: agentThat("True")}, true, 75 * time.Second, "CheckpointFailed", `node "node-1" is not Ready, and nothing was heard`, 0},
		"a node whose state nobody has told of": {facts{node: &corev1.Node{}, agent: agentThat("True")}, false, time.Second, "Pending", `node "node-1" is not Ready`, 69 * time.Second},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := checkpoint("node-1")
			if tc.started {
				c.Status.StartTime = &started
			}
			got := judge(c, tc.facts, born.Add(tc.age))
			if got.reason != tc.reason || !strings.Contains(got.message, tc.message) || got.again != tc.again {
				t.Errorf("got  %q: %s (again in %s)\nwant %q: %s (again in %s)", got.reason, got.message, got.again, tc.reason, tc.message, tc.again)
			}
		})
	}
}

func TestACheckpointWithoutANodeEndsAtOnceAndSaysWhy(t *testing.T) {
	pod := func(node string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "live"}, Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodPending}}
	}
	other := types.UID("other")
	tests := map[string]struct {
		source  *corev1.Pod
		uid     *types.UID
		reason  string
		message string
	}{
		"no Pod":           {nil, nil, "CheckpointFailed", `Pod "p" does not exist in this namespace`},
		"no Pod, with UID": {nil, &other, "CheckpointFailed", `Pod "p" does not exist in this namespace`},
		"not scheduled":    {pod(""), nil, "CheckpointFailed", `Pod "p" is not scheduled to a node (phase Pending)`},
		"scheduled since":  {pod("node-2"), nil, "CheckpointFailed", `Pod "p" was not there or not scheduled when this PodCheckpoint was created; it runs on node "node-2" now: create another PodCheckpoint`},
		"replaced":         {pod(""), &other, "SourcePodReplaced", `Pod "p" has UID live, and not other as asked for`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := checkpoint("")
			c.Spec.SourcePodUID = tc.uid
			got := judge(c, facts{source: tc.source}, born)
			if got.reason != tc.reason || got.message != tc.message {
				t.Errorf("got %q: %s", got.reason, got.message)
			}
		})
	}
}
