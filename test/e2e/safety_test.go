package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Liveness gives the last container a liveness probe that one unanswered second
// trips.
func (b *podBuilder) Liveness(handler corev1.ProbeHandler) *podBuilder {
	b.last().LivenessProbe = everySecond(handler)
	b.last().LivenessProbe.TimeoutSeconds = 1
	return b
}

// P14: a checkpoint that would take longer than the probe allows is not taken, or
// given up in time.
func TestAPodWithATightLivenessProbeSurvivesACheckpointThatWouldTakeLonger(t *testing.T) {
	s := newScene(t) // not in parallel: what else makes a machine pause for a second trips the probe
	// Two gigabytes, written while it stands still, take more than the 700 ms that are left
	// of the second.
	build := MakePod("source").
		Subject().Liveness(corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}).
		Container("memory", imageSubject, "subject", "hold", "2048")
	build.last().Env = []corev1.EnvVar{{Name: "SUBJECT_ADDRESS", Value: ":8090"}}
	s.create(build.Obj())
	pod := s.waitReady("source")
	s.within(longPatience, "its memory is filled", func() error {
		_, err := s.exec("source", "memory", "subject", "get", "/held")
		return err
	})
	s.ask4Checkpoint("one", "source", func(c *checkpointv1alpha1.PodCheckpoint) {
		c.Spec.Options = engine.slow
	})
	_, ready := s.terminal("one")
	if ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
		t.Fatalf("it ended with %s: %s", ready.Reason, ready.Message)
	}
	s.wantText("the message", ready.Message, "its budget is 700ms", "liveness probe of container subject", "every 1s, timeout 1s, failureThreshold 1")
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointFailed, "its budget is 700ms")
	s.never(4*time.Second, "no probe fails", func() error {
		for _, status := range s.pod("source").Status.ContainerStatuses {
			if status.RestartCount != 0 {
				return fmt.Errorf("container %s was restarted: %+v", status.Name, status.LastTerminationState)
			}
		}
		return nil
	})
	s.unharmed("source")
}

// P14: and one that is short enough is taken.
func TestAPodWithATightLivenessProbeSurvivesCheckpointsThatAreShortEnough(t *testing.T) {
	s := newScene(t) // not in parallel: it is about time
	build := MakePod("source").Subject().
		Liveness(corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}})
	build.last().LivenessProbe.FailureThreshold = 2
	s.running(build.Obj())
	taken := 0
	for i := range 4 {
		name := fmt.Sprint("c", i)
		s.ask4Checkpoint(name, "source")
		switch _, ready := s.terminal(name); {
		case ready.Reason == checkpointv1alpha1.ReasonCheckpointCompleted:
			taken++
		case !strings.Contains(ready.Message, "its budget is 1.7s"):
			t.Errorf("%s ended with %s: %s", name, ready.Reason, ready.Message)
		}
	}
	if taken == 0 {
		t.Error("none was taken")
	}
	time.Sleep(2 * time.Second)
	s.unharmed("source")
}

// P16.
func TestExecProbesAndCheckpointsDoNotDisturbEachOther(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	probe := corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"subject", "get", "/healthz"}}}
	build := MakePod("source").Subject().Liveness(probe)
	build.last().LivenessProbe.TimeoutSeconds = 5
	build.last().ReadinessProbe = everySecond(probe)
	s.running(build.Obj())
	for i := range 5 {
		s.checkpoint(fmt.Sprint("c", i), "source")
	}
	s.unharmed("source")
}

// P16, P18: it is never half captured.
func TestAnExecSessionFailsTheCheckpointWhichNamesIt(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	end := s.session("source")
	s.ask4Checkpoint("one", "source")
	if _, ready := s.terminal("one"); ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
		t.Errorf("it ended with %s: %s", ready.Reason, ready.Message)
	} else {
		s.wantText("the message", ready.Message, "container main", "process ", "(sleep", "exec session")
	}
	end()
	s.checkpoint("two", "source")
	s.unharmed("source")
}
