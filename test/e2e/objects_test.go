package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/e2e/cluster"
)

const imageObjects = "localhost/stasis-objects:dev"

// object is one kind of kernel object that the program in test/e2e/objects holds.
type object struct {
	name  string
	group string // the container that holds it; empty: every one; "refused": a checkpoint of it is
}

const groupRefused = "refused"

// objects asks the program for its list.
func objects(t *testing.T) (all []object) {
	t.Helper()
	root, err := cluster.Root()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(root, "dist/bin/objects"), "list").Output()
	if err != nil {
		t.Fatalf("%v (is it built? make images-e2e)", err)
	}
	for line := range strings.Lines(string(out)) {
		name, group, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		all = append(all, object{name, group})
	}
	if len(all) < 60 {
		t.Fatalf("the program lists %d objects only:\n%s", len(all), out)
	}
	return all
}

// holders are the containers of the Pod that holds the objects.
var holders = []string{"plain", "restricted", "terminal"}

// Objects is a Pod that holds one of each object that comes back: as root with the
// default capabilities, as a user who may do nothing and whose root is read-only,
// and what there is of a terminal. All are of one image, which brings a volume.
func Objects(name string) *podBuilder {
	b := MakePod(name)
	for _, holder := range holders {
		b.Container(holder, imageObjects)
		b.last().Args = []string{"run", holder}
		b.last().Stdin = holder != "restricted"
		b.last().TTY = holder == "terminal"
	}
	b.EmptyDir("work", "/work", corev1.StorageMediumDefault)
	b.pod.Spec.Containers[0].VolumeMounts = nil // it has its writable layer to work in
	b.pod.Spec.Containers[1].SecurityContext = &corev1.SecurityContext{
		RunAsUser: new(int64(1234)), RunAsGroup: new(int64(4321)), RunAsNonRoot: new(true),
		AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true),
		Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
	return b
}

// answer is how an object is, in its own words.
type answer struct{ verdict, said string }

// verified asks a Pod's containers how their objects are, by container and name.
func (s *scene) verified(pod string, containers ...string) map[string]map[string]answer {
	s.Helper()
	all := map[string]map[string]answer{}
	for _, container := range containers {
		var out string
		s.eventually("the objects of container "+container+" of pod "+pod+" are set up", func() (err error) {
			out, err = s.exec(pod, container, "objects", "verify", container)
			return err
		})
		all[container] = map[string]answer{}
		for line := range strings.Lines(out) {
			name, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
			verdict, said, _ := strings.Cut(rest, "\t")
			all[container][name] = answer{verdict, said}
		}
	}
	return all
}

// P25: one subtest for each object of each container. Of the source, too: it is as it
// was after its thaw.
func TestKernelObjectsComeBack(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Objects("source").Obj())
	s.verified("source", holders...)
	s.checkpoint("one", "source")
	source := s.verified("source", holders...)
	pod := s.create(Objects("restored").RestoreFrom("one").Obj())
	s.within(3*patience, "all of it is restored", func() error { // a hundred processes, ten thousand files
		for _, status := range s.pod("restored").Status.ContainerStatuses {
			if status.State.Running == nil {
				return errPhase(s.pod("restored"))
			}
		}
		return nil
	})
	s.waitReady("restored")
	for _, holder := range []string{"plain", "terminal"} {
		if said := s.typeInto("restored", holder, "typed into "+holder+"\n"); said != "typed into "+holder {
			t.Errorf("container %s: its standard input brings %q", holder, said)
		}
	}
	restored := s.verified("restored", holders...)

	for _, holder := range holders {
		if was, is := source[holder]["nonce"], restored[holder]["nonce"]; was != is || was.verdict == "" {
			t.Errorf("container %s: the source's nonce is %q, the restored one's %q: it was started anew", holder, was.verdict, is.verdict)
		}
		for _, object := range objects(t) {
			if object.group != holder && (object.group != "" || holder == "terminal") {
				continue
			}
			t.Run(holder+"/"+object.name, func(t *testing.T) {
				if a := source[holder][object.name]; a.verdict != "ok" {
					t.Errorf("the source, after its thaw: %s %s", a.verdict, a.said)
				}
				if a := restored[holder][object.name]; a.verdict != "ok" {
					t.Errorf("the restored Pod: %s %s", a.verdict, a.said)
				}
			})
		}
		if holder == "terminal" {
			continue
		}
		// What is not of the process itself.
		if said := restored[holder]["cgroup"].said; !strings.Contains(strings.ReplaceAll(said, "_", "-"), string(pod.UID)) {
			t.Errorf("container %s: a restored process is in cgroup %s, not in one of the new Pod (%s)", holder, said, pod.UID)
		}
		monotonic, real := passed(t, source[holder]["clocks"])
		if monotonic-real > 0.5 || real-monotonic > 0.5 {
			t.Errorf("container %s of the source: %.2f s have passed by the monotonic clock, %.2f s by the time of day", holder, monotonic, real)
		}
		if monotonic, real := passed(t, restored[holder]["clocks"]); monotonic > real-0.1 {
			t.Errorf("container %s: %.2f s have passed by the monotonic clock, %.2f s by the time of day: it counts the time between checkpoint and restore", holder, monotonic, real)
		}
	}
	s.unharmed("source")
	s.unharmed("restored")
}

