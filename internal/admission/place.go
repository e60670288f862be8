package admission

import (
	"context"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/placement"
)

// placer prepares a restoring Pod at its creation: the runtime handler, the
// checkpoint's UID, the nodes, or a scheduling gate while the checkpoint is not
// Ready (P22). It decides nothing on who may do what: the authorizer does, which
// sees the final object.
//
// It may be called again for the same Pod, and then changes nothing.
type placer struct {
	reader  client.Reader
	decoder admission.Decoder
	whereabouts
}

func (p *placer) Handle(ctx context.Context, req admission.Request) admission.Response {
	var pod corev1.Pod
	if err := p.decoder.Decode(req, &pod); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	name, asked := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom]
	if !asked {
		return admission.Allowed("")
	}
	if err := checkName(&pod, name); err != nil {
		return deny(err)
	}
	checkpoint, err := find(ctx, p.reader, req.Namespace, name)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}

	placed := pod.DeepCopy()
	pin, pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]
	if placement.Obstacle(checkpoint, name) == "" {
		if pinned && pin != string(checkpoint.UID) {
			return forbid(&pod, "annotation %s is Stasis' to write, and PodCheckpoint %q has another UID; leave it out",
				checkpointv1alpha1.AnnotationRestoreFromUID, name)
		}
		where, err := p.of(ctx, checkpoint)
		if err != nil {
			return admission.Errored(http.StatusInternalServerError, err)
		}
		placement.Pin(placed, checkpoint, where)
	} else {
		if pinned {
			return forbid(&pod, "annotation %s is Stasis' to write; leave it out", checkpointv1alpha1.AnnotationRestoreFromUID)
		}
		if pod.Spec.NodeName != "" {
			return forbid(&pod, "spec.nodeName goes round the scheduler, which holds the Pod back while PodCheckpoint %q is not Ready; leave it out", name)
		}
		placement.Hold(placed)
	}
	setRuntimeClass(placed, checkpoint)
	return patch(&pod, placed)
}

// setRuntimeClass chooses the handler that restores, where the Pod names none or
// the one of its source. Another one was asked for on purpose and is left for the
// authorizer to refuse. The overhead goes with the class that brought it: the
// RuntimeClass admission plugin runs again and sets the new one's.
//
// Of a checkpoint that is not Ready the engine is not known, and a Pod's RuntimeClass
// cannot be changed later: it is CRIU's unless the Pod names another of Stasis'.
func setRuntimeClass(pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	class := pod.Spec.RuntimeClassName
	if class != nil && (placement.IsClass(*class) || !isClassOfSource(*class, checkpoint)) {
		return
	}
	if class != nil {
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, checkpointv1alpha1.AnnotationNamedRuntimeClass, *class)
	}
	restores := placement.ClassOf(checkpoint)
	pod.Spec.RuntimeClassName = &restores
	pod.Spec.Overhead = nil
}

// isClassOfSource says whether the source's manifest named a class. A source that was
// restored itself runs with one of Stasis'.
func isClassOfSource(class string, checkpoint *checkpointv1alpha1.PodCheckpoint) bool {
	if checkpoint == nil || checkpoint.Status.CheckpointedPodTemplate == nil {
		return false
	}
	source := checkpoint.Status.CheckpointedPodTemplate
	if ran := source.Spec.RuntimeClassName; ran == nil || !placement.IsClass(*ran) {
		return ran != nil && *ran == class
	}
	return source.Annotations[checkpointv1alpha1.AnnotationNamedRuntimeClass] == class
}
