package podtemplate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

const (
	// tokenVolumePrefix begins the names of the volumes that the ServiceAccount
	// admission plugin injects; random letters follow.
	tokenVolumePrefix = "kube-api-access-"
	// builtinTaintPrefix begins the keys of the taints that Kubernetes puts on
	// nodes by itself; admission injects tolerations of several of them.
	builtinTaintPrefix = "node.kubernetes.io/"

	defaultServiceAccount = "default"
)

// normalise takes out of a spec what differs between two Pods made of one
// manifest: what admission and defaulting put in, what names nodes, and what a
// restore adds. What is left is compared to the letter.
func normalise(spec *corev1.PodSpec) {
	dropNodeNames(spec)

	// A restore adds its runtime handler, and a RuntimeClass brings its overhead.
	spec.RuntimeClassName = nil
	spec.Overhead = nil
	// A restore's own gate, and those of other controllers, are gone when it runs.
	spec.SchedulingGates = nil
	// Priority is what the cluster's PriorityClasses made of a name, or of none.
	spec.Priority = nil
	spec.PriorityClassName = ""
	spec.PreemptionPolicy = nil
	// These come from the ServiceAccount where the manifest has none, and only
	// serve to pull the image, whose name is compared.
	spec.ImagePullSecrets = nil
	// Ephemeral containers are not captured.
	spec.EphemeralContainers = nil

	if spec.ServiceAccountName == "" {
		spec.ServiceAccountName = spec.DeprecatedServiceAccount
	}
	if spec.ServiceAccountName == "" {
		spec.ServiceAccountName = defaultServiceAccount
	}
	spec.DeprecatedServiceAccount = ""
	if spec.EnableServiceLinks == nil {
		links := corev1.DefaultEnableServiceLinks
		spec.EnableServiceLinks = &links
	}
	if spec.SecurityContext == nil {
		spec.SecurityContext = &corev1.PodSecurityContext{}
	}

	spec.Tolerations = slices.DeleteFunc(spec.Tolerations, func(t corev1.Toleration) bool {
		return strings.HasPrefix(t.Key, builtinTaintPrefix)
	})
	slices.SortFunc(spec.Tolerations, func(a, b corev1.Toleration) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Operator, b.Operator),
			cmp.Compare(a.Value, b.Value), cmp.Compare(a.Effect, b.Effect))
	})
	renameTokenVolumes(spec)
}

// renameTokenVolumes gives the injected token volumes names that say nothing but
// their order. A Pod made of a source's template keeps the source's letters, one
// made of a manifest gets its own.
func renameTokenVolumes(spec *corev1.PodSpec) {
	names := make(map[string]string)
	for i := range spec.Volumes {
		v := &spec.Volumes[i]
		if !strings.HasPrefix(v.Name, tokenVolumePrefix) || !holdsToken(v) {
			continue
		}
		names[v.Name] = fmt.Sprintf("%s%d", tokenVolumePrefix, len(names)+1)
		v.Name = names[v.Name]
	}
	for _, containers := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range containers {
			for j := range containers[i].VolumeMounts {
				m := &containers[i].VolumeMounts[j]
				if name, renamed := names[m.Name]; renamed {
					m.Name = name
				}
			}
		}
	}
}

func holdsToken(v *corev1.Volume) bool {
	if v.Projected == nil {
		return false
	}
	return slices.ContainsFunc(v.Projected.Sources, func(s corev1.VolumeProjection) bool {
		return s.ServiceAccountToken != nil
	})
}
