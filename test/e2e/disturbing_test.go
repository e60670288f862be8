package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// The tests of this file restart parts of Stasis. They do not run in parallel
// with others.

// P3: terminal is terminal.
func TestCheckpointsStayAsTheyEndedWhenAllOfStasisIsRestarted(t *testing.T) {
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 20)
	names := []string{"ready", "failed", "replaced"}
	s.checkpoint("ready", "counters")
	s.ask4Checkpoint("failed", "counters", func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.Options = map[string]string{"no-such-option": "1"} })
	s.ask4Checkpoint("replaced", "counters", func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.SourcePodUID = new(types.UID("gone-long-ago")) })
	before := map[string]*checkpointv1alpha1.PodCheckpoint{}
	for _, name := range names {
		before[name], _ = s.terminal(name)
	}
	if ready := before["failed"].Status.Conditions[0]; ready.Status != metav1.ConditionFalse {
		t.Fatalf("the checkpoint with an unknown option ended with %s: %s", ready.Reason, ready.Message)
	}

	for _, args := range [][]string{
		{"rollout", "restart", "daemonset,deployment"},
		{"rollout", "status", "deployment", "--timeout=120s"},
		{"rollout", "status", "daemonset", "--timeout=120s"},
	} {
		if _, err := s.Kubectl(t.Context(), append([]string{"-n", "stasis-system"}, args...)...); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(2 * time.Second) // what a starting agent or controller does, it does at once
	for _, name := range names {
		after, _ := s.terminal(name)
		if diff := cmp.Diff(before[name], after); diff != "" {
			t.Errorf("podcheckpoint %s changed (-before +after):\n%s", name, diff)
		}
	}
	s.unharmed("counters")
	// And what was ready is.
	s.running(Counters("restored").RestoreFrom("ready").Obj())
	s.countsOn("restored", 20)
	s.unharmed("restored")
}

// P33: without the controller nothing that is not Stasis' own is held up.
func TestWithoutTheControllerOrdinaryPodsAreMadeAsBefore(t *testing.T) {
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	s.checkpoint("one", "source")
	scale := func(ctx context.Context, replicas string) {
		for _, args := range [][]string{
			{"scale", "deployment", "stasis-controller", "--replicas=" + replicas},
			{"rollout", "status", "deployment", "--timeout=120s"},
		} {
			if _, err := s.Kubectl(ctx, append([]string{"-n", "stasis-system"}, args...)...); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(func() { scale(context.Background(), "2") }) // also for the tests that follow
	scale(t.Context(), "0")
	// A restore is not let through unchecked. The API server may know the
	// controller's address for a moment longer.
	s.eventually("a restoring Pod is refused", func() error {
		pod := MakePod("unchecked").Shell("main", idle).RestoreFrom("one").Obj()
		pod.Namespace = s.namespace
		if err := s.Create(t.Context(), pod, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
			return fmt.Errorf("its creation: %v", err)
		}
		return nil
	})
	s.running(MakePod("ordinary").Shell("main", idle).Obj())
	s.unharmed("source")
	scale(t.Context(), "2")
	restored := MakePod("restored").Shell("main", idle).RestoreFrom("one").Obj()
	s.createStubbornly(restored)
	s.waitReady("restored")
}
