package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// P24: a Pod that is deleted by force leaves its name before its node has taken it
// down. A hook that the kubelet waits for keeps its restore under way for as long.
func TestTheRestoreOfAPodWaitsForThatOfADeletedOneOfItsName(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		b := MakePod(name).Shell("first", idle).Shell("second", idle)
		b.pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{
			Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "until test -e /go; do sleep 0.1; done"}},
		}}
		return b
	}
	release := func(pod string) error {
		_, err := s.exec(pod, "first", "touch", "/go")
		return err
	}
	s.create(build("source").Obj())
	s.eventually("the source's hook ends", func() error { return release("source") })
	s.waitReady("source")
	if _, err := s.exec("source", "first", "rm", "/go"); err != nil {
		t.Fatal(err)
	}
	s.checkpoint("one", "source")
	seen := s.restoringConditions("restored")

	earlier := s.create(build("restored").RestoreFrom("one").Obj())
	s.waitEvent(earlier, "Started") // the first of its containers, and its hook runs
	if err := s.Delete(t.Context(), earlier, client.GracePeriodSeconds(0), client.Preconditions{UID: &earlier.UID}); err != nil {
		t.Fatal(err)
	}
	later := s.create(build("restored").RestoreFrom("one").Obj())
	s.waitEvent(later, checkpointv1alpha1.EventRestoreInProgress, "of UID "+string(earlier.UID), "waits for its end")

	s.eventually("its turn has come", func() error {
		s.nudge("restored")
		time.Sleep(time.Second)
		err := release("restored") // of the earlier one, as long as the kubelet has it under that name
		if pod := s.pod("restored"); len(pod.Status.ContainerStatuses) == 0 || pod.Status.ContainerStatuses[0].State.Running == nil {
			return errors.Join(err, errPhase(pod))
		}
		return nil
	})
	restored := s.waitReady("restored")
	if restored.UID != later.UID {
		t.Fatalf("the Pod that is ready has UID %s, want %s", restored.UID, later.UID)
	}
	s.waitEvent(later, checkpointv1alpha1.EventRestoreSucceeded)
	s.unharmed("restored")
	s.eventually("the condition is gone", func() error {
		for _, condition := range s.pod("restored").Status.Conditions {
			if condition.Type == checkpointv1alpha1.PodConditionRestoring {
				return errCondition(condition)
			}
		}
		return nil
	})
	told := seen()
	for _, want := range []struct {
		pod    types.UID
		status corev1.ConditionStatus
	}{{earlier.UID, corev1.ConditionTrue}, {later.UID, corev1.ConditionFalse}, {later.UID, corev1.ConditionTrue}} {
		if what := fmt.Sprint(want.pod, want.status); !told[what] {
			t.Errorf("condition Restoring of Pod %s was never %s; seen: %v", want.pod, want.status, told)
		}
	}
}

// restoringConditions watches what the condition Restoring of a Pod of a name says,
// and returns a function that ends it and lists UIDs and statuses.
func (s *scene) restoringConditions(name string) func() map[string]bool {
	s.Helper()
	watching, err := s.Watch(s.Context(), &corev1.PodList{}, client.InNamespace(s.namespace), client.MatchingFields{"metadata.name": name})
	if err != nil {
		s.Fatal(err)
	}
	const seenAll = "all-is-seen" // an annotation
	done := make(chan map[string]bool, 1)
	go func() {
		seen := map[string]bool{}
		for event := range watching.ResultChan() {
			pod, isPod := event.Object.(*corev1.Pod)
			if !isPod || event.Type == watch.Deleted {
				continue
			}
			if pod.Annotations[seenAll] != "" {
				break
			}
			for _, condition := range pod.Status.Conditions {
				if condition.Type == checkpointv1alpha1.PodConditionRestoring {
					seen[fmt.Sprint(pod.UID, condition.Status)] = true
				}
			}
		}
		done <- seen
	}()
	return func() map[string]bool {
		defer watching.Stop()
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
		if err := s.Patch(s.Context(), pod, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"`+seenAll+`":"x"}}}`))); err != nil {
			s.Fatalf("annotating pod %s: %v", name, err)
		}
		return <-done
	}
}

// P32, P17: seen before the freeze, and nothing is left of it. The agents are told to
// leave nearly all of the disk free: to fill it would disturb others.
func TestACheckpointThatDoesNotFitOnTheNodesDiskIsRefused(t *testing.T) {
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	node := s.pod("source").Spec.NodeName
	agents := func(args ...string) {
		t.Helper()
		for _, command := range [][]string{args, {"rollout", "status", "daemonset/stasis-agent", "--timeout=120s"}} {
			if _, err := s.Kubectl(context.Background(), append([]string{"-n", "stasis-system"}, command...)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	roomy := sync.OnceFunc(func() { agents("rollout", "undo", "daemonset/stasis-agent") })
	t.Cleanup(roomy)
	agents("patch", "daemonset", "stasis-agent", "--type=json",
		`-p=[{"op":"add","path":"/spec/template/spec/containers/0/args/-","value":"--min-free-disk=0.999"}]`)

	checkpoint := s.ask4Checkpoint("one", "source")
	_, ready := s.terminal("one")
	if ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
		t.Fatalf("it ended with %s: %s", ready.Reason, ready.Message)
	}
	s.wantText("the message", ready.Message, "ot enough room on the disk", "othing was frozen", "needs about ", "--min-free-disk")
	if left := s.onNode(node, "ls -A /var/lib/stasis/checkpoints | grep "+string(checkpoint.UID)+" || true"); left != "" {
		t.Errorf("left on the node: %s", left)
	}
	s.unharmed("source")
	roomy()
	s.checkpoint("two", "source")
}
