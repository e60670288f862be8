package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
)

// P6, P12, P25, A4: with the commands that users type.
func TestTheMainJobARunningPodIsCheckpointedAndRestoredTwiceAfterItIsGone(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 50)

	out, err := s.Plugin(s.Context(), "checkpoint", "counters", "--name", "one", "-n", s.namespace)
	if err != nil {
		t.Fatal(err)
	}
	checkpoint, _ := s.terminal("one")
	s.wantText("kubectl checkpoint", out, "podcheckpoint/one ready", checkpoint.Status.NodeName,
		checkpoint.Status.CheckpointLocation.NodeLocal.Path, fmt.Sprintf("(%d bytes)", checkpoint.Status.Size.LogicalBytes), "Frozen:")

	// P13: the source runs on, and its two programs still agree.
	s.countsOn("counters", 50)
	s.unharmed("counters")
	source := map[string][]counters.Line{"a": s.counted("counters", "a"), "b": s.counted("counters", "b")}
	s.remove("counters")

	first := map[string]uint64{}
	for _, pod := range []string{"counters-2", "counters-3"} {
		out, err := s.Plugin(s.Context(), "restore", "one", "--as", pod, "-n", s.namespace)
		if err != nil {
			t.Fatal(err)
		}
		s.wantText("kubectl restore", out, "pod/"+pod+" ready", checkpoint.Status.NodeName, "Restored in:")
		s.countsOn(pod, 50)
		s.unharmed(pod)
		for _, program := range []string{"a", "b"} {
			_, now, err := counters.Continues(source[program], s.counted(pod, program), s.window(checkpoint))
			if err != nil {
				t.Errorf("pod %s, program %s: %v", pod, program, err)
			}
			if was, known := first[program]; known && was != now {
				t.Errorf("program %s begins with %d in one restored Pod and with %d in another", program, was, now)
			}
			first[program] = now
		}
	}
	// Both programs are cut at one moment: they are never more than one exchange apart.
	if difference := int64(first["a"]) - int64(first["b"]); difference < -1 || difference > 1 {
		t.Errorf("a continues with %d, b with %d", first["a"], first["b"])
	}
}

// P12: many cuts, each at another point of the exchange; every restored pair must
// still agree.
func TestTwoContainersNeverDisagreeAfterARestore(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 20)
	const rounds = 4
	for round := range rounds {
		name := fmt.Sprintf("cut-%d", round)
		checkpoint := s.checkpoint(name, "counters")
		restored := s.create(Counters(name).RestoreFrom(name).Obj())
		s.waitReady(restored.Name)
		s.countsOn(restored.Name, 100) // s.counted fails on DISAGREE, on a skipped count and on another nonce
		s.unharmed(restored.Name)
		for _, program := range []string{"a", "b"} {
			if _, _, err := counters.Continues(s.counted("counters", program), s.counted(name, program), s.window(checkpoint)); err != nil {
				t.Errorf("round %d, program %s: %v", round, program, err)
			}
		}
		s.remove(restored.Name)
	}
	s.unharmed("counters")
}

// P13: whatever is asked of it, the source is not harmed: not by its Pod being
// checkpointed again and again, and not by a checkpoint that fails.
func TestTheSourceRunsOnUnharmed(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 20)
	for round := range 3 {
		s.checkpoint(fmt.Sprintf("ok-%d", round), "counters")
	}
	s.ask4Checkpoint("refused", "counters", func(c *checkpointv1alpha1.PodCheckpoint) {
		c.Spec.Options = map[string]string{"no-such-option": "1"}
	})
	if _, ready := s.terminal("refused"); ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed || !strings.Contains(ready.Message, "no-such-option") {
		t.Errorf("a checkpoint with an unknown option ended with %s: %s", ready.Reason, ready.Message)
	}
	s.countsOn("counters", 50)
	s.unharmed("counters")
}

// P2: the timeout bounds the operation; the Pod is thawed and the message says timeout.
func TestOperationsOnOnePodAreDoneOneAfterTheOther(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 20)
	names := []string{"p1", "p2", "p3"}
	for _, name := range names {
		s.ask4Checkpoint(name, "counters")
	}
	// P10: whatever comes of them, they end, and no two freeze the Pod at once.
	var windows []counters.Window
	for _, name := range names {
		checkpoint, ready := s.terminal(name)
		if ready.Reason == checkpointv1alpha1.ReasonCheckpointCompleted {
			windows = append(windows, s.window(checkpoint))
		}
	}
	if len(windows) == 0 {
		t.Error("none of three checkpoints of one Pod was taken")
	}
	s.countsOn("counters", 20)
	s.unharmed("counters")
	// In the log of the Pod there is one gap for each, never a joint one.
	lines := s.counted("counters", "a")
	gaps := 0
	for i := 1; i < len(lines); i++ {
		if lines[i].Time.Sub(lines[i-1].Time) >= shortest(windows)*8/10 {
			gaps++
		}
	}
	if gaps < len(windows) {
		t.Errorf("%d checkpoints were taken, the Pod stood still %d times", len(windows), gaps)
	}
}

