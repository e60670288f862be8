// Package podtemplate makes the record of a source Pod that a checkpoint keeps
// (P4) and compares a Pod that is to be restored with that record (P21).
//
// Admission and the agent use the same comparison: what one admits the other
// does not refuse.
package podtemplate

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// FromPod returns the template of a Pod as its node has allocated it: labels,
// annotations, owner references and spec, without what is local to the node or
// to this instance of the Pod (P4). The Pod is not changed.
//
// Owner references are a record only: whoever makes a Pod of the template leaves
// them out, or the owner would adopt that Pod.
func FromPod(pod *corev1.Pod) *corev1.PodTemplateSpec {
	spec := pod.Spec.DeepCopy()
	allocate(spec, pod)
	dropNodeNames(spec)
	// What cannot be asked for at a Pod's creation is not part of a template.
	spec.EphemeralContainers = nil
	spec.SchedulingGates = nil
	return &corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{
			Labels:          maps.Clone(pod.Labels),
			Annotations:     ownAnnotations(pod.Annotations),
			OwnerReferences: append([]metav1.OwnerReference(nil), pod.OwnerReferences...),
		},
		Spec: *spec,
	}
}

// ownAnnotations leaves out those that speak of how this instance came to be:
// the manifest that kubectl applied, and the restore that the source may itself
// have been made by.
func ownAnnotations(all map[string]string) map[string]string {
	own := maps.Clone(all)
	for _, name := range []string{
		corev1.LastAppliedConfigAnnotation,
		checkpointv1alpha1.AnnotationRestoreFrom,
		checkpointv1alpha1.AnnotationRestoreFromUID,
		checkpointv1alpha1.AnnotationRestoreTicket,
	} {
		delete(own, name)
	}
	if len(own) == 0 {
		return nil
	}
	return own
}

// allocate replaces desired resources by allocated ones. They differ while an
// in-place resize has not been granted, or not yet been carried out.
//
// Requests come from allocatedResources, which the kubelet copies from the
// allocated spec. Limits are only reported as read back from cgroups, rounded by
// the kernel, so they are believed only while a resize is known to be open: at
// any other time desired and allocated are the same.
func allocate(spec *corev1.PodSpec, pod *corev1.Pod) {
	open := resizeOpen(pod)
	statuses := func(all []corev1.ContainerStatus, containers []corev1.Container) {
		byName := make(map[string]*corev1.ContainerStatus, len(all))
		for i := range all {
			byName[all[i].Name] = &all[i]
		}
		for i := range containers {
			status, seen := byName[containers[i].Name]
			if !seen {
				continue
			}
			resources := &containers[i].Resources
			override(resources.Requests, status.AllocatedResources)
			if open && status.Resources != nil {
				override(resources.Limits, status.Resources.Limits)
			}
		}
	}
	statuses(pod.Status.InitContainerStatuses, spec.InitContainers)
	statuses(pod.Status.ContainerStatuses, spec.Containers)

	if open && spec.Resources != nil {
		override(spec.Resources.Requests, without(pod.Status.AllocatedResources, spec.Overhead))
		if pod.Status.Resources != nil {
			override(spec.Resources.Limits, pod.Status.Resources.Limits)
		}
	}
}

// resizeOpen says that desired resources are not, or may not be, what is running.
func resizeOpen(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress {
			return true
		}
	}
	desired := make(map[string]corev1.ResourceList)
	for _, containers := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range containers {
			desired[c.Name] = c.Resources.Requests
		}
	}
	for _, statuses := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, s := range statuses {
			for name, allocated := range s.AllocatedResources {
				if want, asked := desired[s.Name][name]; asked && want.Cmp(allocated) != 0 {
					return true
				}
			}
		}
	}
	return false
}

// override replaces what list names and actual knows better. A resize adds and
// removes no entries.
func override(list, actual corev1.ResourceList) {
	for name, want := range list {
		if is, known := actual[name]; known && is.Cmp(want) != 0 {
			list[name] = is.DeepCopy()
		}
	}
}

// without subtracts the overhead that the kubelet counts in at the Pod's level.
func without(total, overhead corev1.ResourceList) corev1.ResourceList {
	net := make(corev1.ResourceList, len(total))
	for name, amount := range total {
		q := amount.DeepCopy()
		q.Sub(quantity(overhead, name))
		net[name] = q
	}
	return net
}

func quantity(list corev1.ResourceList, name corev1.ResourceName) resource.Quantity {
	return list[name]
}

// dropNodeNames removes what ties a spec to a node by its name. The required
// node affinity is a list of alternatives: an alternative that only named nodes
// goes, for an empty one would match no node.
func dropNodeNames(spec *corev1.PodSpec) {
	spec.NodeName = ""
	delete(spec.NodeSelector, corev1.LabelHostname)
	if len(spec.NodeSelector) == 0 {
		spec.NodeSelector = nil
	}
	if spec.Affinity == nil {
		return
	}
	if node := spec.Affinity.NodeAffinity; node != nil {
		if required := node.RequiredDuringSchedulingIgnoredDuringExecution; required != nil {
			required.NodeSelectorTerms = dropFromTerms(required.NodeSelectorTerms)
			if len(required.NodeSelectorTerms) == 0 {
				node.RequiredDuringSchedulingIgnoredDuringExecution = nil
			}
		}
		var preferred []corev1.PreferredSchedulingTerm
		for _, p := range node.PreferredDuringSchedulingIgnoredDuringExecution {
			if terms := dropFromTerms([]corev1.NodeSelectorTerm{p.Preference}); len(terms) == 1 {
				p.Preference = terms[0]
				preferred = append(preferred, p)
			}
		}
		node.PreferredDuringSchedulingIgnoredDuringExecution = preferred
		if node.RequiredDuringSchedulingIgnoredDuringExecution == nil && len(preferred) == 0 {
			spec.Affinity.NodeAffinity = nil
		}
	}
	if *spec.Affinity == (corev1.Affinity{}) {
		spec.Affinity = nil
	}
}

func dropFromTerms(terms []corev1.NodeSelectorTerm) []corev1.NodeSelectorTerm {
	var kept []corev1.NodeSelectorTerm
	for _, term := range terms {
		term.MatchExpressions = dropKey(term.MatchExpressions, corev1.LabelHostname)
		term.MatchExpressions = slices.DeleteFunc(slices.Clone(term.MatchExpressions), func(r corev1.NodeSelectorRequirement) bool {
			return strings.HasPrefix(r.Key, checkpointv1alpha1.LabelRunsPrefix) // of the checkpoint that the source came from
		})
		term.MatchFields = dropKey(term.MatchFields, metav1.ObjectNameField)
		if len(term.MatchExpressions)+len(term.MatchFields) > 0 {
			kept = append(kept, term)
		}
	}
	return kept
}

func dropKey(requirements []corev1.NodeSelectorRequirement, key string) []corev1.NodeSelectorRequirement {
	var kept []corev1.NodeSelectorRequirement
	for _, r := range requirements {
		if r.Key != key {
			kept = append(kept, r)
		}
	}
	return kept
}
