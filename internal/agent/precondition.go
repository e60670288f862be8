package agent

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
)

// refusal says that a Pod cannot be checkpointed, before anything was touched.
type refusal struct {
	reason  string // of the Ready condition
	message string
}

func (r *refusal) Error() string { return r.message }

func refuse(format string, args ...any) *refusal {
	return &refusal{reason: v1alpha1.ReasonCheckpointFailed, message: fmt.Sprintf(format, args...)}
}

// source is what a checkpoint is to be taken of: a Pod that passed the
// preconditions and the names of its containers to capture.
type source struct {
	pod        *corev1.Pod
	containers []string
}

// checkPod judges whether a live Pod can be checkpointed as asked (P2, P11, P18).
// pod is nil if there is none of that name.
func checkPod(pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod, nodeName string) (*source, *refusal) {
	name := pcp.Namespace + "/" + pcp.Spec.SourcePodName
	if pod == nil {
		return nil, refuse("Pod %s not found", name)
	}
	if want := pcp.Spec.SourcePodUID; want != nil && *want != "" && pod.UID != *want {
		return nil, &refusal{
			reason:  v1alpha1.ReasonSourcePodReplaced,
			message: fmt.Sprintf("Pod %s has UID %s, the checkpoint was asked of UID %s: that Pod is gone and the one of its name is another", name, pod.UID, *want),
		}
	}
	if pod.DeletionTimestamp != nil {
		return nil, refuse("Pod %s is being deleted", name)
	}
	if pod.Spec.NodeName != nodeName {
		return nil, refuse("Pod %s is on node %q, not on %q where it was when this PodCheckpoint was created; create another", name, pod.Spec.NodeName, nodeName)
	}
	if pod.Labels[v1alpha1.LabelAllowed] == "false" {
		return nil, refuse("Pod %s forbids checkpoints of it, by the label %s=false", name, v1alpha1.LabelAllowed)
	}
	if why := notFromAPI(pod); why != "" {
		return nil, refuse("Pod %s is a %s, which the API server does not own; those cannot be checkpointed", name, why)
	}
	if pod.Status.Phase != corev1.PodRunning {
		return nil, refuse("Pod %s is not Running, it is %s", name, orUnknown(string(pod.Status.Phase)))
	}
	if why := uncapturedVolume(pod); why != "" {
		return nil, refuse("Pod %s: %s", name, why)
	}
	if r := checkInitContainers(name, pod); r != nil {
		return nil, r
	}
	selected, r := selectContainers(pcp, name, pod)
	if r != nil {
		return nil, r
	}
	for _, c := range selected {
		if status := statusOf(pod, c); status == nil || status.State.Running == nil {
			return nil, refuse("Container %s of Pod %s is not running, it is %s", c, name, describeState(status))
		}
	}
	if err := hooks.Check(pod.Annotations, runnable(pod)); err != nil {
		return nil, refuse("Pod %s asks for hooks that cannot be run: %v", name, err)
	}
	if why := resizing(pod); why != "" {
		return nil, refuse("Pod %s has a resize in flight (%s); wait until it has been applied, or take it back", name, why)
	}
	for _, c := range pod.Spec.EphemeralContainers {
		// One that has not started yet may do so at any moment.
		if !slices.ContainsFunc(pod.Status.EphemeralContainerStatuses, func(s corev1.ContainerStatus) bool {
			return s.Name == c.Name && s.State.Terminated != nil
		}) {
			return nil, refuse("Ephemeral container %s runs in Pod %s and cannot be captured; end it first", c.Name, name)
		}
	}
	return &source{pod: pod, containers: selected}, nil
}

// notFromAPI names the kind of Pod that a kubelet runs on its own account.
func notFromAPI(pod *corev1.Pod) string {
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return "static Pod (this object is its mirror)"
	}
	if from, ok := pod.Annotations["kubernetes.io/config.source"]; ok && from != "api" {
		return "static Pod (config source " + from + ")"
	}
	return ""
}

// runnable names the containers that hooks can be run in: sidecars and regular ones.
func runnable(pod *corev1.Pod) (names []string) {
	for _, c := range pod.Spec.InitContainers {
		if restartable(&c) {
			names = append(names, c.Name)
		}
	}
	for _, c := range pod.Spec.Containers {
		names = append(names, c.Name)
	}
	return names
}

