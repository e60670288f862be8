package install

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

// outcome waits for a PodCheckpoint to end.
func outcome(t *testing.T, name string) *metav1.Condition {
	t.Helper()
	var c *metav1.Condition
	eventually(t, "PodCheckpoint "+name+" ends", func() error {
		var pcp v1alpha1.PodCheckpoint
		if err := it.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &pcp); err != nil {
			return err
		}
		c = meta.FindStatusCondition(pcp.Status.Conditions, v1alpha1.PodCheckpointReady)
		if c == nil || c.Status != metav1.ConditionTrue && c.Reason != v1alpha1.ReasonCheckpointFailed {
			return fmt.Errorf("it is %v", c)
		}
		return nil
	})
	return c
}

// create asks for a checkpoint.
func create(t *testing.T, name, pod string) {
	t.Helper()
	pcp := &v1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: v1alpha1.PodCheckpointSpec{SourcePodName: pod}}
	if err := it.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, name string) *v1alpha1.PodCheckpoint {
	t.Helper()
	var pcp v1alpha1.PodCheckpoint
	if err := it.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &pcp); err != nil {
		t.Fatal(err)
	}
	return &pcp
}

// goesOn checks that a container prints more and more.
func goesOn(t *testing.T, pod, container string) {
	t.Helper()
	last := func() string { return kubectl(t, "logs", pod, "-c", container, "--tail=1") }
	was := last()
	eventually(t, pod+" goes on", func() error {
		if now := last(); now == was {
			return fmt.Errorf("last line is still %s", now)
		}
		return nil
	})
}

// ready waits for the agent.
func ready(t *testing.T) {
	t.Helper()
	kubectl(t, "-n", "stasis-system", "rollout", "status", "daemonset", "stasis-agent", "--timeout=120s")
	eventually(t, "the agent serves", func() error {
		_, err := it.OnNode(t.Context(), nodeName, "test -S /run/stasis/cri.sock && ! "+isFrozen)
		return err
	})
}

// agentPID is the agent's process. Process IDs are the machine's, and so is what
// ctr shows.
func agentPID(t *testing.T) string { return pids(t, "agent")[0] }

// pids are the processes of a component's Pods. A status names the container before for a
// moment after a new one was started.
func pids(t *testing.T, component string) (all []string) {
	t.Helper()
	eventually(t, "each "+component+" runs, and is known to", func() error {
		all = nil
		for _, id := range strings.Fields(kubectl(t, "-n", "stasis-system", "get", "pods", "-l", "app.kubernetes.io/component="+component,
			"-o", "jsonpath={.items[*].status.containerStatuses[0].containerID}")) {
			out, err := it.OnNode(t.Context(), nodeName, "ctr -n k8s.io tasks ls 2>/dev/null | awk '$1==\""+strings.TrimPrefix(id, "containerd://")+"\" && $3==\"RUNNING\" {print $2}'")
			if err != nil {
				return err
			}
			pid := strings.TrimSpace(out)
			if _, err := strconv.Atoi(pid); err != nil {
				return fmt.Errorf("container %s has the process %q", id, pid)
			}
			all = append(all, pid)
		}
		if len(all) == 0 {
			return errors.New("no container is known")
		}
		return nil
	})
	return all
}

// containerdPID is the process behind containerd's socket.
func containerdPID(t *testing.T) string {
	t.Helper()
	// Other nodes' containerds are seen too: ours is the one with this node's mounts.
	return onNodeWord(t, "me=$(readlink /proc/self/ns/mnt); for p in /proc/[0-9]*; do [ \"$(readlink $p/ns/mnt)\" = \"$me\" ] && [ \"$(cat $p/comm)\" = containerd ] && basename $p; done 2>/dev/null | head -n 1")
}

func onNodeWord(t *testing.T, script string) string {
	t.Helper()
	word := strings.TrimSpace(onNode(t, script))
	if _, err := strconv.Atoi(word); err != nil {
		t.Fatalf("no process: %q", word)
	}
	return word
}

func onNode(t *testing.T, script string) string {
	t.Helper()
	out, err := it.OnNode(t.Context(), nodeName, script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := it.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
