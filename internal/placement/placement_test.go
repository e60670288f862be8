package placement

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/platform"
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

var now = time.Date(2026, 11, 27, 0, 0, 0, 0, time.UTC)

// agent says of a node that its CPU has these features.
func agent(node string, features ...string) agentapi.Announcement {
	return agentapi.Announcement{Node: node, Protocol: agentapi.Version, Renewed: now, Duration: agentapi.LeaseDuration,
		Platform: &platform.Description{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPU: &checkpoint.CPU{Features: features},
			Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1}}
}

func agents(all ...agentapi.Announcement) map[string]agentapi.Announcement {
	by := map[string]agentapi.Announcement{}
	for _, a := range all {
		by[a.Node] = a
	}
	return by
}

// needs is a Ready checkpoint on node-1 that needs CPU features.
func needs(features ...string) *checkpointv1alpha1.PodCheckpoint {
	c := ready()
	c.Status.Requires = &checkpointv1alpha1.PlatformRequirements{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPUFeatures: features,
		Engine: checkpointv1alpha1.EngineStatus{Name: "criu", Version: "4.2"}, FormatVersion: 1}
	return c
}

// anywhere is where the checkpoint of needs("avx") can be restored: node-1 and node-2.
func anywhere() Where {
	return Find(needs("avx"), agents(agent("node-1", "avx"), agent("node-2", "avx", "avx2"), agent("node-3")), now)
}

