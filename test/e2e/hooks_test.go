package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// inShell is a hook that runs a script in the container main.
func inShell(script string) string {
	hook, err := json.Marshal(map[string]any{"container": "main", "exec": map[string]any{"command": []string{"sh", "-c", script}}})
	if err != nil {
		panic(err)
	}
	return string(hook)
}

// holdsIdentity has the file open once it is there: what has it open is captured with it.
const holdsIdentity = `while :; do if [ -z "$open" ] && [ -e /etc/stasis/identity.json ]; then exec 3</etc/stasis/identity.json; open=yes; fi; sleep 0.1; done`

// saysInFile waits until a file of a container holds this text.
func (s *scene) saysInFile(pod, container, file, want string) {
	s.Helper()
	s.eventually(fmt.Sprintf("%s of pod %s says %q", file, pod, want), func() error {
		got, err := s.exec(pod, container, "cat", file)
		if err != nil || strings.TrimSpace(got) != want {
			return fmt.Errorf("%q, %v", got, err)
		}
		return nil
	})
}

// identity is what a restored container is told of itself.
func (s *scene) identity(pod, container string) (id struct {
	PodName, PodNamespace, PodUID, PodIP, NodeName, Container, CheckpointName, CheckpointUID string
	RestoredAt                                                                               metav1.Time
	Source                                                                                   struct{ PodName, PodUID, PodIP string }
}) {
	s.Helper()
	text, err := s.exec(pod, container, "cat", "/etc/stasis/identity.json")
	if err != nil {
		s.Fatalf("the identity of container %s of pod %s: %v", container, pod, err)
	}
	if err := json.Unmarshal([]byte(text), &id); err != nil {
		s.Fatalf("the identity of container %s of pod %s: %q: %v", container, pod, text, err)
	}
	return id
}

// X7: an application stands still for its checkpoint, goes on, and takes up its new
// identity where it is restored; also one that was restored before.
func TestHooksAreRunAroundACheckpointAndAfterARestoreAndTheIdentityIsThere(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		b := MakePod(name).Shell("main", holdsIdentity).Subject().Shell("sealed", idle).
			Annotation(checkpointv1alpha1.AnnotationPreCheckpoint, `[{"container":"subject","httpGet":{"port":8080,"path":"/healthz"}},`+inShell("echo quiet > /state")+`]`).
			Annotation(checkpointv1alpha1.AnnotationPostCheckpoint, inShell("echo went on > /state")).
			Annotation(checkpointv1alpha1.AnnotationPostRestore, inShell(`echo "$(cat /state), then restored" > /state`))
		readOnly := true
		b.last().SecurityContext = &corev1.SecurityContext{ReadOnlyRootFilesystem: &readOnly}
		return b
	}
	source := s.running(build("source").Obj())
	if out, err := s.exec("source", "main", "ls", "/etc/stasis"); err == nil {
		t.Errorf("a Pod that was not restored has an identity: %q", out)
	}
	one := s.checkpoint("one", "source")
	s.saysInFile("source", "main", "/state", "went on")
	s.waitEvent(source, checkpointv1alpha1.EventPreCheckpointHookSucceeded, "Ran 2 pre-checkpoint hooks")
	s.waitEvent(source, checkpointv1alpha1.EventPostCheckpointHookSucceeded)
	s.unharmed("source")

	restored := s.running(build("restored").RestoreFrom("one").Obj())
	s.waitEvent(restored, checkpointv1alpha1.EventPostRestoreHookSucceeded)
	s.saysInFile("restored", "main", "/state", "quiet, then restored")
	for _, container := range []string{"main", "sealed"} {
		id := s.identity("restored", container)
		if id.PodName != "restored" || id.PodNamespace != s.namespace || id.PodUID != string(restored.UID) || id.PodIP != restored.Status.PodIP ||
			id.NodeName != restored.Spec.NodeName || id.Container != container || id.CheckpointName != "one" || id.CheckpointUID != string(one.UID) ||
			id.RestoredAt.IsZero() || id.Source.PodName != "source" || id.Source.PodUID != string(source.UID) {
			t.Errorf("container %s is told that it is %+v", container, id)
		}
	}
	if out, err := s.exec("restored", "sealed", "sh", "-c", "echo x > /etc/stasis/identity.json"); err == nil {
		t.Errorf("the root file system is not read-only: %q", out)
	}

	// Its main process has the file open now.
	s.checkpoint("two", "restored")
	third := s.running(build("third").RestoreFrom("two").Obj())
	s.saysInFile("third", "main", "/state", "quiet, then restored")
	if id := s.identity("third", "main"); id.PodUID != string(third.UID) || id.CheckpointName != "two" || id.Source.PodName != "restored" {
		t.Errorf("a Pod restored from a restored one is told that it is %+v", id)
	}
	s.unharmed("third")
}