// passed reads what the object "clocks" notes.
func passed(t *testing.T, a answer) (monotonic, real float64) {
	t.Helper()
	if _, err := fmt.Sscan(a.said, &monotonic, &real); err != nil {
		t.Errorf("the clocks say %q: %v", a.said, err)
	}
	return monotonic, real
}

// typeInto sends text to a container's standard input, as kubectl attach does, and
// returns what has arrived.
func (s *scene) typeInto(pod, container, text string) (said string) {
	s.Helper()
	root, err := cluster.Root()
	if err != nil {
		s.Fatal(err)
	}
	attach := []string{filepath.Join(root, "bin/kubectl"), "--kubeconfig", s.Kubeconfig(), "-n", s.namespace, "attach", "-q", "-i", pod, "-c", container}
	if container == "terminal" { // kubectl wants one itself, which script(1) gives it
		attach = []string{"script", "-qec", strings.Join(append(attach, "-t"), " "), "/dev/null"}
	}
	cmd := exec.CommandContext(s.Context(), attach[0], attach[1:]...)
	in, err := cmd.StdinPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	if _, err := in.Write([]byte(text)); err != nil {
		s.Fatal(err)
	}
	s.eventually("the text has arrived", func() error {
		a := s.verified(pod, container)[container]
		for _, name := range []string{"standard-input", "container-terminal"} {
			if said = a[name].said; said != "" {
				return nil
			}
		}
		return errors.New("nothing was read")
	})
	_ = in.Close()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return said
}

// P25: what cannot come back is refused before anything is frozen, and the process is
// named.
func TestKernelObjectsThatCannotComeBackAreRefusedBeforeTheFreeze(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	says := map[string]string{
		"deleted-link":                  "another name (hard link)",
		"eventfd-semaphore":             "EFD_SEMAPHORE",
		"packet-pipe":                   "pipe of packets",
		"unix-stream-data-not-accepted": "has not been accepted",
		"stopped-process":               "SIGSTOP",
		"traced-process":                "ptrace",
		"io_uring":                      "io_uring",
		"userfaultfd":                   "userfaultfd",
		"multipath-tcp":                 "multipath TCP",
		"icmp-echo-socket":              "ICMP echo",
		"posix-message-queue":           "POSIX message queue /objects",
	}
	var refused []string
	for _, object := range objects(t) {
		if object.group == groupRefused {
			refused = append(refused, object.name)
		}
	}
	for _, name := range refused {
		b := MakePod(podOf(name)).Container("main", imageObjects)
		b.last().Args = []string{"run", "main", name}
		s.create(b.Obj())
	}
	for _, name := range refused {
		t.Run(name, func(t *testing.T) {
			s := &scene{TB: t, Cluster: s.Cluster, namespace: s.namespace}
			s.waitReady(podOf(name))
			s.verified(podOf(name), "main")
			s.ask4Checkpoint(podOf(name), podOf(name))
			checkpoint, ready := s.terminal(podOf(name))
			if ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
				t.Fatalf("it ended with %s: %s", ready.Reason, ready.Message)
			}
			s.wantText("the reason", ready.Message, "container main, process ", "objects run main "+name, says[name])
			if says[name] == "" {
				t.Error("this test does not know what the reason should say")
			}
			if checkpoint.Status.FreezeDuration != nil {
				t.Errorf("it was frozen for %s", checkpoint.Status.FreezeDuration.Duration)
			}
			s.unharmed(podOf(name))
		})
	}
}

func podOf(object string) string { return strings.ReplaceAll(object, "_", "-") }

var rowOfObject = regexp.MustCompile("(?m)^\\| `([a-z0-9_-]+)` \\| (yes|refused) \\|")

// The document and the program tell one story.
func TestTheDocumentListsEveryKernelObjectThatIsTested(t *testing.T) {
	root, err := cluster.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs/kernel-objects.md"))
	if err != nil {
		t.Fatal(err)
	}
	var documented, tested []string
	for _, row := range rowOfObject.FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, row[1]+" "+row[2])
	}
	for _, object := range objects(t) {
		verdict := "yes"
		if object.group == groupRefused {
			verdict = "refused"
		}
		tested = append(tested, object.name+" "+verdict)
	}
	slices.Sort(documented)
	slices.Sort(tested)
	for _, row := range documented {
		if !slices.Contains(tested, row) {
			t.Errorf("the document has a row %q, which test/e2e/objects does not list so", row)
		}
	}
	for _, row := range tested {
		if !slices.Contains(documented, row) {
			t.Errorf("test/e2e/objects lists %q, which the document has no such row for", row)
		}
	}
	if repeated := len(documented) - len(slices.Compact(slices.Clone(documented))); repeated > 0 {
		t.Errorf("%d rows are there twice", repeated)
	}
}
