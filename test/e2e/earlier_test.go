package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store/backend/open"
)

// X5, X1: on a node that has not the data a Pod runs before its memory has come. Where
// that cannot come any more the container is killed, and it is said why; another Pod goes
// on with what is there, and one from a store needs no other node. P29: a PodCheckpoint
// that is deleted stays until the Pod has what it needs of it.
func TestAPodRunsOnAnotherNodeBeforeItsMemoryIsThereAndNeverOnAnythingElse(t *testing.T) {
	s := newScene(t)
	const mib = 256
	build := func(name, from string) *corev1.Pod {
		b := MakePod(name).Container("subject", imageSubject, "subject", "hold", fmt.Sprint(mib)).On(nodeOne)
		if from != "" {
			b = b.RestoreFrom(from).On(nodeTwo)
		}
		pod := b.Obj()
		pod.Spec.RestartPolicy = corev1.RestartPolicyNever
		if from != "" {
			pod.Annotations[checkpointv1alpha1.AnnotationRestoreMemory] = "lazy"
		}
		return pod
	}
	s.shareDirectory()
	store := s.checkpointStore("early", true, open.Config{Kind: open.Directory, Path: mounted + "/early"})
	s.create(build("source", ""))
	sum := s.held("source")
	one := s.taken("one", "source")
	s.taken("two", "source", inStore(store))
	s.remove("source")

	hole := "blackhole " + s.agentOf("one").Status.PodIP + "/32"
	mend := func(ctx context.Context) error {
		_, err := s.OnNode(ctx, nodeTwo, "ip route del "+hole+" 2>/dev/null || true")
		return err
	}
	s.Cleanup(func() {
		if err := mend(context.Background()); err != nil {
			t.Error(err)
		}
	})
	// As soon as a Pod can be restored from it, and before it is whole.
	early := strings.Replace(copyOf(one), string(one.UID), ".early-"+string(one.UID), 1)
	cut := make(chan error, 1)
	go func() {
		_, err := s.OnNode(t.Context(), nodeTwo, fmt.Sprintf("n=0; until [ -e %s ]; do n=$((n+1)); [ $n -lt 12000 ] || exit 1; sleep 0.005; done; ip route add %s", early, hole))
		cut <- err
	}()
	lost := s.create(build("lost", "one"))
	if err := <-cut; err != nil {
		t.Fatalf("nothing came: %v", err)
	}
	if _, err := s.OnNode(t.Context(), nodeTwo, "test ! -e "+copyOf(one)); err != nil {
		t.Fatalf("all had come before the link was cut: %v", err)
	}
	s.waitEvent(lost, checkpointv1alpha1.EventCheckpointFetched, " have come from node "+nodeOne, "memory comes while it does")
	// Nobody reaches the other node: the store has all that is needed.
	stored := s.create(build("stored", "two"))
	if got := s.held("stored"); got != sum {
		t.Errorf("the memory from the store is another: %s, and was %s", got, sum)
	}
	s.unharmed("stored")
	s.waitEvent(stored, checkpointv1alpha1.EventCheckpointFetched, " have come from CheckpointStore "+store)
	s.waitEvent(stored, checkpointv1alpha1.EventMemoryRestored)
	s.memoryIs("stored", corev1.ConditionTrue, checkpointv1alpha1.ReasonMemoryRestored)
	s.remove("stored")

	s.within(3*time.Minute, "the Pod whose memory cannot come is killed", func() error {
		for _, c := range s.pod("lost").Status.ContainerStatuses {
			if ended := c.State.Terminated; ended != nil {
				if ended.ExitCode != 137 || !strings.Contains(ended.Message, "its memory could not be restored") {
					t.Errorf("it ended with %d: %s", ended.ExitCode, ended.Message)
				}
				return nil
			}
		}
		return errPhase(s.pod("lost"))
	})
	s.waitEvent(lost, checkpointv1alpha1.EventMemoryLost, "can be had from nowhere", "node "+nodeOne)
	s.memoryIs("lost", corev1.ConditionFalse, checkpointv1alpha1.ReasonMemoryLost)
	s.remove("lost")
	if _, err := s.OnNode(t.Context(), nodeTwo, "test ! -e "+copyOf(one)); err != nil {
		t.Errorf("what is not whole has the name of what is: %v", err)
	}

	// With the link back, and slow, the PodCheckpoint is deleted while memory comes.
	s.Cleanup(func() {
		if _, err := s.OnNode(context.Background(), nodeTwo, "nft delete table inet slow 2>/dev/null || true"); err != nil {
			t.Error(err)
		}
	})
	s.onNode(nodeTwo, fmt.Sprintf(`nft "add table inet slow; add chain inet slow forward { type filter hook forward priority 0; }; `+
		`add rule inet slow forward ip saddr %s limit rate over 1 mbytes/second burst 512 kbytes drop"`, s.agentOf("one").Status.PodIP))
	if err := mend(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := s.create(build("again", "one"))
	s.within(longPatience, "the Pod runs before its memory is there", func() error {
		for _, c := range s.pod("again").Status.ContainerStatuses {
			if c.State.Running != nil {
				return nil
			}
		}
		return errPhase(s.pod("again"))
	})
	s.memoryIs("again", corev1.ConditionFalse, checkpointv1alpha1.ReasonMemoryComing)
	if err := s.Delete(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	s.waitEvent(one, checkpointv1alpha1.EventDeletionDelayed, fmt.Sprintf("Pod %q on node %q is still being given memory of it", "again", nodeTwo))
	s.memoryIs("again", corev1.ConditionFalse, checkpointv1alpha1.ReasonMemoryComing)
	if err := s.Get(t.Context(), s.key("one"), one); err != nil {
		t.Fatalf("it was deleted while a Pod needed it: %v", err)
	}
	s.onNode(nodeTwo, "nft delete table inet slow")
	if got := s.held("again"); got != sum {
		t.Errorf("the memory is another: %s, and was %s", got, sum)
	}
	s.unharmed("again")
	s.waitEvent(again, checkpointv1alpha1.EventMemoryRestored)
	s.memoryIs("again", corev1.ConditionTrue, checkpointv1alpha1.ReasonMemoryRestored)
	data := fmt.Sprintf("/var/lib/stasis/checkpoints/*_%s", one.UID)
	s.eventually("the PodCheckpoint has gone, and its data", func() error {
		if err := s.Get(t.Context(), s.key("one"), one); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the object is there (%v)", err)
		}
		_, err := s.OnNode(t.Context(), nodeOne, "! ls -d "+data)
		return err
	})
}

// memoryIs waits until a Pod's condition says how far its memory has come.
func (s *scene) memoryIs(pod string, status corev1.ConditionStatus, reason string) {
	s.Helper()
	s.eventually("what pod "+pod+" says of its memory", func() error {
		for _, c := range s.pod(pod).Status.Conditions {
			if c.Type == checkpointv1alpha1.PodConditionMemoryRestored && c.Status == status && c.Reason == reason {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.pod(pod).Status.Conditions)
	})
}