func checkInitContainers(name string, pod *corev1.Pod) *refusal {
	for _, c := range pod.Spec.InitContainers {
		if restartable(&c) {
			continue
		}
		status := statusOf(pod, c.Name)
		if status == nil || status.State.Terminated == nil || status.State.Terminated.ExitCode != 0 {
			return refuse("Init container %s of Pod %s has not completed, it is %s", c.Name, name, describeState(status))
		}
	}
	return nil
}

// selectContainers names what to capture, in the Pod's order: sidecars, then
// regular containers; all of them unless the object selects some.
func selectContainers(pcp *v1alpha1.PodCheckpoint, name string, pod *corev1.Pod) ([]string, *refusal) {
	all := runnable(pod)
	asked := pcp.Spec.Containers
	if len(asked) == 0 {
		return all, nil
	}
	seen := map[string]bool{}
	var unknown []string
	for _, c := range asked {
		if seen[c] {
			return nil, refuse("spec.containers names %s twice", c)
		}
		seen[c] = true
		if !slices.Contains(all, c) {
			unknown = append(unknown, c)
		}
	}
	if len(unknown) > 0 {
		return nil, refuse("Pod %s has no container %s that runs with it; it has %s", name, strings.Join(unknown, ", "), strings.Join(all, ", "))
	}
	return slices.DeleteFunc(all, func(c string) bool { return !seen[c] }), nil
}

// resizing says whether what is allocated to the Pod differs from its spec or is
// about to change: the template must describe what runs (P4).
func resizing(pod *corev1.Pod) string {
	for _, c := range pod.Status.Conditions {
		if (c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress) && c.Status == corev1.ConditionTrue {
			if c.Reason != "" {
				return fmt.Sprintf("%s, %s", c.Type, c.Reason)
			}
			return string(c.Type)
		}
	}
	for _, c := range pod.Spec.Containers {
		status := statusOf(pod, c.Name)
		if status == nil || status.AllocatedResources == nil {
			continue
		}
		for resource, want := range c.Resources.Requests {
			if has, ok := status.AllocatedResources[resource]; ok && has.Cmp(want) != 0 {
				return fmt.Sprintf("container %s asks for %s of %s and has %s", c.Name, want.String(), resource, has.String())
			}
		}
	}
	return ""
}

func restartable(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

func statusOf(pod *corev1.Pod, container string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == container {
				return &list[i]
			}
		}
	}
	return nil
}

func describeState(s *corev1.ContainerStatus) string {
	switch {
	case s == nil:
		return "not started yet"
	case s.State.Running != nil:
		return "running"
	case s.State.Terminated != nil:
		return fmt.Sprintf("terminated (%s, exit code %d)", orUnknown(s.State.Terminated.Reason), s.State.Terminated.ExitCode)
	case s.State.Waiting != nil:
		return fmt.Sprintf("waiting (%s)", orUnknown(s.State.Waiting.Reason))
	}
	return "not started yet"
}

func orUnknown(s string) string {
	if s == "" {
		return "in an unknown state"
	}
	return s
}

// capturedContainers lists what the status tells of captured containers: the
// regular ones, and the init containers that had completed or run as sidecars.
func capturedContainers(src *source) (regular, init []v1alpha1.PodCheckpointContainerStatus) {
	entry := func(c *corev1.Container) v1alpha1.PodCheckpointContainerStatus {
		image := c.Image
		if s := statusOf(src.pod, c.Name); s != nil && s.Image != "" {
			image = s.Image
		}
		return v1alpha1.PodCheckpointContainerStatus{Name: c.Name, Image: image}
	}
	for i := range src.pod.Spec.Containers {
		if c := &src.pod.Spec.Containers[i]; slices.Contains(src.containers, c.Name) {
			regular = append(regular, entry(c))
		}
	}
	for i := range src.pod.Spec.InitContainers {
		if c := &src.pod.Spec.InitContainers[i]; !restartable(c) || slices.Contains(src.containers, c.Name) {
			init = append(init, entry(c))
		}
	}
	return regular, init
}

// containerID takes the runtime's name off an ID as the Pod's status writes it,
// such as "containerd://0123".
func containerID(statusID string) string {
	if _, id, ok := strings.Cut(statusID, "://"); ok {
		return id
	}
	return statusID
}
