package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
)

// The two nodes of the cluster.
const (
	nodeOne = "node-1"
	nodeTwo = "node-2"
)

// On asks the scheduler for a node.
func (b *podBuilder) On(node string) *podBuilder {
	b.pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node}
	return b
}

// copyOf is where a node keeps a copy of another's checkpoint.
func copyOf(c *checkpointv1alpha1.PodCheckpoint) string {
	return "/var/lib/stasis/checkpoints/.copies/" + string(c.UID)
}

// X1: the data come from the node that holds them, and the Pod goes on.
func TestACheckpointOfOneNodeIsRestoredOnAnother(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").On(nodeOne).Obj())
	s.running(MakePod("subject").Subject().EmptyDir("data", "/data", corev1.StorageMediumDefault).On(nodeOne).Obj())
	s.countsOn("counters", 50)
	if _, err := s.exec("subject", "subject", "subject", "get", "/state"); err != nil {
		t.Fatal(err)
	}
	one, two := s.checkpoint("one", "counters"), s.checkpoint("two", "subject")
	if one.Status.NodeName != nodeOne || one.Status.Requires == nil || len(one.Status.Requires.CPUFeatures) == 0 {
		t.Fatalf("on %s, requires %+v", one.Status.NodeName, one.Status.Requires)
	}
	var before, after report
	s.ask("subject", "/state", &before)
	source := map[string][]counters.Line{"a": s.counted("counters", "a"), "b": s.counted("counters", "b")}
	s.remove("counters")
	s.remove("subject")

	pod := s.create(Counters("restored").RestoreFrom("one").On(nodeTwo).Obj())
	other := s.create(MakePod("subject-2").Subject().EmptyDir("data", "/data", corev1.StorageMediumDefault).RestoreFrom("two").On(nodeTwo).Obj())
	s.waitReady("restored")
	s.waitReady("subject-2")
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointFetched, "have come from node "+nodeOne)
	s.waitEvent(other, checkpointv1alpha1.EventCheckpointFetched, "have come from node "+nodeOne)
	if on := s.pod("restored").Spec.NodeName; on != nodeTwo {
		t.Fatalf("restored on %s", on)
	}
	s.countsOn("restored", 50)
	s.unharmed("restored")
	for _, program := range []string{"a", "b"} {
		if _, _, err := counters.Continues(source[program], s.counted("restored", program), s.window(one)); err != nil {
			t.Errorf("program %s: %v", program, err)
		}
	}
	s.ask("subject-2", "/state", &after)
	if after.Nonce != before.Nonce || after.Tallies[0] <= before.Tallies[0] || after.Hostname != "subject-2" {
		t.Errorf("the subject went from %+v to %+v", before, after)
	}

	// Another from the same copy, and from where the data are: nothing is fetched then.
	again := s.running(Counters("again").RestoreFrom("one").On(nodeTwo).Obj())
	s.countsOn(again.Name, 10)
	if home := s.running(Counters("home").RestoreFrom("one").Obj()); home.Spec.NodeName != nodeOne {
		t.Errorf("where it has the choice it is restored on %s, the data are on %s", home.Spec.NodeName, nodeOne)
	}

	// P29: the copy is a cache, and goes after its object.
	s.onNode(nodeTwo, "test -f "+copyOf(one)+"/manifest.json; test -f "+copyOf(two)+"/manifest.json")
	if err := s.Delete(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	s.eventually("the object is gone, and waits for no copy", func() error {
		if err := s.Get(t.Context(), s.key("one"), &checkpointv1alpha1.PodCheckpoint{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("reading it: %v", err)
		}
		return nil
	})
	s.within(3*time.Minute, "the copy is gone", func() error {
		_, err := s.OnNode(t.Context(), nodeTwo, "test ! -e "+copyOf(one))
		return err
	})
	s.countsOn("restored", 10)
}

// P21, P25: what a restored Pod requires of its node is no part of what the next
// checkpoint of it says.
func TestARestoredPodIsCheckpointedThereAndRestoredBack(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").On(nodeOne).Obj())
	s.countsOn("counters", 20)
	s.checkpoint("one", "counters")
	s.remove("counters")
	s.running(Counters("there").RestoreFrom("one").On(nodeTwo).Obj())
	s.countsOn("there", 20)
	back := s.checkpoint("two", "there")
	if affinity := back.Status.CheckpointedPodTemplate.Spec.Affinity; affinity != nil {
		t.Errorf("the template has the affinity %+v", affinity)
	}
	source := s.counted("there", "a")
	s.remove("there")
	s.running(Counters("back").RestoreFrom("two").On(nodeOne).Obj())
	s.countsOn("back", 20)
	if lines := s.counted("back", "a"); lines[0].Count < source[0].Count || lines[0].Nonce != source[0].Nonce {
		t.Errorf("it goes on with %+v", lines[0])
	}
}

// fetchMiB is how much a Pod holds that is fetched while the link is cut.
func fetchMiB(t *testing.T) int {
	value := os.Getenv("STASIS_E2E_FETCH_MIB")
	if value == "" {
		return 256
	}
	mib, err := strconv.Atoi(value)
	if err != nil {
		t.Fatalf("STASIS_E2E_FETCH_MIB: %v", err)
	}
	return mib
}

// X1: the link between two nodes' agents is cut in the middle of a fetch and comes
// back after the connection has been given up. The Pod is told how far it is
// meanwhile, and no byte that was there comes again.
func TestAFetchWhoseLinkIsCutGoesOnWhereItWas(t *testing.T) {
	s := newScene(t)
	mib := fetchMiB(t)
	build := func(name string) *podBuilder {
		return MakePod(name).
			Shell("main", fmt.Sprintf("dd if=/dev/urandom of=/data/bulk bs=1M count=%d 2>/dev/null; md5sum /data/bulk > /data/sum; echo filled > /tmp/marker; i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done", mib)).
			EmptyDir("data", "/data", corev1.StorageMediumDefault)
	}
	s.running(build("source").On(nodeOne).Obj())
	s.within(3*time.Minute, "the Pod is filled", func() error {
		_, err := s.exec("source", "main", "test", "-e", "/tmp/count")
		return err
	})
	one := s.checkpoint("one", "source")
	s.remove("source")
	agent := s.agentOf("one")

	// What is forwarded to the agent of node 1 goes nowhere, as soon as a part is here.
	hole := "blackhole " + agent.Status.PodIP + "/32"
	mend := func(ctx context.Context) error {
		_, err := s.OnNode(ctx, nodeTwo, "ip route del "+hole+" 2>/dev/null || true")
		return err
	}
	s.Cleanup(func() {
		if err := mend(context.Background()); err != nil {
			t.Error(err)
		}
	})
	cut := make(chan error, 1)
	go func() {
		_, err := s.OnNode(t.Context(), nodeTwo, fmt.Sprintf(
			"dir=/var/lib/stasis/checkpoints/.copies/.fetching-%s; n=0; until [ \"$(du -sk $dir 2>/dev/null | cut -f1)\" -gt 20000 ] 2>/dev/null; do n=$((n+1)); [ $n -lt 4000 ] || exit 1; sleep 0.01; done; ip route add %s", one.UID, hole))
		cut <- err
	}()
	pod := s.create(build("restored").RestoreFrom("one").On(nodeTwo).Obj())
	if err := <-cut; err != nil {
		t.Fatalf("nothing came: %v", err)
	}
	if _, err := s.OnNode(t.Context(), nodeTwo, "test ! -e "+copyOf(one)); err != nil {
		t.Fatalf("all had come before the link was cut: %v", err)
	}
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointFetching, "are being fetched from node "+nodeOne, " % of ")
	s.eventually("the condition tells that it does not go on", func() error {
		if c := s.restoringCondition("restored"); c == nil || c.Reason != checkpointv1alpha1.EventCheckpointFetchFailed || !strings.Contains(c.Message, "does not go on") {
			return fmt.Errorf("%+v", c)
		}
		return nil
	})
	if err := mend(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.within(2*time.Minute, "the Pod is restored", func() error {
		for _, c := range s.pod("restored").Status.ContainerStatuses {
			if c.State.Running != nil {
				return nil
			}
		}
		return errPhase(s.pod("restored"))
	})
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointFetched, "a connection that broke")
	bytes, received, broken := s.fetched(nodeTwo, one)
	t.Logf("%d bytes, %d received, %d connections broke", bytes, received, broken)
	if extra := received - bytes; broken == 0 || extra < 0 || extra > 1<<20 {
		t.Errorf("%d bytes came of %d, over %d connections that broke", received, bytes, broken)
	}
	if out, err := s.exec("restored", "main", "md5sum", "-c", "/data/sum"); err != nil {
		t.Errorf("%s: %v", out, err)
	}
	s.unharmed("restored")
}

