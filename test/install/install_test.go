// Package install tests that Stasis comes onto a node, stays through the death of
// its parts, and goes from it again, on a cluster of one node that it has to
// itself. Needed are bin/devcluster, bin/kubectl and the images.
//
//	make test-install
package install

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/e2e/cluster"
)

const (
	nodeName  = "node-1"
	namespace = "default"
	patience  = 90 * time.Second
)

var it *cluster.Cluster

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	root, err := cluster.Root()
	if err != nil {
		return 1, err
	}
	if err := os.Chdir(root); err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	it, err = cluster.Up(ctx, root, filepath.Join(root, ".devcluster-install"), 1)
	defer func() { err = errors.Join(err, it.Down(context.Background())) }()
	if err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// TestInstallationLivesAndGoes is one story: each part starts from where the one
// before it left the node.
func TestInstallationLivesAndGoes(t *testing.T) {
	for _, part := range []struct {
		name string
		test func(*testing.T, *story)
	}{
		{"an install adds a handler and nothing else", installs},
		{"the agent reads Pods of its own node by name and nothing more", rights},
		{"an agent that starts again touches nothing", startsAgain},
		{"a stopped agent finishes its checkpoint first", stopped},
		{"a killed containerd does not disturb a checkpoint", containerdKilled},
		{"a killed agent leaves the Pod running and nothing on disk", killed},
		{"an uninstall waits for the last restored Pod and leaves the node as it was", uninstalls},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(t, &state) }) {
			it.Diagnose(context.Background(), os.Stderr)
			t.FailNow() // the rest would start from somewhere else
		}
	}
}

// story is what later parts need of earlier ones.
type story struct {
	before string // the container runtime's configuration before anything
}

var state story

