package e2e

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// fails runs a plugin that must end with this exit code and say these things.
func (s *scene) fails(code int, says []string, plugin string, args ...string) {
	s.Helper()
	out, err := s.Plugin(s.Context(), plugin, append(args, "-n", s.namespace)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code {
		s.Errorf("kubectl %s %q: %v, want exit code %d", plugin, args, err, code)
		return
	}
	if out != "" {
		s.Errorf("kubectl %s %q failed and printed %q on standard output", plugin, args, out)
	}
	s.wantText("kubectl "+plugin, err.Error(), says...)
}

// A4: what users see when it does not work.
func TestThePluginsSayWhyTheyFailAndExitAsDocumented(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.fails(1, []string{`"absent" not found`}, "checkpoint", "absent")
	s.fails(1, []string{`"absent" not found`}, "restore", "absent")
	s.fails(2, []string{"--help"}, "checkpoint")
	s.fails(2, []string{"--help"}, "restore", "one", "--no-such-flag")

	s.running(MakePod("source").Shell("main", idle).Obj())
	s.fails(1, []string{"CheckpointFailed", "no-such-option"}, "checkpoint", "source", "--option", "no-such-option=1")

	checkpoint := s.checkpoint("one", "source")
	s.onNode(checkpoint.Status.NodeName, "mv "+data(checkpoint)+" "+data(checkpoint)+".away")
	s.fails(1, []string{checkpointv1alpha1.EventCheckpointDataMissing, "kubectl delete pod refused"}, "restore", "one", "--as", "refused")
	s.onNode(checkpoint.Status.NodeName, "mv "+data(checkpoint)+".away "+data(checkpoint))
	s.create(MakePod("in-the-way").Shell("main", idle).Obj())
	s.fails(1, []string{"already exists"}, "restore", "one", "--as", "in-the-way")
}

// A4: -o and --dry-run, as kubectl has them.
func TestThePluginsPrintObjectsAndTryThingsOut(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	run := func(plugin string, args ...string) string {
		t.Helper()
		out, err := s.Plugin(t.Context(), plugin, append(args, "-n", s.namespace)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	if out := run("checkpoint", "source", "--dry-run=server"); !strings.HasSuffix(out, " created (server dry run)\n") {
		t.Errorf("checkpoint --dry-run=server printed %q", out)
	}
	var list checkpointv1alpha1.PodCheckpointList
	if err := json.Unmarshal([]byte(s.get("podcheckpoints")), &list); err != nil || len(list.Items) != 0 {
		t.Errorf("a dry run left %d PodCheckpoints (%v)", len(list.Items), err)
	}

	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := json.Unmarshal([]byte(run("checkpoint", "source", "--name", "one", "-o", "json")), &checkpoint); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(s.get("podcheckpoint", "one"), string(checkpoint.UID)) || checkpoint.Status.FreezeDuration == nil {
		t.Errorf("checkpoint -o json printed %+v", checkpoint)
	}

	var pod corev1.Pod
	if err := json.Unmarshal([]byte(run("restore", "one", "--as", "tried", "--dry-run=server", "-o", "json")), &pod); err != nil {
		t.Fatal(err)
	}
	if pod.Name != "tried" || pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] != string(checkpoint.UID) {
		t.Errorf("restore --dry-run=server -o json does not show what admission makes of the Pod: %+v", pod.ObjectMeta)
	}
	if out := run("restore", "one", "-o", "name"); !strings.HasPrefix(out, "pod/one-") {
		t.Errorf("restore -o name printed %q", out)
	}
	if out := run("restore", "one", "--as", "later", "--wait=false"); out != "pod/later created\n" {
		t.Errorf("restore --wait=false printed %q", out)
	}
	s.waitReady("later")
}

// get is kubectl get -o json in the scene's namespace.
func (s *scene) get(args ...string) string {
	s.Helper()
	out, err := s.Kubectl(s.Context(), append([]string{"-n", s.namespace, "get", "-o", "json"}, args...)...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}
