package control

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// hooked makes a Pod with hooks on a node.
func hooked(t *testing.T, namespace, node string, annotations map[string]string) *corev1.Pod {
	t.Helper()
	pod := sample[corev1.Pod](t, "pod.yaml")
	pod.Namespace, pod.Annotations = namespace, annotations
	must(t, shared.client.Create(t.Context(), pod))
	must(t, shared.client.SubResource("binding").Create(t.Context(), pod, &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: pod.Name}, Target: corev1.ObjectReference{Kind: "Node", Name: node},
	}))
	return pod
}

// X7: who may write a Pod's metadata may not run commands in it.
func TestHooksComeWithAPodAndCannotBeAddedOrChangedLater(t *testing.T) {
	ns := namespace(t)
	node, _ := node(t)
	pod := hooked(t, ns, node, map[string]string{checkpointv1alpha1.AnnotationPreCheckpoint: "as it was", checkpointv1alpha1.AnnotationPostRestore: "too"})
	patch := func(sub, annotation string, value any) error {
		body, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{annotation: value}}})
		must(t, err)
		target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: pod.Name}}
		if sub != "" {
			return shared.client.SubResource(sub).Patch(t.Context(), target, client.RawPatch(types.StrategicMergePatchType, body))
		}
		return shared.client.Patch(t.Context(), target, client.RawPatch(types.StrategicMergePatchType, body))
	}
	for _, sub := range []string{"", "status"} {
		for _, annotation := range []string{checkpointv1alpha1.AnnotationPreCheckpoint, checkpointv1alpha1.AnnotationPostCheckpoint, checkpointv1alpha1.AnnotationPostRestore} {
			if err := patch(sub, annotation, "another"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "cannot be added or changed after a Pod's creation") {
				t.Errorf("%s set through pods/%s: %v", annotation, sub, err)
			}
		}
	}
	must(t, patch("", "example.com/other", "x"))
	must(t, patch("", checkpointv1alpha1.AnnotationPreCheckpoint, nil))
	must(t, patch("", "example.com/other", "y"))
	if err := patch("", checkpointv1alpha1.AnnotationPreCheckpoint, "as it was"); !apierrors.IsForbidden(err) {
		t.Errorf("one that was taken off put back: %v", err)
	}
}

func TestAHookThatCannotBeRunIsRefusedWithACheckpointAndWithARestore(t *testing.T) {
	ns := namespace(t)
	node, agent := node(t)
	bad := hooked(t, ns, node, map[string]string{checkpointv1alpha1.AnnotationPreCheckpoint: `{"container":"absent","exec":{"command":["x"]}}`})
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c"}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: bad.Name}}
	err := shared.client.Create(t.Context(), c)
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `asks for hooks that cannot be run: annotation checkpoint.podstasis.dev/pre-checkpoint: hook 1: the Pod has no container "absent"`) {
		t.Errorf("a PodCheckpoint of a Pod with a wrong hook: %v", err)
	}

	other := namespace(t)
	completed(t, other, "c", node, agent)
	restored := sample[corev1.Pod](t, "pod.yaml")
	restored.Namespace, restored.Name = other, "restored"
	restored.Annotations = map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: "c", checkpointv1alpha1.AnnotationPostRestore: `{"container":"a","run":"x"}`}
	if err := shared.client.Create(t.Context(), restored); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `unknown field "run"`) {
		t.Errorf("a restoring Pod with a wrong hook: %v", err)
	}
}

func TestADryRunTellsWhatTheNodeFoundAndStoresNothing(t *testing.T) {
	ns := namespace(t)
	node, _ := node(t)
	pod := source(t, ns, node)
	grant(t, ns, "pre", subresources.ResourceCheckpoint, "create")
	answers := `{"problems":["it uses io_uring"],"warnings":["it talks"],"estimatedSize":{"logical":"1Mi","logicalBytes":1048576},"freezeBudget":"2s"}`
	serve(t, node, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.URL.Path != agentapi.PreflightPath {
			t.Errorf("the agent is asked for %s %s", r.Method, r.URL)
		}
		var asked checkpointv1alpha1.PodCheckpoint
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || asked.Namespace != ns || asked.Spec.SourcePodName != pod.Name || asked.Spec.NodeName != node || asked.Spec.Containers[0] != "a" {
			t.Errorf("the agent is asked about %+v, %v", asked, err)
		}
		if answers == "" {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, answers)
	})
	spec := subresources.PodCheckpointRequestSpec{Containers: []string{"a"}}
	got, err := ask(t, "pre", ns, pod.Name, spec, "dryRun", "All")
	must(t, err)
	if p := got.Status.Preflight; p == nil || p.Problems[0] != "it uses io_uring" || p.Warnings[0] != "it talks" || p.EstimatedSize.LogicalBytes != 1<<20 || p.FreezeBudget.Duration.String() != "2s" {
		t.Errorf("the answer is %+v", got.Status.Preflight)
	}
	if got.Status.NodeName != node {
		t.Errorf("the node is %q", got.Status.NodeName)
	}
	for text, says := range map[string]string{"": "is too old to be asked for that", "[1]": "read the answer of the stasis-agent", strings.Repeat(" ", 1<<20+1): "answers with more than"} {
		answers = text
		got, err := ask(t, "pre", ns, pod.Name, spec, "dryRun", "All")
		must(t, err)
		if p := got.Status.Preflight; p == nil || !strings.Contains(p.Unavailable, says) || len(p.Problems) > 0 {
			t.Errorf("%.10q is answered by %+v, want %q", text, p, says)
		}
	}
	if _, err := ask(t, "nobody", ns, pod.Name, spec, "dryRun", "All"); !apierrors.IsForbidden(err) {
		t.Errorf("a user without the right: %v", err)
	}
	var list checkpointv1alpha1.PodCheckpointList
	must(t, shared.client.List(t.Context(), &list, client.InNamespace(ns)))
	if len(list.Items) > 0 {
		t.Errorf("a dry run stored %d PodCheckpoints", len(list.Items))
	}
}
