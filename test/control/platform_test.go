package control

import (
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	vocabulary "podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/placement"
	"podstasis.dev/stasis/internal/platform"
)

// machineOf is a platform whose CPU has features. The kernel keeps the classes of one
// test apart from those of others.
func machineOf(t *testing.T, features ...string) *platform.Description {
	return &platform.Description{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPU: &vocabulary.CPU{Features: append([]string{"of-" + t.Name()[:8]}, features...)},
		Engine: vocabulary.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1}
}

// nodeThatIs makes a node whose agent says what it is, and waits until it has the
// labels of what it can restore.
func nodeThatIs(t *testing.T, d *platform.Description) (string, client.Client) {
	t.Helper()
	name, agent := node(t)
	announce(t, agent, agentapi.Announcement{Node: name, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Renewed: unattended(), Platform: d})
	hasLabel(t, name, placement.Label(*d), true)
	return name, agent
}

func hasLabel(t *testing.T, node, label string, want bool) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		var n corev1.Node
		if err := shared.client.Get(t.Context(), client.ObjectKey{Name: node}, &n); err != nil {
			return err
		}
		if _, has := n.Labels[label]; has != want {
			return fmt.Errorf("node %s has labels %v; want %s: %v", node, n.Labels, label, want)
		}
		return nil
	}))
}

func requires(d *platform.Description) *checkpointv1alpha1.PlatformRequirements {
	return &checkpointv1alpha1.PlatformRequirements{OS: d.OS, Architecture: d.Architecture, Kernel: d.Kernel, CPUFeatures: d.CPU.Features,
		Engine: checkpointv1alpha1.EngineStatus{Name: d.Engine.Name, Version: d.Engine.Version}, FormatVersion: int32(d.FormatVersion)}
}

// readyThatRequires makes a Ready checkpoint "c" on a node that is of a platform.
func readyThatRequires(t *testing.T, d *platform.Description) (ns, on string, c *checkpointv1alpha1.PodCheckpoint) {
	t.Helper()
	ns = namespace(t)
	on, agent := nodeThatIs(t, d)
	pod := source(t, ns, on)
	c = checkpoint(t, ns, "c", pod.Name)
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
			return err
		}
		c.Status = readyStatus(pod)
		c.Status.Requires = requires(d)
		return agent.Status().Update(t.Context(), c)
	}))
	return ns, on, c
}

// X1: the label of the checkpoint's class is required, the node that holds the data
// preferred.
func TestARestoredPodMayGoToAnyNodeThatCanRunItAndToNoOther(t *testing.T) {
	small, large := machineOf(t, "avx"), machineOf(t, "avx", "avx512f")
	ns, on, c := readyThatRequires(t, large)
	twin, _ := nodeThatIs(t, large)
	lesser, _ := nodeThatIs(t, small)
	label := placement.Label(*large)
	hasLabel(t, twin, label, true)
	hasLabel(t, twin, placement.Label(*small), true) // the greater runs what ran on the lesser
	hasLabel(t, lesser, label, false)

	pod := restoring(t, ns, "anywhere", "c")
	must(t, shared.client.Create(t.Context(), pod))
	affinity := pod.Spec.Affinity.NodeAffinity
	terms := affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if len(terms) != 1 || len(terms[0].MatchFields) != 0 || len(terms[0].MatchExpressions) != 1 || terms[0].MatchExpressions[0].Key != label {
		t.Errorf("required affinity %+v", terms)
	}
	preferred := affinity.PreferredDuringSchedulingIgnoredDuringExecution
	if len(preferred) != 1 || preferred[0].Preference.MatchFields[0].Values[0] != on {
		t.Errorf("preferred affinity %+v", preferred)
	}

	for name, tc := range map[string]struct {
		change func(*corev1.Pod)
		words  string // empty: allowed
	}{
		"a node that can, by name":    {func(p *corev1.Pod) { p.Spec.NodeName = twin }, ""},
		"the one that holds the data": {func(p *corev1.Pod) { p.Spec.NodeName = on }, ""},
		"a node that can, by a label": {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: twin} }, ""},
		"a node that lacks a feature": {func(p *corev1.Pod) { p.Spec.NodeName = lesser }, fmt.Sprintf("node %q lacks the CPU feature avx512f", lesser)},
		"the same, by a label":        {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: lesser} }, fmt.Sprintf("node %q lacks the CPU feature avx512f", lesser)},
		"a node without an agent":     {func(p *corev1.Pod) { p.Spec.NodeName = "elsewhere" }, `no stasis-agent is heard of on node "elsewhere"`},
		"a label that no node has":    {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: "elsewhere"} }, "all others that can restore it"},
		"a name with another's label": {func(p *corev1.Pod) {
			p.Spec.NodeName, p.Spec.NodeSelector = twin, map[string]string{corev1.LabelHostname: on}
		}, "which spec.nodeName names"},
		"a pin that the user made up": {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = "x" }, "is Stasis' to write"},
		"the pin that it gets anyhow": {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = string(c.UID) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			pod := restoring(t, ns, "", "c")
			pod.GenerateName = "r-"
			tc.change(pod)
			err := shared.client.Create(t.Context(), pod)
			if tc.words == "" {
				must(t, err)
				return
			}
			refused(t, err, apierrors.IsForbidden, tc.words)
		})
	}
}

