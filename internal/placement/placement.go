// Package placement says where a Pod that is to be restored may run, and writes
// that into the Pod: admission does so where the checkpoint is Ready, the
// controller later where it was not.
package placement

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Obstacle says why nothing can be restored from a checkpoint now; empty if
// something can. The checkpoint is nil if there is none of that name.
func Obstacle(checkpoint *checkpointv1alpha1.PodCheckpoint, name string) string {
	if checkpoint == nil {
		return fmt.Sprintf("PodCheckpoint %q does not exist in this namespace", name)
	}
	if checkpoint.DeletionTimestamp != nil {
		return fmt.Sprintf("PodCheckpoint %q is being deleted", name)
	}
	ready := checkpoint.ReadyCondition()
	switch {
	case ready == nil:
		return fmt.Sprintf("PodCheckpoint %q is not Ready: nothing has acted on it yet", name)
	case ready.Status != metav1.ConditionTrue && checkpoint.IsTerminal():
		return fmt.Sprintf("PodCheckpoint %q is not Ready and will not be: it ended with %s: %s", name, ready.Reason, ready.Message)
	case ready.Status != metav1.ConditionTrue:
		return fmt.Sprintf("PodCheckpoint %q is not Ready: %s: %s", name, ready.Reason, ready.Message)
	case checkpoint.Status.NodeName == "" || checkpoint.UID == "":
		return fmt.Sprintf("PodCheckpoint %q is Ready but does not say where its data are", name)
	}
	return ""
}

// Pin ties a Pod to one checkpoint, by UID, and to the node that can restore it,
// and takes Stasis' scheduling gate off. It only tightens what the Pod asks for,
// which is all that the API server lets be done to a gated Pod.
func Pin(pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	if pod.Annotations == nil {
		pod.Annotations = make(map[string]string)
	}
	pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = string(checkpoint.UID)
	requireNode(pod, checkpoint.Status.NodeName)
	pod.Spec.SchedulingGates = slices.DeleteFunc(pod.Spec.SchedulingGates, isOurs)
	if len(pod.Spec.SchedulingGates) == 0 {
		pod.Spec.SchedulingGates = nil
	}
}

// Hold keeps a Pod from being scheduled until its checkpoint is Ready.
func Hold(pod *corev1.Pod) {
	if !Held(pod) {
		pod.Spec.SchedulingGates = append(pod.Spec.SchedulingGates, corev1.PodSchedulingGate{Name: checkpointv1alpha1.SchedulingGate})
	}
}

// Held says that the Pod carries Stasis' scheduling gate.
func Held(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.SchedulingGates, isOurs)
}

func isOurs(g corev1.PodSchedulingGate) bool { return g.Name == checkpointv1alpha1.SchedulingGate }

// requireNode adds a requirement of the node to each alternative of the required
// node affinity, or makes one. An alternative without requirements matches no
// node and may not be changed in a gated Pod.
func requireNode(pod *corev1.Pod, node string) {
	if pod.Spec.Affinity == nil {
		pod.Spec.Affinity = &corev1.Affinity{}
	}
	if pod.Spec.Affinity.NodeAffinity == nil {
		pod.Spec.Affinity.NodeAffinity = &corev1.NodeAffinity{}
	}
	affinity := pod.Spec.Affinity.NodeAffinity
	if affinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		affinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{only(node)}}},
		}
		return
	}
	terms := affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i := range terms {
		if !matchesNothing(terms[i]) && !slices.ContainsFunc(terms[i].MatchFields, isOnly(node)) {
			terms[i].MatchFields = append(terms[i].MatchFields, only(node))
		}
	}
}

// RequiresNode says that no other node can run the Pod.
func RequiresNode(pod *corev1.Pod, node string) bool {
	if pod.Spec.NodeName != "" {
		return pod.Spec.NodeName == node
	}
	if pod.Spec.Affinity == nil || pod.Spec.Affinity.NodeAffinity == nil ||
		pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	return !slices.ContainsFunc(terms, func(t corev1.NodeSelectorTerm) bool {
		return !matchesNothing(t) && !slices.ContainsFunc(t.MatchFields, isOnly(node))
	})
}

// Conflict says why the Pod, as it asks, cannot run on the node of that name;
// empty if it can. A node that does not exist is nil and judged by its name only:
// the Pod waits for it, as any Pod does.
func Conflict(pod *corev1.Pod, name string, node *corev1.Node) string {
	if pod.Spec.NodeName != "" && pod.Spec.NodeName != name {
		return fmt.Sprintf("spec.nodeName is %q, but the checkpoint is on node %q", pod.Spec.NodeName, name)
	}
	if node == nil {
		return ""
	}
	matches, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node)
	if err != nil {
		return fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity cannot be evaluated: %v", err)
	}
	if !matches {
		return fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity excludes node %q, which holds the checkpoint", name)
	}
	return ""
}

func only(node string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}
}

func isOnly(node string) func(corev1.NodeSelectorRequirement) bool {
	return func(r corev1.NodeSelectorRequirement) bool {
		return r.Key == metav1.ObjectNameField && r.Operator == corev1.NodeSelectorOpIn && len(r.Values) == 1 && r.Values[0] == node
	}
}

func matchesNothing(t corev1.NodeSelectorTerm) bool {
	return len(t.MatchExpressions)+len(t.MatchFields) == 0
}