var fetchedLine = regexp.MustCompile(`msg="a checkpoint has been fetched".* bytes=(\d+) received=(\d+) brokenConnections=(\d+)`)

// fetched reads in a node's agent's log what came of a checkpoint.
func (s *scene) fetched(node string, c *checkpointv1alpha1.PodCheckpoint) (bytes, received, broken int64) {
	s.Helper()
	log, err := s.Kubectl(s.Context(), "-n", "stasis-system", "logs", s.agentOn(node).Name, "-c", "agent")
	if err != nil {
		s.Fatal(err)
	}
	for line := range strings.Lines(log) {
		if m := fetchedLine.FindStringSubmatch(line); m != nil && strings.Contains(line, string(c.UID)) {
			for i, into := range []*int64{&bytes, &received, &broken} {
				if *into, err = strconv.ParseInt(m[i+1], 10, 64); err != nil {
					s.Fatal(err)
				}
			}
			return bytes, received, broken
		}
	}
	s.Fatalf("the agent of %s does not log that it fetched %s", node, c.Name)
	return 0, 0, 0
}

// agentOn is the Pod of a node's agent.
func (s *scene) agentOn(node string) *corev1.Pod {
	s.Helper()
	var pods corev1.PodList
	if err := s.List(s.Context(), &pods, client.InNamespace("stasis-system"), client.MatchingLabels{"app.kubernetes.io/component": "agent"}); err != nil {
		s.Fatal(err)
	}
	for i := range pods.Items {
		if pods.Items[i].Spec.NodeName == node && pods.Items[i].DeletionTimestamp == nil {
			return &pods.Items[i]
		}
	}
	s.Fatalf("node %s has no agent", node)
	return nil
}