// X7: what a failing hook ends, and what it does not.
func TestAPreCheckpointHookThatFailsEndsTheCheckpointAndTheApplicationGoesOn(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	pod := s.running(MakePod("source").Shell("main", idle).
		Annotation(checkpointv1alpha1.AnnotationPreCheckpoint, inShell("echo quiet > /state; echo no room for the journal >&2; exit 3")).
		Annotation(checkpointv1alpha1.AnnotationPostCheckpoint, inShell("echo went on > /state")).Obj())
	s.ask4Checkpoint("one", "source")
	_, ready := s.terminal("one")
	if ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
		t.Errorf("it ended with %s", ready.Reason)
	}
	s.wantText("the message", ready.Message, "pre-checkpoint hook", "in container main", "it ended with 3: no room for the journal", "nothing was frozen")
	s.saysInFile("source", "main", "/state", "went on")
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointFailed, "no room for the journal")
	s.unharmed("source")
}

// X7: what could not take up its new identity does not go on with its old one.
func TestAContainerWhosePostRestoreHookFailsIsStoppedAndStartsAnew(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	source := MakePod("source").Shell("main", "trap 'exit 0' TERM; "+idle)
	s.running(source.Obj())
	s.checkpoint("one", "source")
	restored := s.create(source.Named("restored").RestoreFrom("one").
		Annotation(checkpointv1alpha1.AnnotationPostRestore, inShell("echo no token; exit 1")).Obj())
	s.waitEvent(restored, checkpointv1alpha1.EventPostRestoreHookFailed, "it ended with 1: no token", "its container was stopped")
	s.eventually("the container starts anew", func() error {
		status := s.pod("restored").Status.ContainerStatuses[0]
		if status.RestartCount != 1 || status.State.Running == nil {
			return fmt.Errorf("restarted %d times", status.RestartCount)
		}
		return nil
	})
	if out, err := s.exec("restored", "main", "ls", "/etc/stasis"); err == nil {
		t.Errorf("a container that was started anew has the identity of a restored one: %q", out)
	}
}

// X7: what a checkpoint would meet is known without one.
func TestAPodIsLookedAtBeforeItIsCheckpointed(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	server := s.running(MakePod("server").Shell("main", "mkfifo /pipe; exec 3<>/pipe; nc -l -p 9000 <&3").Obj())
	s.running(MakePod("source").Shell("main", "mkfifo /pipe; exec 3<>/pipe; until nc "+server.Status.PodIP+" 9000 <&3; do sleep 0.1; done & "+idle).Obj())
	s.eventually("the connection is seen, and what a checkpoint costs", func() error {
		out, err := s.Plugin(s.Context(), "checkpoint", "check", "source", "-n", s.namespace)
		if err != nil {
			return err
		}
		for _, want := range []string{"pod/source can be checkpointed", "Frozen:      about ", "Size:        about ", "warning: container main has 1 TCP connection to outside the Pod (" + server.Status.PodIP + ":9000)"} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("it does not say %q: %s", want, out)
			}
		}
		return nil
	})
	checkpoint := s.checkpoint("one", "source")
	if w := checkpoint.Status.Warnings; len(w) != 1 || !strings.Contains(w[0], server.Status.PodIP+":9000") {
		t.Errorf("the checkpoint's warnings are %q", w)
	}
	s.waitEvent(checkpoint, checkpointv1alpha1.EventCheckpointWarning, server.Status.PodIP+":9000")

	// Two processes are in the way, and both are told of.
	if _, err := s.exec("source", "main", "sh", "-c", "kill -STOP $(pidof nc)"); err != nil {
		t.Fatal(err)
	}
	out, err := s.Plugin(s.Context(), "checkpoint", "check", "source", "-n", s.namespace)
	if err == nil {
		t.Errorf("check of a Pod that cannot be checkpointed: %s", out)
	}
	s.wantText("check", out, "pod/source cannot be checkpointed as it is", "problem: container main, process", "it is stopped (SIGSTOP)")
	if out, err := s.Plugin(s.Context(), "checkpoint", "source", "--dry-run=server", "-n", s.namespace); err == nil || !strings.Contains(out+err.Error(), "the checkpoint would be refused") {
		t.Errorf("dry run: %s, %v", out, err)
	}
	var list checkpointv1alpha1.PodCheckpointList
	if err := s.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Items {
		if c.Namespace == s.namespace && c.Name != "one" {
			t.Errorf("PodCheckpoint %s was stored", c.Name)
		}
	}
	s.unharmed("source")
}
