package e2e

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// X5: memory is captured while the Pod runs on, and a restored Pod runs before it has it,
// where it is much and on its node, without being asked to.
func TestAPodWithMuchMemoryIsCapturedWhileItRunsAndRunsBeforeItHasItAll(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	const mib = 256
	source := s.holding("source", mib, "")
	source.Spec.NodeName = nodeOne
	s.create(source)
	sum := s.held("source")
	c := s.taken("memory", "source")
	// Its memory was read after the thaw.
	if !slices.ContainsFunc(c.Status.Phases, func(p checkpointv1alpha1.PhaseTiming) bool { return p.Name == "memory" }) {
		t.Errorf("its phases were %+v", c.Status.Phases)
	}
	if how := c.Status.Capture; how == nil || how.Mode != "cow" || how.Reason != "" {
		t.Errorf("its memory was captured %+v", how)
	}
	s.unharmed("source")
	if got := s.held("source"); got != sum {
		t.Errorf("the source's memory is another: %s, and was %s", got, sum)
	}
	restored := s.holding("restored", mib, "memory")
	restored.Spec.NodeSelector = map[string]string{corev1.LabelHostname: nodeOne}
	s.create(restored)
	if got := s.held("restored"); got != sum {
		t.Errorf("the memory is another: %s, and was %s", got, sum)
	}
	s.unharmed("restored")
	s.waitEvent(s.pod("restored"), checkpointv1alpha1.EventMemoryRestored)
}