func TestAPodThatWaitedIsLetGoToAnyNodeThatCanRunIt(t *testing.T) {
	ns := namespace(t)
	d := machineOf(t, "avx")
	on, agent := nodeThatIs(t, d)
	from := source(t, ns, on)
	pod := restoring(t, ns, "early", "later")
	pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: "Exists"}}}}}}}
	must(t, shared.client.Create(t.Context(), pod))
	c := checkpoint(t, ns, "later", from.Name)
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
			return err
		}
		c.Status = readyStatus(from)
		c.Status.Requires = requires(d)
		return agent.Status().Update(t.Context(), c)
	}))
	must(t, eventually(t.Context(), func() error {
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod))
		if len(pod.Spec.SchedulingGates) > 0 {
			return errors.New("still held back")
		}
		return nil
	}))
	affinity := pod.Spec.Affinity.NodeAffinity
	terms := affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if len(terms) != 1 || len(terms[0].MatchExpressions) != 2 || terms[0].MatchExpressions[1].Key != placement.Label(*d) {
		t.Errorf("required affinity %+v", terms)
	}
	if preferred := affinity.PreferredDuringSchedulingIgnoredDuringExecution; len(preferred) != 1 || preferred[0].Preference.MatchFields[0].Values[0] != on {
		t.Errorf("preferred affinity %+v", preferred)
	}
}

func TestACheckpointStaysWithItsNodeWhoseAgentIsGone(t *testing.T) {
	d := machineOf(t, "avx")
	ns, on, _ := readyThatRequires(t, d)
	twin, _ := nodeThatIs(t, d)
	announce(t, agentOf(t, on), agentapi.Announcement{Node: on, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Renewed: unattended(), Platform: nil})
	pod := restoring(t, ns, "tied", "c")
	must(t, shared.client.Create(t.Context(), pod))
	if f := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchFields; len(f) != 1 || f[0].Values[0] != on {
		t.Errorf("affinity %+v", pod.Spec.Affinity.NodeAffinity)
	}
	other := restoring(t, ns, "other", "c")
	other.Spec.NodeName = twin
	refused(t, shared.client.Create(t.Context(), other), apierrors.IsForbidden, fmt.Sprintf("only node %q can", on))
}

// P33: the kubelet would end the Pod at its next start.
func TestANodeKeepsTheLabelThatAPodThereRequires(t *testing.T) {
	d, less := machineOf(t, "avx", "avx512f"), machineOf(t, "avx")
	ns, on, _ := readyThatRequires(t, d)
	twin, agent := nodeThatIs(t, d)
	third, _ := nodeThatIs(t, d)
	pod := restoring(t, ns, "there", "c")
	must(t, shared.client.Create(t.Context(), pod))
	must(t, shared.client.SubResource("binding").Create(t.Context(), pod, &corev1.Binding{Target: corev1.ObjectReference{Kind: "Node", Name: twin}}))
	is := func(node string, a client.Client, d *platform.Description) {
		announce(t, a, agentapi.Announcement{Node: node, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Renewed: unattended(), Platform: d})
	}
	is(twin, agent, less)
	is(third, agentOf(t, third), less)
	hasLabel(t, third, placement.Label(*d), false)
	hasLabel(t, twin, placement.Label(*less), true)
	hasLabel(t, twin, placement.Label(*d), true)
	hasLabel(t, on, placement.Label(*d), true)
}

func TestTheControllerWritesNothingOfNodesButItsLabels(t *testing.T) {
	on, _ := node(t)
	config := rest.CopyConfig(shared.admin)
	config.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:stasis-system:stasis-controller",
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:stasis-system", "system:authenticated"}}
	controller, err := client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	patch := func(text string) error {
		return controller.Patch(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: on}}, client.RawPatch(types.MergePatchType, []byte(text)))
	}
	must(t, patch(`{"metadata":{"labels":{"runs.checkpoint.podstasis.dev/0123456789abcdef":"true"}}}`))
	must(t, patch(`{"metadata":{"labels":{"runs.checkpoint.podstasis.dev/0123456789abcdef":null}}}`))
	for name, text := range map[string]string{
		"another label":       `{"metadata":{"labels":{"disk":"ssd"}}}`,
		"an empty one":        `{"metadata":{"labels":{"disk":""}}}`,
		"a label taken off":   `{"metadata":{"labels":{"kubernetes.io/hostname":null}}}`,
		"a label changed":     `{"metadata":{"labels":{"kubernetes.io/hostname":"other"}}}`,
		"an annotation":       `{"metadata":{"annotations":{"a":"b"}}}`,
		"a finalizer":         `{"metadata":{"finalizers":["a/b"]}}`,
		"a taint":             `{"spec":{"taints":[{"key":"a","effect":"NoSchedule"}]}}`,
		"whether it is ready": `{"spec":{"unschedulable":true}}`,
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, patch(text), apierrors.IsForbidden, "stasis-controller")
		})
	}
}
