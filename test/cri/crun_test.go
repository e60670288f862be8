package cri_test

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// crunHandler is of the node as it was before Stasis; restored Pods are runc's.
const crunHandler = "crun"

func TestAPodOfCrunIsCapturedAndGoesOnUnderRunc(t *testing.T) {
	n := theNode
	configs := func() []*runtimeapi.ContainerConfig {
		shared := n.sharedDirectory(t, "/s")
		all := []*runtimeapi.ContainerConfig{
			container("a", `echo before > /s/file; echo layer > /layer; echo shm > /dev/shm/file; `+counting, shared),
			container("b", `exec 3>>/s/log; i=0; while :; do for k in 1 2 3 4 5 6 7 8 9 10; do i=$((i+1)); echo $i >&3; done; echo $i; usleep 10000; done`, shared),
		}
		// As a kubelet has it; crun masks a directory by one of the host's.
		all[0].Linux.SecurityContext.MaskedPaths = []string{"/proc/keys", "/proc/acpi", "/sys/firmware"}
		return all
	}
	source := n.run(t, crunHandler, configs()...)
	source.numbers(t, "a", 20)
	source.numbers(t, "b", 20)
	dir, m := source.checkpoint(t)
	if m.Engine.Name != "criu" || m.Runtime.Name != "crun" {
		t.Errorf("the manifest has engine %v, runtime %v", m.Engine, m.Runtime)
	}
	a, b := source.numbers(t, "a", 0), source.numbers(t, "b", 0)
	source.goesOn(t, "a")
	source.numbers(t, "b", len(b)+10)

	restored := n.restore(t, dir, configs()...)
	continues(t, "a", restored.numbers(t, "a", 5)[0], a, 1)
	continues(t, "b", restored.numbers(t, "b", 5)[0], b, 10)
	for file, want := range map[string]string{"/s/file": "before", "/layer": "layer", "/dev/shm/file": "shm"} {
		if got := restored.exec(t, "a", "cat "+file); got != want {
			t.Errorf("%s holds %q", file, got)
		}
	}
	if got := restored.exec(t, "a", "ls -A /proc/acpi /sys/firmware | grep -v : | grep . ; wc -c < /proc/keys; touch /proc/acpi/x 2>&1 | grep -c Read-only"); got != "0\n1" {
		t.Errorf("what is masked is %q", got)
	}
	if got := restored.exec(t, "a", "hostname"); got != restored.name {
		t.Errorf("the restored Pod calls itself %q, not %q", got, restored.name)
	}

	// Then it is runc's, and captured as any other.
	dir, m = restored.checkpoint(t)
	if m.Runtime.Name != "runc" {
		t.Errorf("the restored Pod is %v's", m.Runtime)
	}
	a = restored.numbers(t, "a", 0)
	again := n.restore(t, dir, configs()...)
	continues(t, "a", again.numbers(t, "a", 5)[0], a, 1)
}

func TestTheMemoryOfAPodOfCrunIsReadWhileItRuns(t *testing.T) {
	n := theNode
	source := n.run(t, crunHandler, n.hammer(t, "a", 64))
	source.rounds(t, "a", 3)
	dir, m := source.checkpointWith(t, map[string]string{"capture": "cow"})
	if m.Capture == nil || m.Capture.Mode != "cow" {
		t.Errorf("it was captured %+v", m.Capture)
	}
	source.rounds(t, "a", 3)
	n.restore(t, dir, source.configs...).rounds(t, "a", 3)
}
