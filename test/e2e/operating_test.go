package e2e

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// restoredSubject makes a Pod of the subject that was restored.
func restoredSubject(s *scene, change func(*podBuilder) *podBuilder) *corev1.Pod {
	s.Helper()
	s.running(change(MakePod("source").Subject()).Obj())
	s.checkpoint("one", "source")
	s.remove("source")
	return s.running(change(MakePod("restored").Subject()).RestoreFrom("one").Obj())
}

func same(b *podBuilder) *podBuilder { return b }

// P25: kubectl logs and exec.
func TestLogsAndExecWorkOnARestoredPod(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Subject().Obj())
	s.eventually("the source has logged its first tick, so that a restored Pod cannot", func() error {
		if log := s.logs("source", "subject"); !strings.Contains(log, "tick 0\n") {
			return fmt.Errorf("log %q", log)
		}
		return nil
	})
	s.checkpoint("one", "source")
	s.remove("source")
	s.running(MakePod("restored").Subject().RestoreFrom("one").Obj())
	s.eventually("the restored Pod logs on", func() error {
		if log := s.logs("restored", "subject"); !strings.Contains(log, "subject: tick") {
			return fmt.Errorf("log %q", log)
		}
		return nil
	})
	if log := s.logs("restored", "subject"); strings.Contains(log, "subject: serving") || strings.Contains(log, "tick 0\n") {
		t.Errorf("the log is of a start, not of a continuation: %q", log)
	}
	out, err := s.exec("restored", "subject", "subject", "get", "/state")
	if err != nil || !strings.Contains(out, "nonce") {
		t.Errorf("exec: %q, %v", out, err)
	}
	if _, err := s.exec("restored", "subject", "subject", "get", "/absent"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("exec of a command that fails: %v", err)
	}
}

// P25: exec, httpGet and tcpSocket probes.
func TestProbesWatchARestoredPod(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	restoredSubject(s, (*podBuilder).Probes) // ready only by its startup and readiness probes
	s.never(4*time.Second, "no probe fails", func() error {
		status := s.pod("restored").Status.ContainerStatuses[0]
		if status.RestartCount != 0 || !status.Ready || status.Started == nil || !*status.Started {
			return fmt.Errorf("restarted %d times, ready %t", status.RestartCount, status.Ready)
		}
		return nil
	})
	// And they do look: a container that falls ill is restarted.
	s.ask("restored", "/fall-ill", nil)
	s.eventually("the liveness probe restarts the container", func() error {
		if status := s.pod("restored").Status.ContainerStatuses[0]; status.RestartCount != 1 {
			return fmt.Errorf("restarted %d times", status.RestartCount)
		}
		return nil
	})
}

// P25: graceful termination.
func TestARestoredPodEndsInOrderWhenItIsDeleted(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	restored := restoredSubject(s, func(b *podBuilder) *podBuilder { return b.Grace(30) })
	out, wait, err := s.Follow(s.Context(), "-n", s.namespace, "logs", "-f", "restored", "--tail=1")
	if err != nil {
		t.Fatal(err)
	}
	log, follows := make(chan string, 1), make(chan struct{})
	go func() {
		var all strings.Builder
		following := sync.OnceFunc(func() { close(follows) })
		for lines := bufio.NewScanner(out); lines.Scan(); following() {
			all.WriteString(lines.Text() + "\n")
		}
		_ = wait() // ends with the container
		following()
		log <- all.String()
	}()
	<-follows // it has its first line
	start := time.Now()
	s.remove("restored")
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("deletion took %s: it was killed at the end of its grace period", took)
	}
	select {
	case text := <-log:
		s.wantText("the log", text, "subject: asked to end", "subject: ended in order")
	case <-time.After(patience):
		t.Error("kubectl logs -f does not end with the Pod")
	}
	// P28: nothing of it is left on the node.
	s.eventually("nothing is left on the node", func() error {
		left, err := s.OnNode(context.Background(), restored.Spec.NodeName,
			fmt.Sprintf("cat /proc/mounts | grep -c %s || true; ls /run/stasis /var/lib/stasis | grep -c %s || true", restored.UID, restored.UID))
		if err != nil {
			return err
		}
		if left != "0\n0\n" {
			return fmt.Errorf("mounts and files: %q", left)
		}
		return nil
	})
}

// P25: a later start of a container is an ordinary start.
func TestAContainerOfARestoredPodThatRestartsStartsAnew(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	restoredSubject(s, same)
	var before, after report
	s.ask("restored", "/state", &before)
	_, _ = s.exec("restored", "subject", "subject", "get", "/exit?code=7") // cut off by the end of the container
	s.eventually("the container is restarted", func() error {
		status := s.pod("restored").Status.ContainerStatuses[0]
		if status.RestartCount != 1 || status.State.Running == nil {
			return fmt.Errorf("restarted %d times, %v", status.RestartCount, status.State)
		}
		return nil
	})
	status := s.pod("restored").Status.ContainerStatuses[0]
	if ended := status.LastTerminationState.Terminated; ended == nil || ended.ExitCode != 7 {
		t.Errorf("the end before is %+v, want exit code 7", ended)
	}
	s.eventually("it answers", func() error {
		_, err := s.exec("restored", "subject", "subject", "get", "/healthz")
		return err
	})
	s.ask("restored", "/state", &after)
	if after.Nonce == before.Nonce || after.Uptime > before.Uptime+60 {
		t.Errorf("nonce %s after %s: the restarted container was restored again", after.Nonce, before.Nonce)
	}
}

// A job's Pod that was restored ends as its program does.
func TestARestoredPodThatIsNotToBeRestartedEndsWithItsProgram(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	// The source's does not end before it is checkpointed, however long that takes.
	build := func(name string) *podBuilder {
		return MakePod(name).Restart(corev1.RestartPolicyNever).Shell("main",
			`i=0 left=20; while [ $left -gt 0 ]; do i=$((i+1)); echo $i; [ "$(hostname)" = source ] || left=$((left-1)); sleep 0.1; done; echo done; exit 5`)
	}
	s.running(build("source").Obj())
	s.counting("source", "main", 1)
	s.checkpoint("one", "source")
	s.create(build("restored").RestoreFrom("one").Obj())
	s.eventually("the restored Pod has ended", func() error {
		pod := s.pod("restored")
		if pod.Status.Phase != corev1.PodFailed {
			return fmt.Errorf("phase %s, %v", pod.Status.Phase, containerStates(pod))
		}
		return nil
	})
	if ended := s.pod("restored").Status.ContainerStatuses[0].State.Terminated; ended == nil || ended.ExitCode != 5 {
		t.Errorf("ended with %+v, want exit code 5", ended)
	}
	if log := s.logs("restored", "main"); strings.HasPrefix(log, "1\n") || !strings.HasSuffix(log, "\ndone\n") {
		t.Errorf("log %q", log)
	}
}