func installs(t *testing.T, s *story) {
	s.before = onNode(t, "cd /etc/containerd && find . -type f | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	pid := containerdPID(t)
	if err := it.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if containerdPID(t) == pid {
		t.Error("containerd was not restarted, though it has a new handler")
	}
	changed := onNode(t, "cd /etc/containerd && find . -type f ! -path ./conf.d/stasis.toml | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	if changed != s.before {
		t.Errorf("other files of containerd's configuration changed:\n%s\nwas\n%s", changed, s.before)
	}
	if out := onNode(t, "cat /opt/stasis/etc/runtime.json; stat -c %a /run/stasis/agent.sock /run/stasis/cri.sock /var/lib/stasis"); out != "{\"runtime\":\"/usr/local/bin/runc\"}\n600\n600\n700\n" {
		t.Errorf("on the node:\n%s", out)
	}
	makeBig(t)
}

func rights(t *testing.T, _ *story) {
	agent, err := it.As("system:serviceaccount:stasis-system:stasis-agent")
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.List(t.Context(), &corev1.SecretList{}); err == nil {
		t.Error("the agent may list Secrets")
	}
	if err := agent.List(t.Context(), &corev1.PodList{}); err == nil {
		t.Error("the agent may list Pods")
	}
	// Its rights to write are for tokens that are bound to a node.
	pcp := &v1alpha1.PodCheckpoint{}
	pcp.Namespace, pcp.Name, pcp.Spec.SourcePodName = namespace, "of-nobody", "nobody"
	if err := it.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	defer it.Delete(context.Background(), pcp)
	// A patch: the controller ends the object at about the same time.
	claim := client.RawPatch(types.MergePatchType, []byte(`{"status":{"nodeName":"`+nodeName+`"}}`))
	if err := agent.Status().Patch(t.Context(), pcp.DeepCopy(), claim); err == nil || !strings.Contains(err.Error(), "token names no node") {
		t.Errorf("a token without a node: %v", err)
	}
}

func startsAgain(t *testing.T, _ *story) {
	const installed = "find /opt/stasis /etc/containerd -printf '%p %T@\\n' | sort"
	pid, files := containerdPID(t), onNode(t, installed)
	kubectl(t, "-n", "stasis-system", "rollout", "restart", "daemonset", "stasis-agent")
	kubectl(t, "-n", "stasis-system", "rollout", "status", "daemonset", "stasis-agent", "--timeout=120s")
	if now := containerdPID(t); now != pid {
		t.Errorf("containerd was restarted: process %s, was %s", now, pid)
	}
	if now := onNode(t, installed); now != files {
		t.Errorf("files were touched:\n%s\nwere\n%s", now, files)
	}
}

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

func uninstalls(t *testing.T, s *story) {
	ready(t)
	for _, file := range []string{"pod", "podcheckpoint"} {
		kubectl(t, "apply", "-f", "config/samples/"+file+".yaml")
		kubectl(t, "wait", "--for=condition=Ready", "-f", "config/samples/"+file+".yaml", "--timeout=90s")
	}
	kubectl(t, "apply", "-f", "config/samples/restored-pod.yaml")
	kubectl(t, "wait", "--for=condition=Ready", "-f", "config/samples/restored-pod.yaml", "--timeout=90s")

	kubectl(t, "delete", "podcheckpoints", "--all", "--timeout=60s")
	if left := onNode(t, "ls -A /var/lib/stasis/checkpoints"); left != "" {
		t.Errorf("checkpoints of deleted objects are left: %s", left)
	}
	kubectl(t, "delete", "-k", "config/default", "--ignore-not-found", "--timeout=120s")
	kubectl(t, "apply", "-k", "config/uninstall")
	eventually(t, "the uninstall says what it waits for", func() error {
		out, err := it.Kubectl(t.Context(), "-n", "stasis-uninstall", "logs", "daemonset/stasis-uninstall")
		if err != nil || !strings.Contains(out, "default/counter-restored") {
			return fmt.Errorf("%s %w", out, err)
		}
		return nil
	})
	if out := onNode(t, "ls /opt/stasis/bin/stasis-runtime /etc/containerd/conf.d/stasis.toml"); !strings.Contains(out, "stasis.toml") {
		t.Errorf("taken away under a restored Pod: %s", out)
	}
	goesOn(t, "counter-restored", "a")

	kubectl(t, "delete", "pod", "counter-restored", "--timeout=60s")
	kubectl(t, "-n", "stasis-uninstall", "rollout", "status", "daemonset/stasis-uninstall", "--timeout=180s")
	now := onNode(t, "cd /etc/containerd && find . -type f | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	if now != s.before {
		t.Errorf("containerd's configuration is\n%s\nwas\n%s", now, s.before)
	}
	if left := onNode(t, "ls -d /opt/stasis /run/stasis /var/lib/stasis 2>/dev/null || true"); left != "" {
		t.Errorf("left on the node: %s", left)
	}
	kubectl(t, "delete", "-k", "config/uninstall", "--timeout=60s")
	goesOn(t, "counter", "a")
	kubectl(t, "run", "ordinary", "--image=localhost/busybox:1", "--restart=Never", "--", "sleep", "1")
	kubectl(t, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/ordinary", "--timeout=60s")
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

// isFrozen is a shell command that says whether the journal names a frozen Pod.
const isFrozen = "ls /run/stasis/frozen/*.json >/dev/null 2>&1"

// inTheFreeze begins a checkpoint of the Pod big and runs a command on the node
// while the Pod is frozen: the journal says when.
func inTheFreeze(t *testing.T, name, command string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		out, err := it.OnNode(t.Context(), nodeName, "for i in $(seq 6000); do "+isFrozen+" && break; sleep 0.01; done; "+isFrozen+" && "+command)
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
	if left := onNode(t, "ls -A /var/lib/stasis/checkpoints /var/lib/stasis/records | grep -v : || true; ls /run/stasis/frozen/*.json 2>/dev/null || true"); strings.TrimSpace(left) != "" {
		t.Errorf("left on the node: %s", left)
	}
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
func agentPID(t *testing.T) string {
	t.Helper()
	id := kubectl(t, "-n", "stasis-system", "get", "pods", "-l", "app.kubernetes.io/component=agent", "-o", "jsonpath={.items[0].status.containerStatuses[0].containerID}")
	return onNodeWord(t, "ctr -n k8s.io tasks ls 2>/dev/null | awk '$1==\""+strings.TrimPrefix(id, "containerd://")+"\" {print $2}'")
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
