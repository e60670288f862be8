package control

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestAPodThatIsBeingCheckpointedTakesNoEphemeralContainerAndIsNotResized(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := sample[corev1.Pod](t, "pod.yaml")
	pod.Namespace, pod.Spec.NodeName = ns, on
	pod.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}
	must(t, shared.client.Create(t.Context(), pod))
	eve := user(t, ns, "eve", "stasis-admin")

	condition := func(patch string) {
		t.Helper()
		must(t, agent.Status().Patch(t.Context(), pod.DeepCopy(), client.RawPatch(types.StrategicMergePatchType, []byte(patch))))
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod))
	}
	set := func(status string) {
		t.Helper()
		condition(`{"status":{"conditions":[{"type":"` + checkpointv1alpha1.PodConditionCheckpointing + `","status":"` + status + `","message":"PodCheckpoint c"}]}}`)
	}
	debug := func(c client.Client) error {
		changed := pod.DeepCopy()
		changed.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "debug", Image: "i", TerminationMessagePolicy: corev1.TerminationMessageReadFile, ImagePullPolicy: corev1.PullNever}}}
		return c.SubResource("ephemeralcontainers").Update(t.Context(), changed, client.DryRunAll)
	}
	resize := func(c client.Client) error {
		changed := pod.DeepCopy()
		changed.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("11m")}
		return c.SubResource("resize").Update(t.Context(), changed, client.DryRunAll)
	}

	for name, c := range map[string]client.Client{"a user": eve, "an administrator": shared.client} {
		t.Run(name, func(t *testing.T) {
			set("True")
			refused(t, debug(c), apierrors.IsForbidden, "being checkpointed takes no ephemeral container", "Checkpointing is gone (PodCheckpoint c)")
			refused(t, resize(c), apierrors.IsForbidden, "being checkpointed is not resized", "Checkpointing is gone (PodCheckpoint c)")
			set("False")
			must(t, debug(c))
			condition(`{"status":{"conditions":[{"$patch":"delete","type":"` + checkpointv1alpha1.PodConditionCheckpointing + `"}]}}`)
			must(t, debug(c))
			must(t, resize(c))
		})
	}
	t.Run("what the kubelet and others write of its status goes on", func(t *testing.T) {
		set("True")
		must(t, shared.client.Status().Patch(t.Context(), pod.DeepCopy(), client.RawPatch(types.StrategicMergePatchType,
			[]byte(`{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`))))
		must(t, eve.Patch(t.Context(), pod.DeepCopy(), client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`))))
		must(t, eve.Delete(t.Context(), pod.DeepCopy(), client.DryRunAll))
	})
}
