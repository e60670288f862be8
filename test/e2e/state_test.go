package e2e

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
)

// report is what test/e2e/subject tells of its state.
type report struct {
	Nonce, Child, Next, Deleted, Directory, Hostname string
	Tallies, TIDs                                    []int64
	Position, Timer                                  int64
	Pending, Umask, OpenFiles                        int
	Uptime                                           float64
	Credential                                       []int
	Listening                                        bool
	Caps                                             []string
}

// P25: what lives in processes.
func TestProcessesComeBackWithTheirThreadsFilesPipesAndChildren(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Subject().Obj())
	var before, atCut, after report
	s.ask("source", "/state", &before)
	s.checkpoint("one", "source")
	s.ask("source", "/state", &atCut)
	s.remove("source")
	s.running(MakePod("restored").Subject().RestoreFrom("one").Obj())
	s.ask("restored", "/state", &after)

	// The same, to the letter.
	goesOn := cmpopts.IgnoreFields(report{}, "Tallies", "Child", "Timer", "Uptime", "Hostname")
	if diff := cmp.Diff(before, after, goesOn); diff != "" {
		t.Errorf("the restored process differs (-source +restored):\n%s", diff)
	}
	if !before.Listening {
		t.Error("the source does not listen where a connection waits to be accepted")
	}
	// What goes on, from where it was.
	for i := range before.Tallies {
		if after.Tallies[i] <= before.Tallies[i] {
			t.Errorf("thread %d had counted to %d, now to %d", i, before.Tallies[i], after.Tallies[i])
		}
	}
	if after.Uptime < before.Uptime {
		t.Errorf("the monotonic clock went back from %f to %f seconds", before.Uptime, after.Uptime)
	}
	if after.Timer > before.Timer || after.Timer < before.Timer-300 {
		t.Errorf("the timer had %d s left, now %d", before.Timer, after.Timer)
	}
	var pid, wasPID, asked, wasAsked int
	var nonce, wasNonce string
	for text, into := range map[string][]any{before.Child: {&wasPID, &wasNonce, &wasAsked}, after.Child: {&pid, &nonce, &asked}} {
		if _, err := fmt.Sscan(text, into...); err != nil {
			t.Fatalf("the child answers %q: %v", text, err)
		}
	}
	// Asked once on the source before the cut, and now once on the restored side.
	if pid != wasPID || nonce != wasNonce || asked != wasAsked+1 {
		t.Errorf("the child answered %q and now %q, want the same with one question more", before.Child, after.Child)
	}
	// P27: the restored Pod has its own name.
	if after.Hostname != "restored" {
		t.Errorf("the hostname is %q", after.Hostname)
	}

	// What nobody had read is still there, and open files write on.
	var drained struct{ Pipe, Socket, Appended string }
	s.ask("restored", "/drain", &drained)
	if drained.Pipe != "left in the pipe" || drained.Socket != "left in the socket" || drained.Appended != "one more\n" {
		t.Errorf("drained %+v", drained)
	}
	s.unharmed("restored")
}

