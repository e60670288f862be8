package controller

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	vocabulary "podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/placement"
	"podstasis.dev/stasis/internal/platform"
)

// machine is a platform whose CPU has these features.
func machine(features ...string) *platform.Description {
	return &platform.Description{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPU: &vocabulary.CPU{Features: features},
		Engine: vocabulary.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1}
}

// lease is of a node's agent, which says what the node is; nil: nothing.
func lease(node string, is *platform.Description) *coordinationv1.Lease {
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "stasis-system", Name: agentapi.LeaseName(node)}}
	agentapi.Announcement{Node: node, Address: "10.0.0.1:9443", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version,
		Renewed: born, Duration: agentapi.LeaseDuration, Platform: is}.Fill(l)
	return l
}

// of is a Ready checkpoint that needs what a machine has.
func of(name string, d *platform.Description) *checkpointv1alpha1.PodCheckpoint {
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name}}
	c.Status.Requires = &checkpointv1alpha1.PlatformRequirements{OS: d.OS, Architecture: d.Architecture, Kernel: d.Kernel, CPUFeatures: d.CPU.Features,
		Engine: checkpointv1alpha1.EngineStatus{Name: d.Engine.Name, Version: d.Engine.Version}, FormatVersion: int32(d.FormatVersion)}
	return c
}

func onNode(name string, labels ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"disk": "ssd"}}}
	for _, l := range labels {
		n.Labels[l] = "true"
	}
	return n
}

// needing is a Pod on a node that requires a label there.
func needing(node, label string, phase corev1.PodPhase) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p"}, Status: corev1.PodStatus{Phase: phase},
		Spec: corev1.PodSpec{NodeName: node, Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: label, Operator: corev1.NodeSelectorOpExists}}}}}}}}}
}

func TestNodesAreLabelledWithWhatTheyCanRestore(t *testing.T) {
	small, large, gone := machine("avx"), machine("avx", "avx512f"), machine("avx", "old")
	s, l, g := placement.Label(*small), placement.Label(*large), placement.Label(*gone)
	foreign := checkpointv1alpha1.LabelRunsPrefix + "0123456789abcdef"
	old := lease("node", small)
	old.Annotations[agentapi.AnnotationProtocol] = "1"
	tests := map[string]struct {
		after   time.Duration // since agents were heard of
		objects []client.Object
		want    map[string]bool // labels of the node named "node"
	}{
		"its own class and lesser ones":         {0, []client.Object{onNode("node"), lease("node", large), lease("other", small)}, map[string]bool{s: true, l: true}},
		"not greater ones":                      {0, []client.Object{onNode("node"), lease("node", small), lease("other", large)}, map[string]bool{s: true}},
		"those of checkpoints of nodes gone":    {0, []client.Object{onNode("node"), lease("node", machine("avx", "old", "new")), of("c", gone)}, map[string]bool{g: true, placement.Label(*machine("avx", "old", "new")): true}},
		"none for an agent that is too old":     {0, []client.Object{onNode("node"), old}, nil},
		"none for one that says nothing":        {0, []client.Object{onNode("node"), lease("node", nil), lease("other", small)}, nil},
		"none without an agent":                 {0, []client.Object{onNode("node"), lease("other", small)}, nil},
		"what is not true any more goes":        {0, []client.Object{onNode("node", l, foreign), lease("node", small), lease("other", large)}, map[string]bool{s: true}},
		"but not while a Pod needs it":          {0, []client.Object{onNode("node", l, foreign), lease("node", small), lease("other", large), needing("node", l, corev1.PodRunning)}, map[string]bool{s: true, l: true}},
		"a Pod that is over needs nothing":      {0, []client.Object{onNode("node", l), lease("node", small), lease("other", large), needing("node", l, corev1.PodFailed)}, map[string]bool{s: true}},
		"a Pod elsewhere needs nothing here":    {0, []client.Object{onNode("node", l), lease("node", small), lease("other", large), needing("other", l, corev1.PodRunning)}, map[string]bool{s: true}},
		"an agent may be away for some minutes": {forsaken - time.Second, []client.Object{onNode("node", s), lease("node", small), of("c", small)}, map[string]bool{s: true}},
		"not for longer":                        {forsaken + time.Second, []client.Object{onNode("node", s), lease("node", small), of("c", small)}, nil},
		"unless a Pod needs it":                 {forsaken + time.Second, []client.Object{onNode("node", s), lease("node", small), of("c", small), needing("node", s, corev1.PodPending)}, map[string]bool{s: true}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			scheme := runtime.NewScheme()
			for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, checkpointv1alpha1.AddToScheme} {
				if err := add(scheme); err != nil {
					t.Fatal(err)
				}
			}
			c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(tc.objects...).
				WithIndex(&corev1.Pod{}, "spec.nodeName", func(o client.Object) []string { return []string{o.(*corev1.Pod).Spec.NodeName} }).Build()
			n := &nodeLabels{client: c, live: c, namespace: "stasis-system", clock: clocktesting.NewFakePassiveClock(born.Add(tc.after)), log: slog.New(slog.DiscardHandler)}
			for range 2 { // a second time changes nothing
				agents, err := placement.Agents(t.Context(), c, "stasis-system")
				if err != nil {
					t.Fatal(err)
				}
				if err := n.label(t.Context(), agents); err != nil {
					t.Fatal(err)
				}
				var node corev1.Node
				if err := c.Get(t.Context(), client.ObjectKey{Name: "node"}, &node); err != nil {
					t.Fatal(err)
				}
				want := map[string]string{"disk": "ssd"}
				for label := range tc.want {
					want[label] = "true"
				}
				if diff := cmp.Diff(want, node.Labels); diff != "" {
					t.Fatalf("labels (-want +got):\n%s", diff)
				}
			}
		})
	}
}
