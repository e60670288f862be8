package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// archiveMiB is how much a Pod holds whose archive goes back and forth. With
// STASIS_E2E_ARCHIVE_MIB=2048 the bounds are shown of a large one.
func archiveMiB(t *testing.T) int {
	value := os.Getenv("STASIS_E2E_ARCHIVE_MIB")
	if value == "" {
		return 384
	}
	mib, err := strconv.Atoi(value)
	if err != nil {
		t.Fatalf("STASIS_E2E_ARCHIVE_MIB: %v", err)
	}
	return mib
}

// maxServerMemory is what bringing archives out and in may take of the API server's
// process and of an agent's.
const maxServerMemory = 200 << 20

// plugin runs a plugin that must succeed, in the scene's namespace.
func (s *scene) plugin(name string, args ...string) string {
	s.Helper()
	out, err := s.Plugin(s.Context(), name, append(args, "-n", s.namespace)...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}

// A2, A4: checkpoint, look inside, compare, bring home though it is killed twice,
// bring back in, restore from that.
func TestACheckpointGoesHomeThoughTheDownloadIsKilledTwiceAndComesBack(t *testing.T) {
	s := newScene(t)
	mib := archiveMiB(t)
	s.running(MakePod("source").
		Shell("main", fmt.Sprintf("dd if=/dev/urandom of=/data/bulk bs=1M count=%d 2>/dev/null; md5sum /data/bulk > /data/sum; echo filled > /tmp/marker; i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done", mib)).
		EmptyDir("data", "/data", corev1.StorageMediumDefault).Obj())
	s.within(5*time.Minute, "the Pod is filled", func() error {
		_, err := s.exec("source", "main", "test", "-e", "/tmp/marker")
		return err
	})
	s.wantText("kubectl checkpoint", s.plugin("checkpoint", "source", "--name", "one"), "podcheckpoint/one ready", "Frozen:", "main")
	s.plugin("checkpoint", "source", "--name", "two")

	inside := s.plugin("checkpoint", "inspect", "one")
	s.wantText("kubectl checkpoint inspect", inside, "Container main", "sh -c", "Processes", "/tmp/marker")
	page := filepath.Join(t.TempDir(), "one.html")
	s.plugin("checkpoint", "inspect", "one", "--html", page)
	if html, err := os.ReadFile(page); err != nil || !strings.Contains(string(html), "<html") {
		t.Errorf("inspect --html wrote no page: %v", err)
	}
	s.exitsWith(1, "checkpoint", "diff", "one", "two")

	home := filepath.Join(t.TempDir(), "one.tar")
	for _, part := range []int64{1, 2} {
		s.killedAt(int64(mib)<<20*part/3, home)
	}
	s.wantText("kubectl checkpoint download", s.plugin("checkpoint", "download", "one", "-o", home), home+" downloaded", "sha256:")
	s.wantText("kubectl checkpoint inspect --archive", s.plugin("checkpoint", "inspect", "--archive", home), "Container main", "sh -c")
	s.exitsWith(0, "checkpoint", "diff", home, home)
	s.modestMemory(s.agentOf("one"))

	s.plugin("checkpoint", "delete", "one")
	out := s.plugin("checkpoint", "import", home, "--name", "back")
	s.wantText("kubectl checkpoint import", out, "podcheckpoint/back ready")
	s.modestMemory(s.agentOf("back"))
	s.wantText("kubectl restore", s.plugin("restore", "back", "--as", "again", "--timeout", "5m"), "pod/again ready")
	if out, err := s.exec("again", "main", "md5sum", "-c", "/data/sum"); err != nil {
		t.Errorf("what came back is not what was captured: %s%v", out, err)
	}
}

// killedAt starts a download and kills it when so much has arrived.
func (s *scene) killedAt(bytes int64, home string) {
	s.Helper()
	cmd := s.PluginCommand(s.Context(), "checkpoint", "download", "one", "-o", home, "-n", s.namespace)
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	over := make(chan error, 1)
	go func() { over <- cmd.Wait() }()
	for deadline := time.Now().Add(10 * time.Minute); ; {
		if info, err := os.Stat(home + ".partial"); err == nil && info.Size() >= bytes {
			break
		}
		select {
		case err := <-over:
			s.Fatalf("the download ended before it was killed: %v", err)
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.Fatalf("%d bytes have not arrived within 10 min", bytes)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		s.Fatal(err)
	}
	err := <-over
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		s.Fatalf("the download was to be killed, and ended with %v", err)
	}
	if _, err := os.Stat(home); !errors.Is(err, os.ErrNotExist) {
		s.Errorf("a download that was killed left its file: %v", err)
	}
}

// exitsWith runs a plugin that must end with this code.
func (s *scene) exitsWith(code int, plugin string, args ...string) {
	s.Helper()
	_, err := s.Plugin(s.Context(), plugin, append(args, "-n", s.namespace)...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		s.Fatal(err)
	}
	if got != code {
		s.Errorf("kubectl %s %q: exit code %d, want %d: %v", plugin, args, got, code, err)
	}
}

// agentOf is the Pod of the agent that has a checkpoint's data.
func (s *scene) agentOf(checkpoint string) *corev1.Pod {
	s.Helper()
	var object checkpointv1alpha1.PodCheckpoint
	if err := s.Get(s.Context(), s.key(checkpoint), &object); err != nil {
		s.Fatal(err)
	}
	var pods corev1.PodList
	if err := s.List(s.Context(), &pods, client.InNamespace("stasis-system")); err != nil {
		s.Fatal(err)
	}
	for i := range pods.Items {
		if pods.Items[i].Spec.NodeName == object.Status.NodeName && strings.HasPrefix(pods.Items[i].Name, "stasis-agent") {
			return &pods.Items[i]
		}
	}
	s.Fatalf("node %s has no agent", object.Status.NodeName)
	return nil
}

// modestMemory looks at the most that an agent, and the API server of Stasis, have had
// of memory.
func (s *scene) modestMemory(agent *corev1.Pod) {
	s.Helper()
	var pods corev1.PodList
	if err := s.List(s.Context(), &pods, client.InNamespace("stasis-system")); err != nil {
		s.Fatal(err)
	}
	watched := []corev1.Pod{*agent}
	for _, pod := range pods.Items {
		if strings.HasPrefix(pod.Name, "stasis-controller") {
			watched = append(watched, pod)
		}
	}
	for _, pod := range watched {
		// Processes of a Pod are those whose cgroup is named after it.
		out := s.onNode(pod.Spec.NodeName, fmt.Sprintf(
			"for p in $(grep -l %s /proc/[0-9]*/cgroup 2>/dev/null); do awk '/^VmHWM/{print $2}' ${p%%/cgroup}/status; done | sort -n | tail -n 1", pod.UID))
		kib, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
		if err != nil {
			s.Fatalf("the memory of pod %s: %q: %v", pod.Name, out, err)
		}
		s.Logf("pod %s had at most %d MiB", pod.Name, kib>>10)
		if kib<<10 > maxServerMemory {
			s.Errorf("pod %s had %d MiB, %d are the most it may", pod.Name, kib>>10, int64(maxServerMemory)>>20)
		}
	}
}

// A1, A2: the right to ask for checkpoints in one namespace is that and no more.
func TestWhoMayOnlyAskForCheckpointsTakesThemInThatNamespaceAndReadsNothing(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	const user = "asks-only"
	for _, object := range []client.Object{
		&rbacv1.Role{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: user},
			Rules: []rbacv1.PolicyRule{{Verbs: []string{"create"}, APIGroups: []string{subresourcesv1alpha1.GroupName},
				Resources: []string{subresourcesv1alpha1.ResourceCheckpoint}}},
		},
		&rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: user},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: user},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
		},
	} {
		if err := s.Create(t.Context(), object); err != nil {
			t.Fatal(err)
		}
	}
	var out string
	s.eventually("the right to ask holds", func() (err error) {
		out, err = s.Plugin(t.Context(), "checkpoint", "source", "--name", "one", "--as", user, "-n", s.namespace)
		return err
	})
	s.wantText("kubectl checkpoint", out, "podcheckpoint/one ready", "Node:", "Frozen:")
	s.fails(1, []string{"forbidden", subresourcesv1alpha1.ResourceArchive}, "checkpoint", "download", "one", "--as", user, "-o", filepath.Join(t.TempDir(), "one.tar"))
	s.fails(1, []string{"forbidden", subresourcesv1alpha1.ResourceContents}, "checkpoint", "inspect", "one", "--as", user)
	s.fails(1, []string{"forbidden"}, "checkpoint", "list", "--as", user)

	_, err := s.Plugin(t.Context(), "checkpoint", "source", "--as", user, "-n", "default")
	if err == nil || !strings.Contains(err.Error(), "forbidden") || !strings.Contains(err.Error(), subresourcesv1alpha1.ResourceCheckpoint) {
		t.Errorf("a checkpoint in another namespace: %v, want forbidden", err)
	}
}

// A4: several copies of one checkpoint, each told of; what is deleted is gone.
func TestACheckpointIsRestoredSeveralTimesListedDescribedAndDeleted(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	s.plugin("checkpoint", "source", "--name", "one")
	s.wantText("kubectl restore --replicas", s.plugin("restore", "one", "--as", "copy", "--replicas", "2"), "pod/copy-1 ready on", "pod/copy-2 ready on")
	s.unharmed("copy-1")
	s.unharmed("copy-2")
	s.wantText("kubectl checkpoint list", s.plugin("checkpoint", "list"), "one", "CheckpointCompleted", "source")
	s.wantText("kubectl checkpoint describe", s.plugin("checkpoint", "describe", "one"), "copy-1", "copy-2", "CheckpointSucceeded", "capture")
	s.wantText("kubectl checkpoint check", s.plugin("checkpoint", "check"), "served", "agent ", "take checkpoints")
	s.fails(1, []string{"and all others that can restore it"}, "restore", "one", "--node", "elsewhere")
	s.plugin("checkpoint", "delete", "one")
	s.fails(1, []string{`"one" not found`}, "checkpoint", "describe", "one")
}