// X1, P22: a node whose CPU lacks what a checkpoint needs. That node 2 is one is the
// word of its agent alone, as it is of any node.
func TestANodeOfAnotherCPUIsNeverChosenAndWhatItLacksIsNamed(t *testing.T) {
	s := newScene(t)
	s.running(Counters("counters").On(nodeOne).Obj())
	s.countsOn("counters", 20)
	one := s.checkpoint("one", "counters")
	lacks := one.Status.Requires.CPUFeatures[len(one.Status.Requires.CPUFeatures)-1]
	s.lesser(nodeTwo, lacks)

	says := fmt.Sprintf("node %q lacks the CPU feature %s", nodeTwo, lacks)
	for _, pod := range []*podBuilder{Counters("named").RestoreFrom("one").Node(nodeTwo), Counters("selected").RestoreFrom("one").On(nodeTwo)} {
		if err := s.refused(s.Cluster, pod.Obj(), says); !apierrors.IsForbidden(err) {
			t.Errorf("the refusal is not Forbidden: %v", err)
		}
	}
	if _, err := s.Plugin(t.Context(), "restore", "one", "--node", nodeTwo, "-n", s.namespace); err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("kubectl restore --node %s: %v", nodeTwo, err)
	}
	// A full node 1 does not make node 2 a choice.
	s.cordon(nodeOne, true)
	pod := s.create(Counters("waits").RestoreFrom("one").Obj())
	s.waitEvent(pod, "FailedScheduling")
	s.staysPending("waits")
	s.cordon(nodeOne, false)
	if waited := s.waitReady("waits"); waited.Spec.NodeName != nodeOne {
		t.Errorf("restored on %s", waited.Spec.NodeName)
	}
	// What ran on the lesser node runs on both.
	s.running(Counters("small").On(nodeTwo).Obj())
	s.countsOn("small", 20)
}

