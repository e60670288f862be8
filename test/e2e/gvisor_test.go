package e2e

import (
	"testing"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
)

// C3: a Pod of gVisor is checkpointed as any other and goes on, on its node and on the
// other, by its engine's RuntimeClass, through the same objects.
func TestAPodOfGVisorIsCheckpointedAndRestoredOnBothNodes(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").RuntimeClass(classOfGVisor).On(nodeOne).Obj())
	s.countsOn("counters", 50)
	one := s.checkpoint("one", "counters")
	if e := one.Status.Engine; e == nil || e.Name != "gvisor" || e.Version == "" {
		t.Errorf("the checkpoint is of the engine %+v", e)
	}
	s.countsOn("counters", 20)
	s.unharmed("counters")
	source := map[string][]counters.Line{"a": s.counted("counters", "a"), "b": s.counted("counters", "b")}
	for name, node := range map[string]string{"here": nodeOne, "there": nodeTwo} {
		restored := s.running(Counters(name).RuntimeClass(classOfGVisor).RestoreFrom("one").On(node).Obj())
		if class := restored.Spec.RuntimeClassName; class == nil || *class != checkpointv1alpha1.RuntimeClassGVisor {
			t.Errorf("pod %s has runtime class %v", name, class)
		}
		s.countsOn(name, 50)
		s.unharmed(name)
		for _, program := range []string{"a", "b"} {
			if _, _, err := counters.Continues(source[program], s.counted(name, program), s.window(one)); err != nil {
				t.Errorf("pod %s, program %s: %v", name, program, err)
			}
		}
	}
}
