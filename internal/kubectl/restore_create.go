package kubectl

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// canRunOn refuses a node that a checkpoint cannot be restored on because it says
// nothing of what it needs. Otherwise admission knows what the node lacks.
func canRunOn(checkpoint *checkpointv1alpha1.PodCheckpoint, node string) error {
	source := checkpoint.Status.CheckpointLocation
	if node == "" || checkpoint.Status.Requires != nil || source == nil || source.NodeLocal == nil || node == checkpoint.Status.NodeName {
		return nil
	}
	return fmt.Errorf("podcheckpoint %s cannot be restored on node %s: its data are on the disk of %s, and it does not say what CPU and kernel it needs; bring them there with kubectl checkpoint download and kubectl checkpoint import --node %s",
		checkpoint.Name, node, checkpoint.Status.NodeName, node)
}

// onNode makes the scheduler place pod on a node, beside whatever else it asks for.
func onNode(pod *corev1.Pod, node string) {
	if pod.Spec.Affinity == nil {
		pod.Spec.Affinity = &corev1.Affinity{}
	}
	if pod.Spec.Affinity.NodeAffinity == nil {
		pod.Spec.Affinity.NodeAffinity = &corev1.NodeAffinity{}
	}
	affinity := pod.Spec.Affinity.NodeAffinity
	if affinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		affinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}
	}
	// Terms are alternatives: each must name the node.
	terms := affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i := range terms {
		terms[i].MatchFields = append(terms[i].MatchFields, corev1.NodeSelectorRequirement{
			Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{node},
		})
	}
}

// create makes the Pods. With an error it returns those that it has made.
func (o *restoreOptions) create(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) ([]*corev1.Pod, error) {
	template, err := restoredPod(checkpoint, o.as)
	if err != nil {
		return nil, err
	}
	if o.node != "" {
		onNode(template, o.node)
	}
	base := or(o.as, checkpoint.Name)
	if most := validation.DNS1123SubdomainMaxLength - len("-1000"); o.replicas > 1 && len(base) > most {
		return nil, usagef("the name %q is too long to number copies of it: --as gives them another", base)
	}
	var pods []*corev1.Pod
	for number := 1; len(pods) < o.replicas; number++ {
		pod := template.DeepCopy()
		if o.replicas > 1 {
			pod.GenerateName, pod.Name = "", fmt.Sprintf("%s-%d", base, number)
		}
		err := o.createOne(ctx, pod)
		if apierrors.IsAlreadyExists(err) && o.replicas > 1 && o.as == "" && number < 2*maxReplicas {
			continue // an earlier copy has this number
		}
		if err != nil {
			return pods, err
		}
		pods = append(pods, pod)
	}
	return pods, nil
}

func (o *restoreOptions) createOne(ctx context.Context, pod *corev1.Pod) error {
	if *o.dryRun == dryRunClient {
		return nil
	}
	return o.client.Create(ctx, pod, o.dryRun.createOptions()...)
}
