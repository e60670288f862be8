package kubectl

import (
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// workloadLabels are labels by which a workload controller knows its Pods. A
// restored Pod is nobody's: with them a ReplicaSet or a Job would take it over,
// count it as one too many and delete it.
var workloadLabels = []string{
	"pod-template-hash",
	"pod-template-generation",
	"controller-revision-hash",
	"controller-uid",
	"job-name",
	"batch.kubernetes.io/controller-uid",
	"batch.kubernetes.io/job-name",
	"batch.kubernetes.io/job-completion-index",
	"statefulset.kubernetes.io/pod-name",
	"apps.kubernetes.io/pod-index",
}

// restoredPod is the Pod to create in order to restore checkpoint: the Pod that
// was checkpointed, by another name. An empty name leaves the choice to the API
// server, which appends a random suffix to the checkpoint's name.
func restoredPod(checkpoint *checkpointv1alpha1.PodCheckpoint, name string) (*corev1.Pod, error) {
	template := checkpoint.Status.CheckpointedPodTemplate
	if template == nil {
		return nil, fmt.Errorf("podcheckpoint %s is ready but holds no Pod template: it was not made by Stasis", checkpoint.Name)
	}
	if len(checkpoint.Spec.Containers) > 0 {
		return nil, fmt.Errorf("podcheckpoint %s holds some containers of pod %s only and cannot be restored",
			checkpoint.Name, checkpoint.Spec.SourcePodName)
	}
	pod := &corev1.Pod{}
	pod.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
	pod.Namespace = checkpoint.Namespace
	pod.Name = name
	if name == "" {
		pod.GenerateName = checkpoint.Name + "-"
	}
	pod.Labels = maps.Clone(template.Labels)
	for _, label := range workloadLabels {
		delete(pod.Labels, label)
	}
	pod.Annotations = maps.Clone(template.Annotations)
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	// Left over where the source was itself a restored Pod; admission pins anew.
	delete(pod.Annotations, checkpointv1alpha1.AnnotationRestoreFromUID)
	delete(pod.Annotations, checkpointv1alpha1.AnnotationRestoreTicket)
	pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] = checkpoint.Name

	pod.Spec = *template.Spec.DeepCopy()
	pod.Spec.NodeName = ""
	pod.Spec.SchedulingGates = nil
	pod.Spec.EphemeralContainers = nil // cannot be created with a Pod
	// Admission chooses the runtime class; with the source's, its overhead would
	// have to match too.
	pod.Spec.RuntimeClassName = nil
	pod.Spec.Overhead = nil
	return pod, nil
}
