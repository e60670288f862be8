package agent

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/engine"
)

// What commonly breaks in a restored Pod, though a checkpoint of it can be taken (X7).
// Only what is so is said: a warning that most Pods get is one that nobody reads.

const (
	// maxWarnings and maxWarning bound what is told; the CRD states the same.
	maxWarnings = 16
	maxWarning  = 1024
	// maxNamed is how many connections are named.
	maxNamed = 3
)

// kubernetesService is where Pods reach the API server, "address:port"; empty if that
// is not known.
func kubernetesService() string {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// warningsOf says what of these containers of a Pod will not come back as it was.
func warningsOf(pod *corev1.Pod, containers []string, x engine.Examination, apiServer string) []string {
	var warnings []string
	warn := func(format string, args ...any) {
		warnings = append(warnings, cut(fmt.Sprintf(format, args...), maxWarning))
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if !slices.Contains(containers, c.Name) {
			continue
		}
		if devices := devicesOf(&c); len(devices) > 0 {
			warn("container %s uses %s: what is in a device, such as the memory of a GPU, is not captured", c.Name, strings.Join(devices, ", "))
		}
		var remotes []string
		callsAPI := false
		for _, o := range x.Outside {
			if o.Container == c.Name {
				remotes = append(remotes, o.Remote)
				callsAPI = callsAPI || o.Remote == apiServer
			}
		}
		if n := len(remotes); n > 0 {
			named := slices.Compact(slices.Sorted(slices.Values(remotes)))
			more := ""
			if len(named) > maxNamed {
				named, more = named[:maxNamed], ", …"
			}
			warn("container %s has %s to outside the Pod (%s%s): in a restored Pod %s closed, here %s on",
				c.Name, counted(n, "TCP connection"), strings.Join(named, ", "), more, oneOr(n, "it is", "they are"), oneOr(n, "it goes", "they go"))
		}
		if callsAPI && mountsToken(pod, &c) {
			warn("container %s calls the Kubernetes API by a token of its service account: one that it keeps in memory is the source Pod's, and is refused once that Pod is gone; a restored Pod has its own in the same file", c.Name)
		}
	}
	if x.Whole {
		for _, why := range holdsUpWhole(pod) {
			warn("%s, and nothing of a Pod of this engine runs before its last container has been started: it cannot be restored", why)
		}
	}
	if pod.Annotations[v1alpha1.AnnotationPreCheckpoint] != "" && pod.Annotations[v1alpha1.AnnotationPostCheckpoint] == "" {
		warn("the Pod has a pre-checkpoint hook and no post-checkpoint hook: what the one stops in the source Pod nothing lets go on")
	}
	return warnings[:min(len(warnings), maxWarnings)]
}

// holdsUpWhole says why the kubelet would wait for something to run in a Pod before it
// starts the last of its containers.
func holdsUpWhole(pod *corev1.Pod) (why []string) {
	for _, c := range pod.Spec.InitContainers {
		switch {
		case c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways: // it had completed
		case c.StartupProbe != nil:
			why = append(why, "the sidecar "+c.Name+" has a startup probe")
		case c.Lifecycle != nil && c.Lifecycle.PostStart != nil:
			why = append(why, "the sidecar "+c.Name+" has a postStart hook")
		}
	}
	for i, c := range pod.Spec.Containers {
		if i < len(pod.Spec.Containers)-1 && c.Lifecycle != nil && c.Lifecycle.PostStart != nil {
			why = append(why, "container "+c.Name+" has a postStart hook")
		}
	}
	return why
}

func counted(n int, what string) string { return fmt.Sprintf("%d %s%s", n, what, oneOr(n, "", "s")) }

func oneOr(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// devicesOf names the devices that a container is given: extended resources, whose
// names have a domain that is not Kubernetes' own, and claims.
func devicesOf(c *corev1.Container) (devices []string) {
	for name := range c.Resources.Limits {
		if domain, _, has := strings.Cut(string(name), "/"); has && !strings.HasSuffix(domain, "kubernetes.io") {
			devices = append(devices, string(name))
		}
	}
	for _, claim := range c.Resources.Claims {
		devices = append(devices, "claim "+claim.Name)
	}
	slices.Sort(devices)
	return devices
}

// mountsToken says whether a container finds a token of a service account in a file.
func mountsToken(pod *corev1.Pod, c *corev1.Container) bool {
	return slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
		return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
			return v.Name == m.Name && v.Projected != nil && slices.ContainsFunc(v.Projected.Sources, func(s corev1.VolumeProjection) bool {
				return s.ServiceAccountToken != nil
			})
		})
	})
}