func TestACheckpointGoesWhereItCanRunOrStaysWhereItIs(t *testing.T) {
	old := agent("node-1", "avx")
	old.Protocol = agentapi.VersionCalls
	silent := agent("node-1", "avx")
	silent.Renewed = now.Add(-time.Hour)
	bound := needs("avx")
	bound.Status.CheckpointedPodTemplate = &corev1.PodTemplateSpec{Spec: corev1.PodSpec{Volumes: []corev1.Volume{
		{Name: "data", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/data"}}}}}}
	stored := needs("avx")
	stored.Status.Store = &checkpointv1alpha1.StoredCheckpoint{Name: "s"}
	for name, tc := range map[string]struct {
		checkpoint *checkpointv1alpha1.PodCheckpoint
		agents     map[string]agentapi.Announcement
		others     []string
		alone      string // words
	}{
		"nodes that have what it needs":      {needs("avx"), agents(agent("node-1", "avx"), agent("node-2", "avx", "avx2"), agent("node-3")), []string{"node-2"}, ""},
		"it says nothing of what it needs":   {ready(), agents(agent("node-1", "avx"), agent("node-2", "avx")), nil, "does not say"},
		"what it needs makes no sense":       {needs(""), agents(agent("node-1", "avx"), agent("node-2", "avx")), nil, "does not say"},
		"it has files of its node":           {bound, agents(agent("node-1", "avx"), agent("node-2", "avx")), nil, "its volume data is a directory of that node"},
		"its holder is gone":                 {needs("avx"), agents(agent("node-2", "avx")), nil, "not heard of"},
		"its holder is silent":               {needs("avx"), agents(silent, agent("node-2", "avx")), nil, "not heard of"},
		"its holder is gone, a store has it": {stored, agents(agent("node-2", "avx"), agent("node-3")), []string{"node-2"}, ""},
		"its holder's agent is old":          {needs("avx"), agents(old, agent("node-2", "avx")), nil, "too old"},
		"its holder is another machine":      {needs("avx"), agents(agent("node-1"), agent("node-2", "avx")), nil, "it lacks the CPU feature avx"},
	} {
		t.Run(name, func(t *testing.T) {
			w := Find(tc.checkpoint, tc.agents, now)
			if diff := cmp.Diff(tc.others, w.Others()); diff != "" {
				t.Errorf("others (-want +got):\n%s", diff)
			}
			if (tc.alone == "") != (w.Alone == "") || !strings.Contains(w.Alone, tc.alone) {
				t.Errorf("alone: %q", w.Alone)
			}
			if w.Obstacle("node-1") != "" {
				t.Errorf("not where it is: %s", w.Obstacle("node-1"))
			}
		})
	}
}

func TestWhyANodeCannotIsNamed(t *testing.T) {
	gone := agent("gone", "avx")
	gone.Renewed = now.Add(-time.Hour)
	old := agent("old", "avx")
	old.Protocol = agentapi.VersionCalls
	mute := agent("mute")
	mute.Platform = nil
	w := Find(needs("avx", "avx512f"), agents(agent("node-1", "avx", "avx512f"), agent("node-2", "avx"), gone, old, mute), now)
	for node, want := range map[string]string{
		"node-2": `node "node-2" lacks the CPU feature avx512f`,
		"gone":   `no stasis-agent is heard of on node "gone"`,
		"bare":   `no stasis-agent is heard of on node "bare"`,
		"old":    `the stasis-agent of node "old" is too old to fetch checkpoints`,
		"mute":   `the stasis-agent of node "mute" is too old to fetch checkpoints`,
	} {
		if got := w.Obstacle(node); got != want {
			t.Errorf("%s: %s", node, got)
		}
	}
}

func TestPinningTightensEveryAlternativeAndNothingElse(t *testing.T) {
	here := Find(ready(), nil, now)
	there := anywhere()
	label := expression(there.label)
	first := []corev1.PreferredSchedulingTerm{{Weight: 100, Preference: corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}}}}
	with := func(a *corev1.Affinity, preferred ...corev1.PreferredSchedulingTerm) *corev1.Affinity {
		a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution = preferred
		return a
	}
	own := corev1.PreferredSchedulingTerm{Weight: 1}
	tests := map[string]struct {
		where       Where
		asked, want *corev1.Affinity
	}{
		"one node, no affinity": {here, nil, required(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}})},
		"one node, alternatives": {
			here,
			required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}},
				corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
			),
			required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}, MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}},
				corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2"), only("node-1")}},
			),
		},
		"one node, an alternative that matches nothing stays so": {
			here,
			required(corev1.NodeSelectorTerm{}, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}}),
			required(corev1.NodeSelectorTerm{}, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}, MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}}),
		},
		"one node, preferences stay": {
			here,
			&corev1.Affinity{PodAffinity: &corev1.PodAffinity{}, NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{own}}},
			&corev1.Affinity{PodAffinity: &corev1.PodAffinity{}, NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{own},
				RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}}}}}},
		},
		"several nodes, no affinity": {there, nil, with(required(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{label}}), first...)},
		"several nodes, alternatives": {
			there,
			required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}},
				corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
				corev1.NodeSelectorTerm{},
			),
			with(required(
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a"), label}},
				corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{label}, MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
				corev1.NodeSelectorTerm{},
			), first...),
		},
		"several nodes, preferences stay": {
			there,
			&corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{own}}},
			with(required(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{label}}), own, first[0]),
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{Affinity: tc.asked, SchedulingGates: []corev1.PodSchedulingGate{{Name: "other"}}}}
			Hold(pod)
			if Tied(pod, tc.where) {
				t.Error("tied before it is pinned")
			}
			Pin(pod, needs("avx"), tc.where)
			if diff := cmp.Diff(tc.want, pod.Spec.Affinity); diff != "" {
				t.Errorf("affinity (-want +got):\n%s", diff)
			}
			if !Tied(pod, tc.where) {
				t.Error("not tied")
			}
			if Held(pod) || len(pod.Spec.SchedulingGates) != 1 {
				t.Errorf("gates %v", pod.Spec.SchedulingGates)
			}
			if pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] != "u" {
				t.Errorf("annotations %v", pod.Annotations)
			}
			again := pod.DeepCopy()
			Pin(again, needs("avx"), tc.where)
			if diff := cmp.Diff(pod, again); diff != "" {
				t.Errorf("a second time changed it:\n%s", diff)
			}
		})
	}
}

