package agent

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestContainersGoTogetherUnlessTheKubeletWaitsForOneOfThem(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	hook := &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{
			{Name: "completed"},
			{Name: "sidecar", RestartPolicy: &always},
			{Name: "probed-sidecar", RestartPolicy: &always, StartupProbe: &corev1.Probe{}},
			{Name: "hooked-sidecar", RestartPolicy: &always, Lifecycle: hook},
		},
		Containers: []corev1.Container{
			{Name: "app", StartupProbe: &corev1.Probe{}, Lifecycle: &corev1.Lifecycle{PreStop: hook.PostStart}},
			{Name: "hooked", Lifecycle: hook},
			{Name: "log"},
		},
	}}
	if got := together(pod); !slices.Equal(got, []string{"sidecar", "app", "log"}) {
		t.Errorf("together go %q", got)
	}
}