// P25, X2: what lives in files.
func TestTheWritableLayerAndTheVolumesOfThePodComeBack(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		return MakePod(name).Subject().
			EmptyDir("scratch", "/scratch", corev1.StorageMediumDefault).
			EmptyDir("memory", "/memory", corev1.StorageMediumMemory)
	}
	s.running(build("source").Obj())
	var before, after map[string]string
	s.ask("source", "/files", &before)
	checkpoint := s.checkpoint("one", "source")
	s.remove("source")
	s.running(build("restored").RestoreFrom("one").Obj())
	s.ask("restored", "/files", &after)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the files differ (-source +restored):\n%s", diff)
	}

	// The comparison is worth something: the source has each of these.
	for path, want := range map[string]string{
		"/data/other":          "same as /data/one",
		"/data/owned":          "1234:4321",
		"/data/suid":           "urwxr-xr-x",
		"/data/attributed":     "user.note=6b65707400746f6f",
		"/data/fifo":           "p",
		"/data/hole":           "1048576 bytes",
		"/image/mode":          "-rw-------",
		"/image/directory/new": "new",
		"/scratch/deep/file":   "of /scratch",
		"/memory/deep/file":    "of /memory",
		"/image/kept":          "kept",
		"/image/changed":       `"changed"`,
		"/data/symlink":        "-> ../nowhere",
		"/data/old":            "modified 1000000000",
		"/data/empty":          "drwxr-x---",
	} {
		if !strings.Contains(before[path], want) {
			t.Errorf("%s of the source is %q, want %q in it", path, before[path], want)
		}
	}
	for _, path := range []string{"/image/removed", "/image/directory/old"} {
		if was, there := after[path]; there {
			t.Errorf("%s, deleted in the source, is back: %s", path, was)
		}
	}
	if len(before) < 20 {
		t.Errorf("only %d files: %v", len(before), slices.Sorted(maps.Keys(before)))
	}

	// The checkpoint is not changed by a restore: another Pod gets the same.
	s.running(build("again").RestoreFrom("one").Obj())
	var again map[string]string
	s.ask("again", "/files", &again)
	if diff := cmp.Diff(before, again); diff != "" {
		t.Errorf("the files of a second restored Pod differ (-source +restored):\n%s", diff)
	}
	_ = checkpoint
}

// P25: what the new Pod supplies stays its own.
func TestARestoredPodHasItsOwnNameAddressAndHostsFile(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	source := s.running(MakePod("source").Shell("main", "while :; do sleep 0.1; done").Obj())
	s.checkpoint("one", "source")
	restored := s.running(MakePod("restored").Shell("main", "while :; do sleep 0.1; done").RestoreFrom("one").Obj())
	if restored.Status.PodIP == source.Status.PodIP {
		t.Errorf("both Pods have address %s", source.Status.PodIP)
	}
	hosts, err := s.exec("restored", "main", "cat", "/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	s.wantText("/etc/hosts", hosts, restored.Status.PodIP, "restored")
	name, err := s.exec("restored", "main", "hostname")
	if err != nil || strings.TrimSpace(name) != "restored" {
		t.Errorf("hostname %q, %v", name, err)
	}
}

// P25: credentials, capabilities, no_new_privs and seccomp, of the process itself
// and of one that the restored process starts.
func TestARestrictedContainerComesBackAsRestricted(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		pod := MakePod(name).Shell("main", "while :; do grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp):?' /proc/self/status > /tmp/child; sleep 0.1; done")
		pod.last().SecurityContext = &corev1.SecurityContext{
			RunAsUser: new(int64(1234)), RunAsGroup: new(int64(4321)), RunAsNonRoot: new(true),
			AllowPrivilegeEscalation: new(false),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		}
		pod.pod.Spec.SecurityContext = &corev1.PodSecurityContext{SupplementalGroups: []int64{77}, FSGroup: new(int64(88))}
		return pod
	}
	restrictions := func(pod string) (self, child string) {
		t.Helper()
		self, err := s.exec(pod, "main", "grep", "-E", "^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp):?", "/proc/1/status")
		if err != nil {
			t.Fatal(err)
		}
		s.eventually("the shell has started a child", func() error {
			child, err = s.exec(pod, "main", "cat", "/tmp/child")
			if err == nil && child == "" {
				err = errors.New("nothing yet")
			}
			return err
		})
		return self, child
	}
	s.running(build("source").Obj())
	self, child := restrictions("source")
	s.wantText("the source", self, "1234", "4321", "77", "NoNewPrivs:\t1", "Seccomp:\t"+engine.seccomp, "CapEff:\t0000000000000000")
	s.checkpoint("one", "source")
	s.running(build("restored").RestoreFrom("one").Obj())
	selfAfter, childAfter := restrictions("restored")
	if diff := cmp.Diff(self, selfAfter); diff != "" {
		t.Errorf("the restored process has other credentials (-source +restored):\n%s", diff)
	}
	if diff := cmp.Diff(child, childAfter); diff != "" {
		t.Errorf("what the restored process starts has other credentials (-source +restored):\n%s", diff)
	}
}