func TestAPodThatIsOnlyTiedToWhatCannotRunItIsNotTied(t *testing.T) {
	there := anywhere()
	for name, affinity := range map[string]*corev1.Affinity{
		"nothing":                  nil,
		"another class":            required(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression(checkpointv1alpha1.LabelRunsPrefix + "0123456789abcdef")}}),
		"another node":             required(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}}),
		"one alternative is loose": required(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression(there.label)}}, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression("a")}}),
	} {
		if Tied(&corev1.Pod{Spec: corev1.PodSpec{Affinity: affinity}}, there) {
			t.Errorf("%s: tied", name)
		}
	}
	if Tied(&corev1.Pod{Spec: corev1.PodSpec{NodeName: "node-3"}}, there) || !Tied(&corev1.Pod{Spec: corev1.PodSpec{NodeName: "node-2"}}, there) {
		t.Error("spec.nodeName is not judged by whether that node can")
	}
	if silent := Find(needs("avx"), nil, now); !Tied(&corev1.Pod{Spec: corev1.PodSpec{Affinity: required(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{expression(there.label)}})}}, silent) {
		t.Error("the agents' silence unties a Pod")
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

// cluster is of nodes.
type cluster []*corev1.Node

func (c cluster) Node(_ context.Context, name string) (*corev1.Node, error) {
	for _, n := range c {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, nil
}

func (c cluster) Nodes(context.Context) (all []corev1.Node, _ error) {
	for _, n := range c {
		all = append(all, *n)
	}
	return all, nil
}

func machine(name string, labels map[string]string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func TestAPodThatCannotRunWhereItsCheckpointCanBeRestoredConflicts(t *testing.T) {
	nodes := cluster{
		machine("node-1", map[string]string{"kubernetes.io/hostname": "host-1", "disk": "ssd"}),
		machine("node-2", map[string]string{"disk": "tape"}),
		machine("node-3", map[string]string{"disk": "paper"}),
	}
	fields := func(name string) *corev1.Affinity {
		return required(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only(name)}})
	}
	here, there := Find(ready(), nil, now), anywhere()
	pinned := &corev1.Pod{Spec: corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}}
	Pin(pinned, needs("avx"), there)
	tests := map[string]struct {
		where Where
		spec  corev1.PodSpec
		words string // empty: no conflict
	}{
		"one node, nothing asked":                       {here, corev1.PodSpec{}, ""},
		"one node, by name":                             {here, corev1.PodSpec{NodeName: "node-1"}, ""},
		"one node, another by name":                     {here, corev1.PodSpec{NodeName: "node-2"}, `spec.nodeName is "node-2", and PodCheckpoint "c" cannot be restored there: only node "node-1" can`},
		"one node, its host name, which is not its own": {here, corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/hostname": "host-1"}}, ""},
		"one node, another host name":                   {here, corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/hostname": "node-1"}}, `excludes node "node-1"`},
		"one node, a label that it has":                 {here, corev1.PodSpec{NodeSelector: map[string]string{"disk": "ssd"}}, ""},
		"one node, a label that it lacks":               {here, corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}, "it can be restored nowhere else"},
		"one node, affinity to another":                 {here, corev1.PodSpec{Affinity: fields("node-2")}, `excludes node "node-1"`},
		"one node, affinity to it or another": {here, corev1.PodSpec{Affinity: required(
			corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-2")}},
			corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only("node-1")}})}, ""},
		"several nodes, nothing asked":                        {there, corev1.PodSpec{}, ""},
		"several nodes, one by name":                          {there, corev1.PodSpec{NodeName: "node-2"}, ""},
		"several nodes, a lesser one by name":                 {there, corev1.PodSpec{NodeName: "node-3"}, `cannot be restored there: node "node-3" lacks the CPU feature avx`},
		"several nodes, a name with a label that it lacks":    {there, corev1.PodSpec{NodeName: "node-2", NodeSelector: map[string]string{"disk": "ssd"}}, `excludes node "node-2", which spec.nodeName names`},
		"several nodes, a label of another that can":          {there, corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}, ""},
		"several nodes, affinity to another that can":         {there, corev1.PodSpec{Affinity: fields("node-2")}, ""},
		"several nodes, a label of one that cannot":           {there, corev1.PodSpec{NodeSelector: map[string]string{"disk": "paper"}}, `all others that can restore it: node "node-3" lacks the CPU feature avx`},
		"several nodes, a label that none has":                {there, corev1.PodSpec{NodeSelector: map[string]string{"disk": "stone"}}, "and all others that can restore it"},
		"several nodes, pinned before the nodes are labelled": {there, pinned.Spec, ""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := Conflict(t.Context(), &corev1.Pod{Spec: tc.spec}, ready(), tc.where, nodes)
			if err != nil || (got != "") != (tc.words != "") || !strings.Contains(got, tc.words) {
				t.Errorf("conflict: %q, %v", got, err)
			}
		})
	}
	if got, err := Conflict(t.Context(), &corev1.Pod{Spec: corev1.PodSpec{NodeName: "node-2"}}, ready(), here, cluster{}); got == "" || err != nil {
		t.Errorf("another node's name does not conflict when the node is gone: %v", err)
	}
	if got, err := Conflict(t.Context(), &corev1.Pod{Spec: corev1.PodSpec{NodeSelector: map[string]string{"disk": "tape"}}}, ready(), here, cluster{}); got != "" || err != nil {
		t.Errorf("labels of a node that is gone conflict: %s, %v", got, err)
	}
}
