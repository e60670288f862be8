package agent

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/internal/engine"
)

func TestWhatKeepsAPodFromBeingRestoredAsAWholeIsWarnedOf(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	hook := &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{}}
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{
			{Name: "setup"},
			{Name: "probed", RestartPolicy: &always, StartupProbe: &corev1.Probe{}},
			{Name: "plain", RestartPolicy: &always},
		},
		Containers: []corev1.Container{{Name: "first", Lifecycle: hook}, {Name: "last", Lifecycle: hook}},
	}}
	if got := warningsOf(pod, []string{"first", "last"}, engine.Examination{}, ""); len(got) != 0 {
		t.Errorf("of an engine that restores container by container: %q", got)
	}
	got := warningsOf(pod, []string{"first", "last"}, engine.Examination{Whole: true}, "")
	for i, want := range []string{"the sidecar probed", "container first has a postStart hook"} {
		if i >= len(got) || !strings.Contains(got[i], want) {
			t.Fatalf("%q, want %q in number %d", got, want, i)
		}
	}
	if len(got) != 2 {
		t.Errorf("%q", got)
	}
}
