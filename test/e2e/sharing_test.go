package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// sharing makes a Pod of two containers that share memory and talk (subject/share.go).
func sharing(name string) *podBuilder {
	b := MakePod(name).
		Container("a", imageSubject, "subject", "share", "a").
		Container("b", imageSubject, "subject", "share", "b").
		EmptyDir("share", "/share", corev1.StorageMediumDefault)
	if engine.loopbackAlone {
		b.last().Env = []corev1.EnvVar{{Name: "SHARE_LOOPBACK_ALONE", Value: "1"}}
	}
	return b
}

// shareRounds is how often the Pod is checkpointed and restored; the figures in
// docs/benchmarks.md are of 100.
func shareRounds(t *testing.T) int {
	text := os.Getenv("STASIS_E2E_SHARE_ROUNDS")
	if text == "" {
		return 3
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("STASIS_E2E_SHARE_ROUNDS=%q is no number of rounds", text)
	}
	return n
}

// X2, P27, P12: each round is of the Pod that the round before restored, so that what
// was lost in one is missed in the next.
func TestContainersThatShareMemoryAndTalkAgreeAfterEveryRestore(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	pod := "round-0"
	s.running(sharing(pod).Obj())
	for round := range shareRounds(t) {
		s.talksOn(pod)
		checkpoint, next := fmt.Sprintf("cut-%d", round+1), fmt.Sprintf("round-%d", round+1)
		s.checkpoint(checkpoint, pod)
		s.talksOn(pod) // the source goes on as well
		s.remove(pod)
		s.running(sharing(next).RestoreFrom(checkpoint).Obj())
		if log := s.logs(next, "a"); strings.Contains(log, "begins") {
			t.Fatalf("round %d: container a was started, not restored: %s", round+1, log)
		}
		pod = next
	}
	s.talksOn(pod)
}

// talksOn waits until both containers have gone on with all that they share.
func (s *scene) talksOn(pod string) {
	s.Helper()
	before := [2]string{s.logs(pod, "a"), s.logs(pod, "b")}
	s.eventually("the containers of "+pod+" go on", func() error {
		for i, container := range []string{"a", "b"} {
			for _, status := range s.pod(pod).Status.ContainerStatuses {
				if status.RestartCount != 0 || status.State.Running == nil {
					s.Fatalf("container %s of %s has ended: %+v %s", status.Name, pod, status.LastTerminationState, s.logs(pod, status.Name))
				}
			}
			new := strings.TrimPrefix(s.logs(pod, container), before[i])
			wanted := []string{"total "}
			if container == "b" {
				wanted = append(wanted, "to 127.0.0.1:")
				if !engine.loopbackAlone {
					wanted = append(wanted, "to 10.")
				}
			}
			if !containsAll(new, wanted...) {
				return fmt.Errorf("container %s has logged %q since", container, new)
			}
		}
		return nil
	})
}

func containsAll(text string, wanted ...string) bool {
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}
