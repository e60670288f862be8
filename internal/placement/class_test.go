package placement

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestARestoringPodHasTheClassOfItsCheckpointsEngine(t *testing.T) {
	of := func(engine string) *checkpointv1alpha1.PodCheckpoint {
		c := &checkpointv1alpha1.PodCheckpoint{}
		c.Name = "one"
		if engine != "" {
			c.Status.Engine = &checkpointv1alpha1.EngineStatus{Name: engine, Version: "1"}
		}
		return c
	}
	for _, tc := range []struct {
		checkpoint *checkpointv1alpha1.PodCheckpoint
		want       string
	}{{nil, "stasis"}, {of(""), "stasis"}, {of("criu"), "stasis"}, {of("gvisor"), "stasis-gvisor"}} {
		if got := ClassOf(tc.checkpoint); got != tc.want {
			t.Errorf("%+v: %s", tc.checkpoint, got)
		}
	}
	pod := &corev1.Pod{}
	for class, conflict := range map[string]bool{"stasis": true, "stasis-gvisor": false} {
		pod.Spec.RuntimeClassName = &class
		if !conflict {
			if why := wrongClass(pod, of("gvisor")); why != "" {
				t.Errorf("class %s: %s", class, why)
			}
			continue
		}
		if why, err := Conflict(t.Context(), pod, of("gvisor"), Where{}, nil); err != nil || !strings.Contains(why, `is restored by "stasis-gvisor"`) {
			t.Errorf("class %s: %q, %v", class, why, err)
		}
	}
}