// cordon keeps the scheduler off a node, or lets it come back.
func (s *scene) cordon(node string, off bool) {
	s.Helper()
	verb := "uncordon"
	if off {
		verb = "cordon"
		s.Cleanup(func() { _, _ = s.Kubectl(context.Background(), "uncordon", node) })
	}
	if _, err := s.Kubectl(s.Context(), verb, node); err != nil {
		s.Fatal(err)
	}
}

// lesser has a node's agent say that its CPU lacks a feature, until the test ends: that
// node gets a DaemonSet of its own.
func (s *scene) lesser(node, feature string) {
	s.Helper()
	const name = "stasis-agent-lesser"
	text, err := s.Kubectl(s.Context(), "-n", "stasis-system", "get", "daemonset", "stasis-agent", "-o", "json")
	if err != nil {
		s.Fatal(err)
	}
	var set map[string]any
	if err := json.Unmarshal([]byte(text), &set); err != nil {
		s.Fatal(err)
	}
	set["metadata"] = map[string]any{"name": name, "namespace": "stasis-system"}
	delete(set, "status")
	spec := set["spec"].(map[string]any)
	template := spec["template"].(map[string]any)
	labels := map[string]any{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "agent", "lesser": "true"}
	spec["selector"] = map[string]any{"matchLabels": labels}
	template["metadata"] = map[string]any{"labels": labels}
	pod := template["spec"].(map[string]any)
	pod["nodeSelector"] = map[string]any{corev1.LabelHostname: node}
	container := pod["containers"].([]any)[0].(map[string]any)
	args, _ := container["args"].([]any)
	container["args"] = append(args, "--lacks-cpu-features="+feature)
	changed, err := json.Marshal(set)
	if err != nil {
		s.Fatal(err)
	}
	file := s.TempDir() + "/lesser.json"
	if err := os.WriteFile(file, changed, 0o600); err != nil {
		s.Fatal(err)
	}
	run := func(ctx context.Context, args ...string) {
		s.Helper()
		if _, err := s.Kubectl(ctx, append([]string{"-n", "stasis-system"}, args...)...); err != nil {
			s.Error(err)
		}
	}
	where := func(ctx context.Context, affinity string) {
		s.Helper()
		run(ctx, "patch", "daemonset", "stasis-agent", "--type=merge", "-p", `{"spec":{"template":{"spec":{"affinity":`+affinity+`}}}}`)
		run(ctx, "rollout", "status", "daemonset", "stasis-agent", "--timeout=120s")
	}
	s.Cleanup(func() {
		run(context.Background(), "delete", "daemonset", name, "--wait", "--ignore-not-found")
		where(context.Background(), "null")
	})
	where(s.Context(), fmt.Sprintf(`{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":%q,"operator":"NotIn","values":[%q]}]}]}}}`, corev1.LabelHostname, node))
	run(s.Context(), "apply", "-f", file)
	run(s.Context(), "rollout", "status", "daemonset", name, "--timeout=120s")
	s.eventually("the agent says what its node lacks", func() error {
		lease, err := s.Kubectl(s.Context(), "-n", "stasis-system", "get", "lease", "agent-"+node, "-o", `jsonpath={.metadata.annotations.checkpoint\.podstasis\.dev/agent-platform}`)
		if err == nil && (lease == "" || strings.Contains(lease, `"`+feature+`"`)) {
			err = errors.New(lease)
		}
		return err
	})
	s.eventually("the node has lost the label of its neighbour's class", func() error {
		var one, other corev1.Node
		for name, into := range map[string]*corev1.Node{nodeOne: &one, node: &other} {
			if err := s.Get(s.Context(), client.ObjectKey{Name: name}, into); err != nil {
				return err
			}
		}
		missing := 0
		for label := range one.Labels {
			if _, has := other.Labels[label]; !has && strings.HasPrefix(label, checkpointv1alpha1.LabelRunsPrefix) {
				missing++
			}
		}
		if missing == 0 {
			return fmt.Errorf("labels %v and %v", one.Labels, other.Labels)
		}
		return nil
	})
}
