package placement

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// classes are the RuntimeClasses of restored Pods, by the engine of their checkpoint.
var classes = map[string]string{
	"criu":   checkpointv1alpha1.RuntimeClassStasis,
	"gvisor": checkpointv1alpha1.RuntimeClassGVisor,
}

// IsClass says whether a RuntimeClass is one of Pods that are restored.
func IsClass(name string) bool {
	for _, class := range classes {
		if class == name {
			return true
		}
	}
	return false
}

// ClassOf is the RuntimeClass of Pods that are restored from a checkpoint: CRIU's where
// its engine is not known.
func ClassOf(c *checkpointv1alpha1.PodCheckpoint) string {
	if c != nil && c.Status.Engine != nil {
		if class, ok := classes[c.Status.Engine.Name]; ok {
			return class
		}
	}
	return checkpointv1alpha1.RuntimeClassStasis
}

// wrongClass says why a Pod's RuntimeClass does not restore a checkpoint; empty if it does.
func wrongClass(pod *corev1.Pod, c *checkpointv1alpha1.PodCheckpoint) string {
	want := ClassOf(c)
	if has := pod.Spec.RuntimeClassName; has != nil && *has != want && IsClass(*has) {
		return fmt.Sprintf("spec.runtimeClassName is %q, and PodCheckpoint %q, of the engine %s, is restored by %q: create the Pod again and leave it out", *has, c.Name, c.Status.Engine.Name, want)
	}
	return ""
}
