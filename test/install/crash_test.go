package install

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

func stopped(t *testing.T, _ *story) {
	inTheFreeze(t, "stopped", "kill -TERM "+agentPID(t))
	if c := outcome(t, "stopped"); c.Status != metav1.ConditionTrue {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
	kubectl(t, "delete", "podcheckpoint", "stopped")
	harmless(t)
	unrestarted(t)
}

// killed has CRIU outlive the agent's container: killed at the wrong moment it would
// take the captured process along.
func killed(t *testing.T, _ *story) {
	ready(t)
	inTheFreeze(t, "killed", "kill -9 "+agentPID(t))
	c := outcome(t, "killed")
	if c.Reason != v1alpha1.ReasonCheckpointFailed || !strings.Contains(c.Message, "interrupted") {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
	harmless(t)
	unrestarted(t)
}

func containerdKilled(t *testing.T, _ *story) {
	ready(t)
	inTheFreeze(t, "without-containerd", "kill -9 "+containerdPID(t))
	if c := outcome(t, "without-containerd"); c.Status != metav1.ConditionTrue {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
	kubectl(t, "delete", "podcheckpoint", "without-containerd")
	harmless(t)
	unrestarted(t)
}

// makeBig makes a Pod with enough memory for its checkpoint to take a while, and
// a second container that ticks.
func makeBig(t *testing.T) {
	t.Helper()
	seconds := int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "big"},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &seconds,
			Containers: []corev1.Container{
				{Name: "memory", Image: "localhost/busybox:1", Command: []string{"sh", "-c", "(head -c 400000000 /dev/urandom; echo; sleep 999999) | tail -c 400000000 >/dev/null"}},
				{Name: "tick", Image: "localhost/busybox:1", Command: []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"}},
			},
		},
	}
	if err := it.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "wait", "--for=condition=Ready", "pod/big", "--timeout=60s")
	eventually(t, "the memory is filled", func() error {
		out, err := it.OnNode(t.Context(), nodeName, "for s in /proc/[0-9]*/statm; do read _ rss _ <$s && echo $rss; done 2>/dev/null | sort -n | tail -n 1")
		if err != nil {
			return err
		}
		if pages, err := strconv.Atoi(strings.TrimSpace(out)); err != nil || pages < 90000 {
			return fmt.Errorf("largest process has %s pages", strings.TrimSpace(out))
		}
		return nil
	})
}

// isFrozen is a shell command that says whether the journal names a frozen Pod. It
// starts no process.
const isFrozen = "{ set -- /run/stasis/frozen/*.json; test -e \"$1\"; }"

// inTheFreeze begins a checkpoint of the Pod big and runs a command on the node
// while the Pod is frozen: the journal says when. It is looked at without a pause: a
// Pod stands still for a tenth of a second, which nobody may sleep through.
func inTheFreeze(t *testing.T, name, command string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		out, err := it.OnNode(t.Context(), nodeName, "n=0; until "+isFrozen+"; do n=$((n+1)); test $n -lt 30000000; done; "+command) // a minute and more
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		done <- err
	}()
	pcp := &v1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: v1alpha1.PodCheckpointSpec{SourcePodName: "big"}}
	if err := it.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("%s: %v", command, err)
	}
}

// harmless checks that the Pod big runs on and that nothing of a checkpoint is
// left on the node.
func harmless(t *testing.T) {
	t.Helper()
	goesOn(t, "big", "tick")
	var pod corev1.Pod
	if err := it.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "big"}, &pod); err != nil {
		t.Fatal(err)
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == v1alpha1.PodConditionCheckpointing {
			t.Errorf("the Pod still says that it is being checkpointed: %+v", c)
		}
	}
	// A record goes after the outcome that is on it has been written to the object.
	eventually(t, "nothing of it is left on the node", func() error {
		left, err := it.OnNode(t.Context(), nodeName, "find /var/lib/stasis/checkpoints /var/lib/stasis/records /var/lib/stasis/storing -mindepth 1 ! -name .copies; ls /run/stasis/frozen/*.json 2>/dev/null || true")
		if err == nil && strings.TrimSpace(left) != "" {
			err = fmt.Errorf("left: %s", left)
		}
		return err
	})
}

// unrestarted checks that no container of the Pod big was started again.
func unrestarted(t *testing.T) {
	t.Helper()
	var pod corev1.Pod
	if err := it.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "big"}, &pod); err != nil {
		t.Fatal(err)
	}
	for _, s := range pod.Status.ContainerStatuses {
		if s.RestartCount != 0 || s.State.Running == nil {
			t.Errorf("container %s: %d restarts, state %+v", s.Name, s.RestartCount, s.State)
		}
	}
}
