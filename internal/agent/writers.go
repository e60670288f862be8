package agent

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
)

// Volumes that outlive a Pod (PersistentVolumeClaims, hostPath) are not captured:
// a restored Pod mounts them as they are. As long as the source runs, a restored Pod
// would write to the same files, with the same memory of what is in them, and neither
// would know of the other: no lock helps, both hold it. So a restore waits for the
// source's end where the volume is not made for several writers.

// besideItsSource says why a Pod must not be restored while its source runs.
func (r *resolver) besideItsSource(ctx context.Context, pod *corev1.Pod, pcp *v1alpha1.PodCheckpoint) error {
	shared, err := r.oneWriter(ctx, pod)
	if shared == "" || err != nil {
		return err
	}
	var source corev1.Pod
	name := types.NamespacedName{Namespace: pcp.Namespace, Name: pcp.Spec.SourcePodName}
	err = r.live.Get(ctx, name, &source)
	if apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return deny(v1alpha1.EventRestoreFailed, "whether the source Pod %s still runs could not be read from the API server: %v", name, err)
	}
	if pcp.Status.SourcePodUID == nil || source.UID != *pcp.Status.SourcePodUID ||
		source.Status.Phase == corev1.PodSucceeded || source.Status.Phase == corev1.PodFailed {
		return nil
	}
	return deny(v1alpha1.EventSourcePodRunning, "%s, and the source Pod %s (UID %s) still runs: both would write to the same files and neither know of the other; "+
		"this Pod waits until that one has ended or is deleted", shared, name, source.UID)
}

// oneWriter names a volume of a Pod that is not made for several writers and that it
// can write to; empty if it has none.
func (r *resolver) oneWriter(ctx context.Context, pod *corev1.Pod) (string, error) {
	for _, v := range pod.Spec.Volumes {
		if !writes(pod, v.Name) {
			continue
		}
		switch {
		case v.HostPath != nil:
			if kind := v.HostPath.Type; kind == nil || *kind != corev1.HostPathSocket && *kind != corev1.HostPathCharDev {
				return fmt.Sprintf("volume %s is %s of the node (hostPath), which the Pod can write to", v.Name, v.HostPath.Path), nil
			}
		case v.PersistentVolumeClaim != nil && !v.PersistentVolumeClaim.ReadOnly:
			var claim corev1.PersistentVolumeClaim
			name := types.NamespacedName{Namespace: pod.Namespace, Name: v.PersistentVolumeClaim.ClaimName}
			if err := r.live.Get(ctx, name, &claim); err != nil {
				return "", deny(v1alpha1.EventRestoreFailed, "PersistentVolumeClaim %s could not be read from the API server: %v", name, err)
			}
			modes := claim.Status.AccessModes
			if len(modes) == 0 {
				modes = claim.Spec.AccessModes
			}
			if !slices.Contains(modes, corev1.ReadWriteMany) {
				return fmt.Sprintf("volume %s is PersistentVolumeClaim %s of access modes %v, which is for one writer", v.Name, name.Name, modes), nil
			}
		}
	}
	return "", nil
}

// writes says whether any container of a Pod can write to a volume.
func writes(pod *corev1.Pod, volume string) bool {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == volume && !m.ReadOnly }) ||
			slices.ContainsFunc(c.VolumeDevices, func(d corev1.VolumeDevice) bool { return d.Name == volume }) {
			return true
		}
	}
	return false
}

// uncapturedVolume names a volume that ends with its Pod and that no checkpoint
// holds, with what it is; empty if there is none.
func uncapturedVolume(pod *corev1.Pod) string {
	for _, v := range pod.Spec.Volumes {
		if v.Ephemeral != nil {
			return fmt.Sprintf("volume %s is a generic ephemeral volume: its contents end with the Pod and are not captured; use an emptyDir, or a PersistentVolumeClaim of its own", v.Name)
		}
	}
	return ""
}
