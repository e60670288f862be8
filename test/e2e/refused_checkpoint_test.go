package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const idle = "while :; do sleep 0.1; done"

// P2, P3, P11: each with a message of its own.
func TestACheckpointThatCannotBeTakenEndsWithItsReason(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		name   string
		setUp  func(s *scene)
		change func(*checkpointv1alpha1.PodCheckpoint)
		reason string
		says   []string
	}{
		{
			name:  "no such Pod",
			setUp: func(*scene) {},
			says:  []string{"source", "not"},
		},
		{
			name:  "a Pod that no node has taken",
			setUp: func(s *scene) { s.create(MakePod("source").Shell("main", idle).NowhereToRun().Obj()) },
			says:  []string{"source", "node"},
		},
		{
			name: "a Pod that has ended",
			setUp: func(s *scene) {
				s.create(MakePod("source").Restart(corev1.RestartPolicyNever).Shell("main", "exit 0").Obj())
				s.eventually("it has ended", func() error {
					if pod := s.pod("source"); pod.Status.Phase != corev1.PodSucceeded {
						return errPhase(pod)
					}
					return nil
				})
			},
			says: []string{"source", "not Running", "Succeeded"},
		},
		{
			name: "a Pod whose container does not run",
			setUp: func(s *scene) {
				s.create(MakePod("source").Shell("main", idle).Shell("broken", "exit 1").Obj())
				s.eventually("one container waits to be started again", func() error {
					pod := s.pod("source")
					for _, status := range pod.Status.ContainerStatuses {
						if status.Name == "broken" && status.State.Waiting != nil && status.State.Waiting.Reason == "CrashLoopBackOff" {
							return nil
						}
					}
					return errPhase(pod)
				})
			},
			says: []string{"broken", "not running"},
		},
		{
			name: "a Pod that is being deleted",
			setUp: func(s *scene) {
				pod := s.running(MakePod("source").Grace(20).Shell("main", "trap '' TERM; "+idle).Obj())
				if err := s.Delete(s.Context(), pod); err != nil {
					s.Fatal(err)
				}
			},
			says: []string{"source", "being deleted"},
		},
		{
			name: "a Pod of another namespace",
			setUp: func(s *scene) {
				other := newScene(s.TB)
				other.running(MakePod("source").Shell("main", idle).Obj())
			},
			says: []string{"source", "not"},
		},
		{
			name:   "another Pod of the same name",
			setUp:  func(s *scene) { s.running(MakePod("source").Shell("main", idle).Obj()) },
			change: func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.SourcePodUID = new(types.UID("gone-long-ago")) },
			reason: checkpointv1alpha1.ReasonSourcePodReplaced,
			says:   []string{"gone-long-ago"},
		},
		{
			name:   "a container that the Pod does not have",
			setUp:  func(s *scene) { s.running(MakePod("source").Shell("main", idle).Obj()) },
			change: func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.Containers = []string{"main", "absent"} },
			says:   []string{"absent"},
		},
		{
			name: "two containers with a Unix connection between them",
			setUp: func(s *scene) {
				s.running(MakePod("source").
					Container("one", imageSubject, "subject", "plug", "listen", "/share/socket").
					Container("two", imageSubject, "subject", "plug", "dial", "/share/socket").
					EmptyDir("share", "/share", corev1.StorageMediumDefault).Obj())
				s.eventually("they are connected", func() error {
					if log := s.logs("source", "two"); !strings.Contains(log, "plug: connected") {
						return fmt.Errorf("log %q", log)
					}
					return nil
				})
			},
			says: []string{"Unix socket", "container one, process", "container two, process", "plug dial"},
		},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			way.setUp(s)
			var changes []func(*checkpointv1alpha1.PodCheckpoint)
			if way.change != nil {
				changes = append(changes, way.change)
			}
			s.ask4Checkpoint("one", "source", changes...)
			checkpoint, ready := s.terminal("one")
			want := way.reason
			if want == "" {
				want = checkpointv1alpha1.ReasonCheckpointFailed
			}
			if ready.Status != metav1.ConditionFalse || ready.Reason != want {
				t.Errorf("it ended with %s %s: %s, want %s", ready.Status, ready.Reason, ready.Message, want)
			}
			s.wantText("the message", ready.Message, way.says...)
			if checkpoint.Status.CheckpointLocation != nil || checkpoint.Status.CheckpointedPodTemplate != nil {
				t.Errorf("a checkpoint that was not taken has a location or a template: %+v", checkpoint.Status)
			}
		})
	}
}

// P2: the Pod that has the name now is not touched.
func TestAReplacedSourcePodIsNotTouched(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 20)
	s.ask4Checkpoint("one", "counters", func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.SourcePodUID = new(types.UID("gone-long-ago")) })
	if _, ready := s.terminal("one"); ready.Reason != checkpointv1alpha1.ReasonSourcePodReplaced {
		t.Fatalf("it ended with %s: %s", ready.Reason, ready.Message)
	}
	time.Sleep(500 * time.Millisecond)
	for _, event := range s.events(s.pod("counters").UID) {
		if event.Reason == checkpointv1alpha1.EventCheckpointingPod {
			t.Errorf("event %s: %s", event.Reason, event.Message)
		}
	}
	s.unharmed("counters")
}

// P1: the spec is as it was created.
func TestTheSpecOfAPodCheckpointCannotBeChanged(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.ask4Checkpoint("one", "absent")
	checkpoint, _ := s.terminal("one")
	checkpoint.Spec.SourcePodName = "other"
	err := s.Update(s.Context(), checkpoint)
	if err == nil {
		t.Fatal("the spec was changed")
	}
	s.wantText("the refusal", err.Error(), "immutable")
}

// P15: what people see while it goes on.
func TestACheckpointIsToldInEvents(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	pod := s.running(MakePod("source").Shell("main", idle).Obj())
	checkpoint := s.checkpoint("one", "source")
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointingPod)
	s.waitEvent(checkpoint, checkpointv1alpha1.EventCheckpointStarted)
	s.waitEvent(checkpoint, checkpointv1alpha1.EventCheckpointSucceeded)
	s.eventually("the Pod's condition is gone or False", func() error {
		for _, condition := range s.pod("source").Status.Conditions {
			if string(condition.Type) == checkpointv1alpha1.PodConditionCheckpointing && condition.Status == corev1.ConditionTrue {
				return errCondition(condition)
			}
		}
		return nil
	})
}