func shortest(windows []counters.Window) time.Duration {
	shortest := time.Hour
	for _, w := range windows {
		shortest = min(shortest, w.Frozen)
	}
	return shortest
}

// A Pod of stasis' own handler is a source as any other, and so is a Pod that was
// itself restored.
func TestAnyPodCanBeASource(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		name string
		make func(name string) *podBuilder
	}{
		{"of the default handler", Counters},
		{"of the handler stasis", func(name string) *podBuilder { return Counters(name).RuntimeClass(engine.restores) }},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			s.running(way.make("counters").Obj())
			s.countsOn("counters", 20)
			generation, source := "counters", s.counted("counters", "a")
			for _, name := range []string{"second", "third"} {
				s.checkpoint("of-"+generation, generation)
				restored := s.running(way.make(name).RestoreFrom("of-" + generation).Obj())
				if class := restored.Spec.RuntimeClassName; class == nil || *class != engine.restores {
					t.Errorf("the restored pod has runtime class %v", class)
				}
				s.countsOn(name, 50)
				s.unharmed(name)
				lines := s.counted(name, "a")
				if lines[0].Nonce != source[0].Nonce || lines[0].Count <= source[len(source)-1].Count {
					t.Errorf("pod %s begins with count %d, nonce %s; the one before was at %d, nonce %s", name,
						lines[0].Count, lines[0].Nonce, source[len(source)-1].Count, source[0].Nonce)
				}
				s.remove(generation)
				generation, source = name, lines
			}
		})
	}
}

// P26: init containers that had completed are not run again.
func TestCompletedInitContainersAreNotRunAgain(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		return MakePod(name).
			InitContainer("setup", imageBusybox, "sh", "-c", "echo run; sleep 0.1").
			Shell("main", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
	}
	s.running(build("source").Obj())
	s.counting("source", "main", 1)
	checkpoint := s.checkpoint("one", "source")
	if got := checkpoint.Status.CheckpointedInitContainers; len(got) != 1 || got[0].Name != "setup" {
		t.Errorf("the checkpoint lists init containers %v", got)
	}
	s.running(build("restored").RestoreFrom("one").Obj())
	if log := s.logs("restored", "setup"); log != "" {
		t.Errorf("the init container ran again: %q", log)
	}
	if log := s.logs("restored", "main"); strings.HasPrefix(log, "1\n") {
		t.Errorf("the container was started anew: %q", log)
	}
	pod := s.pod("restored")
	if ended := pod.Status.InitContainerStatuses[0].State.Terminated; ended == nil || ended.ExitCode != 0 {
		t.Errorf("the init container is %v", containerStates(pod))
	}
	if pod.Status.Phase != corev1.PodRunning {
		t.Errorf("phase %s", pod.Status.Phase)
	}
}

// P26: sidecars come back running, and restartable. Containers whose start the
// kubelet waits for (a postStart hook, a sidecar's startup probe) do not keep the
// others from being restored.
func TestSidecarsAndContainersWithHooksComeBackRunning(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	always := corev1.ContainerRestartPolicyAlways
	count := "trap 'exit 3' TERM; i=0; while :; do i=$((i+1)); echo $i | tee /tmp/count; sleep 0.05; done"
	build := func(name string) *podBuilder {
		pod := MakePod(name).
			InitContainer("setup", imageBusybox, "true").
			InitContainer("sidecar", imageBusybox, "sh", "-c", count).
			InitContainer("probed", imageBusybox, "sh", "-c", count).
			Shell("hooked", count).
			Shell("main", count)
		for _, i := range []int{1, 2} {
			pod.pod.Spec.InitContainers[i].RestartPolicy = &always
		}
		pod.pod.Spec.InitContainers[2].StartupProbe = everySecond(corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"test", "-s", "/tmp/count"}}})
		pod.pod.Spec.InitContainers[2].StartupProbe.FailureThreshold = 10
		pod.pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{
			Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "echo hook >> /tmp/hooks"}},
		}}
		return pod
	}
	containers := []string{"sidecar", "probed", "hooked", "main"}
	s.running(build("source").Obj())
	for _, container := range containers {
		s.counting("source", container, 5)
	}
	s.checkpoint("one", "source")
	s.running(build("restored").RestoreFrom("one").Obj())
	for _, container := range containers {
		var first int
		s.eventually("container "+container+" counts", func() error {
			_, err := fmt.Sscan(s.logs("restored", container), &first)
			return err
		})
		if first <= 5 {
			t.Errorf("container %s begins with %d: it was started anew", container, first)
		}
	}
	if log := s.logs("restored", "setup"); log != "" {
		t.Errorf("the init container ran again: %q", log)
	}
	s.unharmed("restored")
	// A sidecar that ends is started again, as an ordinary container.
	if _, err := s.exec("restored", "sidecar", "kill", "1"); err != nil {
		t.Log("exec was cut off:", err)
	}
	s.eventually("the sidecar is restarted", func() error {
		for _, status := range s.pod("restored").Status.InitContainerStatuses {
			if status.Name == "sidecar" && status.RestartCount == 1 && status.State.Running != nil {
				return nil
			}
		}
		return fmt.Errorf("%v", containerStates(s.pod("restored")))
	})
}
