package cri_test

import (
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestARestoredPodContinuesWhereItsSourceWasCaptured(t *testing.T) {
	n := theNode
	a, b := container("a", counting), container("b", `i=1000; while :; do i=$((i+1)); echo $i; usleep 10000; done`)
	source := n.run(t, "", a, b)
	source.numbers(t, "a", 20)
	source.numbers(t, "b", 20)

	dir, m := source.checkpoint(t)
	t.Logf("frozen for %v, phases %v, %d bytes", m.FreezeDuration, m.Phases, m.LogicalBytes())

	copied := n.prepareRestore(t, dir, a, b)
	for _, name := range []string{"a", "b"} {
		if s := copied.state(t, name); s != runtimeapi.ContainerState_CONTAINER_CREATED {
			t.Errorf("restored container %s is %v before its start", name, s)
		}
	}
	began := time.Now()
	copied.start(t)
	t.Logf("started both in %v", time.Since(began))
	for name, first := range map[string]int{"a": 1, "b": 1001} {
		restored := copied.numbers(t, name, 20)
		sourced := source.numbers(t, name, 20)
		if restored[0] < first+20 {
			t.Errorf("container %s began anew: %v", name, restored[:3])
		}
		for i, v := range restored {
			if v != restored[0]+i {
				t.Fatalf("container %s skipped or repeated: %v", name, restored)
			}
		}
		if !slices.Contains(sourced, restored[0]) {
			t.Errorf("container %s: the source never printed %d", name, restored[0])
		}
		for i, v := range sourced {
			if v != first+i {
				t.Fatalf("the source's container %s was disturbed: %v", name, sourced)
			}
		}
	}
	if got := copied.exec(t, "a", "hostname"); got != copied.name {
		t.Errorf("the restored Pod calls itself %q", got)
	}
}
