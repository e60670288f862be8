package placement

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func ready() *checkpointv1alpha1.PodCheckpoint {
	return &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Name: "c", UID: "u"},
		Status: checkpointv1alpha1.PodCheckpointStatus{NodeName: "node-1",
			Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "CheckpointCompleted"}}},
	}
}

func TestAnObstacleSaysWhatAPodWaitsFor(t *testing.T) {
	condition := func(status metav1.ConditionStatus, reason, message string) func(*checkpointv1alpha1.PodCheckpoint) {
		return func(c *checkpointv1alpha1.PodCheckpoint) {
			c.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: status, Reason: reason, Message: message}}
		}
	}
	tests := map[string]struct {
		change func(*checkpointv1alpha1.PodCheckpoint)
		want   string
	}{
		"none when it is Ready":    {func(*checkpointv1alpha1.PodCheckpoint) {}, ""},
		"in progress":              {condition("False", "CheckpointInProgress", "capturing"), `PodCheckpoint "c" is not Ready: CheckpointInProgress: capturing`},
		"not taken up":             {func(c *checkpointv1alpha1.PodCheckpoint) { c.Status.Conditions = nil }, `PodCheckpoint "c" is not Ready: nothing has acted on it yet`},
		"unknown is not Ready":     {condition("Unknown", "X", "m"), `PodCheckpoint "c" is not Ready: X: m`},
		"failed":                   {condition("False", "CheckpointFailed", "no space"), `PodCheckpoint "c" is not Ready and will not be: it ended with CheckpointFailed: no space`},
		"being deleted":            {func(c *checkpointv1alpha1.PodCheckpoint) { c.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, `PodCheckpoint "c" is being deleted`},
		"Ready, but on no node":    {func(c *checkpointv1alpha1.PodCheckpoint) { c.Status.NodeName = "" }, `PodCheckpoint "c" is Ready but does not say where its data are`},
		"Ready, but without a UID": {func(c *checkpointv1alpha1.PodCheckpoint) { c.UID = "" }, `PodCheckpoint "c" is Ready but does not say where its data are`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := ready()
			tc.change(c)
			if got := Obstacle(c, "c"); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
	if got, want := Obstacle(nil, "c"), `PodCheckpoint "c" does not exist in this namespace`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func expression(key string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: key, Operator: corev1.NodeSelectorOpExists}
}

func required(terms ...corev1.NodeSelectorTerm) *corev1.Affinity {
	return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}}
}

func TestPinningTightensEveryAlternativeAndNothingElse(t *testing.T) {
	tests := map[string]struct{ asked, want *corev1.Affinity }{
		"no affinity": {nil, required(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}})},
		"alternatives": {
			required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}},
				corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
			),
			required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}, MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}},
				corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2"), only("node-1")}},
			),
		},
		"an alternative that matches nothing stays so": {
			required(corev1.NodeSelectorTerm{}, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}}),
			required(corev1.NodeSelectorTerm{}, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}, MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}}),
		},
		"preferences stay": {
			&corev1.Affinity{PodAffinity: &corev1.PodAffinity{}, NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 1}}}},
			&corev1.Affinity{PodAffinity: &corev1.PodAffinity{}, NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 1}},
				RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}}}}}},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{Affinity: tc.asked, SchedulingGates: []corev1.PodSchedulingGate{{Name: "other"}}}}
			Hold(pod)
			if RequiresNode(pod, "node-1") {
				t.Error("tied to the node before it is pinned")
			}
			Pin(pod, ready())
			if diff := cmp.Diff(tc.want, pod.Spec.Affinity); diff != "" {
				t.Errorf("affinity (-want +got):\n%s", diff)
			}
			if !RequiresNode(pod, "node-1") || RequiresNode(pod, "node-2") && name != "alternatives" {
				t.Error("not tied to the node")
			}
			if Held(pod) || len(pod.Spec.SchedulingGates) != 1 {
				t.Errorf("gates %v", pod.Spec.SchedulingGates)
			}
			if pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] != "u" {
				t.Errorf("annotations %v", pod.Annotations)
			}
			again := pod.DeepCopy()
			Pin(again, ready())
			if diff := cmp.Diff(pod, again); diff != "" {
				t.Errorf("a second time changed it:\n%s", diff)
			}
		})
	}
}

func TestHoldingTwiceHoldsOnce(t *testing.T) {
	pod := &corev1.Pod{}
	Hold(pod)
	Hold(pod)
	if len(pod.Spec.SchedulingGates) != 1 || !Held(pod) {
		t.Errorf("gates %v", pod.Spec.SchedulingGates)
	}
}

func TestAPodThatCannotRunWhereItsCheckpointIsConflicts(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{"kubernetes.io/hostname": "host-1", "disk": "ssd"}}}
	tests := map[string]struct {
		spec     corev1.PodSpec
		conflict bool
	}{
		"nothing asked":                     {corev1.PodSpec{}, false},
		"the node by name":                  {corev1.PodSpec{NodeName: "node-1"}, false},
		"another by name":                   {corev1.PodSpec{NodeName: "node-2"}, true},
		"the node's host name, not its own": {corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/hostname": "host-1"}}, false},
		"another host name":                 {corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/hostname": "node-1"}}, true},
		"a label that it has":               {corev1.PodSpec{NodeSelector: map[string]string{"disk": "ssd"}}, false},
		"a label that it lacks":             {corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}, true},
		"affinity to another":               {corev1.PodSpec{Affinity: required(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}})}, true},
		"affinity to it or another": {corev1.PodSpec{Affinity: required(
			corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
			corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}})}, false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := Conflict(&corev1.Pod{Spec: tc.spec}, "node-1", node); (got != "") != tc.conflict {
				t.Errorf("conflict: %q", got)
			}
		})
	}
	if Conflict(&corev1.Pod{Spec: corev1.PodSpec{NodeName: "node-2"}}, "node-1", nil) == "" {
		t.Error("another node's name does not conflict when the node is gone")
	}
	if got := Conflict(&corev1.Pod{Spec: corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}}, "node-1", nil); got != "" {
		t.Errorf("labels of a node that is gone conflict: %s", got)
	}
}
