package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func errPhase(pod *corev1.Pod) error {
	return fmt.Errorf("phase %s, %v", pod.Status.Phase, containerStates(pod))
}

func errCondition(condition corev1.PodCondition) error {
	return fmt.Errorf("condition %s is %s: %s", condition.Type, condition.Status, condition.Message)
}

// P23: nothing is started, and the reason is an event of the Pod.
func TestAPodWhoseCheckpointDoesNotExistStaysPending(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	pod := s.create(MakePod("restored").RuntimeClass(engine.restores).Shell("main", idle).RestoreFrom("absent").Obj())
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointNotReady, "absent")
	s.staysPending("restored")
}

// P23: a Pod may be created before its checkpoint is Ready, and proceeds when it is.
func TestAPodCreatedBeforeItsCheckpointIsReadyIsRestoredOnceItIs(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(Counters("counters").Obj())
	s.countsOn("counters", 50)
	pod := s.create(Counters("restored").RuntimeClass(engine.restores).RestoreFrom("one").Obj())
	if len(pod.Spec.SchedulingGates) != 1 || pod.Spec.SchedulingGates[0].Name != checkpointv1alpha1.SchedulingGate {
		t.Errorf("scheduling gates %v", pod.Spec.SchedulingGates)
	}
	s.staysPending("restored")
	checkpoint := s.checkpoint("one", "counters")
	restored := s.waitReady("restored")
	if restored.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] != string(checkpoint.UID) || restored.Spec.NodeName != checkpoint.Status.NodeName {
		t.Errorf("restored on %s with pin %q", restored.Spec.NodeName, restored.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID])
	}
	s.countsOn("restored", 20)
	if lines := s.counted("restored", "a"); lines[0].Count < 50 || lines[0].Nonce != s.counted("counters", "a")[0].Nonce {
		t.Errorf("it begins with %+v", lines[0])
	}
}

// P23: the data are checked before anything is started, and the restore proceeds
// when they are whole again.
func TestARestoreFromDamagedDataIsRefusedUntilTheyAreWholeAgain(t *testing.T) {
	t.Parallel()
	for _, way := range []struct{ name, damage, repair, reason string }{
		{
			"data removed",
			"mv %[1]s %[1]s.away", "mv %[1]s.away %[1]s",
			checkpointv1alpha1.EventCheckpointDataMissing,
		},
		{
			"one bit of a memory page turned",
			flip("$(find %[1]s -name '" + engine.data + "' -size +0 | head -n1)"), flip("$(find %[1]s -name '" + engine.data + "' -size +0 | head -n1)"),
			checkpointv1alpha1.EventCheckpointDataCorrupt,
		},
		{
			"one bit of the manifest turned",
			flip("%[1]s/manifest.json"), flip("%[1]s/manifest.json"),
			checkpointv1alpha1.EventCheckpointDataCorrupt,
		},
		{
			"one file missing",
			"f=$(find %[1]s -name '" + engine.other + "' | head -n1); mv $f /var/lib/stasis/kept-$(basename %[1]s); echo $f > /var/lib/stasis/kept-$(basename %[1]s).name",
			"mv /var/lib/stasis/kept-$(basename %[1]s) $(cat /var/lib/stasis/kept-$(basename %[1]s).name); rm /var/lib/stasis/kept-$(basename %[1]s).name",
			checkpointv1alpha1.EventCheckpointDataMissing,
		},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			s.running(Counters("counters").Obj())
			s.countsOn("counters", 20)
			checkpoint := s.checkpoint("one", "counters")
			node := checkpoint.Status.NodeName
			s.onNode(node, fmt.Sprintf(way.damage, data(checkpoint)))
			pod := s.create(Counters("restored").RestoreFrom("one").Obj())
			s.waitEvent(pod, way.reason)
			s.staysPending("restored")

			s.onNode(node, fmt.Sprintf(way.repair, data(checkpoint)))
			s.waitReady("restored")
			s.countsOn("restored", 20)
			s.unharmed("restored")
		})
	}
}

// P23: so much memory is checked while CRIU brings it, and nothing of it runs before that
// has ended.
func TestARestoreFromDamagedMemoryThatIsCheckedBesideItIsRefusedUntilItIsWholeAgain(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	const mib = 768
	s.create(s.holding("source", mib, ""))
	sum := s.held("source")
	checkpoint := s.taken("one", "source")
	// What is looked at last, and from the disk: CRIU is at work by then.
	damage := fmt.Sprintf(flipAt("$(find %s -name '"+engine.data+"' -size +400M)", "$(($(stat -c %%s $f) - 1))"), data(checkpoint)) +
		`; sync "$f"; dd if="$f" iflag=nocache count=0 status=none`
	s.onNode(checkpoint.Status.NodeName, damage)
	restored := s.holding("restored", mib, "one")
	restored.Annotations[checkpointv1alpha1.AnnotationRestoreMemory] = "eager"
	pod := s.create(restored)
	s.waitEvent(pod, checkpointv1alpha1.EventCheckpointDataCorrupt)
	s.staysPending("restored")

	s.onNode(checkpoint.Status.NodeName, damage) // once more: it is as it was
	s.waitReady("restored")
	if got := s.held("restored"); got != sum {
		t.Errorf("it holds %s, captured was %s", got, sum)
	}
}

// flip is a shell command that turns the lowest bit of a file's byte 100; twice,
// it does nothing.
func flip(file string) string { return flipAt(file, "100") }

// flipAt turns that of another byte of the file $f.
func flipAt(file, at string) string {
	return `f=` + file + `; at=` + at + `; b=$(od -An -tu1 -j$at -N1 "$f" | tr -d ' '); printf "$(printf '\\%%03o' $((b ^ 1)))" | dd of="$f" bs=1 seek=$at conv=notrunc status=none`
}

// P21: Invalid, with the field's path and both values.
func TestAPodThatIsNotTheOneThatWasCheckpointedIsInvalid(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	s.checkpoint("one", "source")
	for _, way := range []struct {
		name   string
		change func(*podBuilder)
		says   []string
	}{
		{"another command", func(b *podBuilder) { b.last().Command = []string{"sleep", "1000"} }, []string{"spec.containers[0].command", "1000", "sleep 0.1"}},
		{"another image", func(b *podBuilder) { b.last().Image = imageDemo }, []string{"spec.containers[0].image", imageDemo, imageBusybox}},
		{"one container more", func(b *podBuilder) { b.Shell("more", idle) }, []string{"spec.containers", "more"}},
		{"a privilege", func(b *podBuilder) { b.last().SecurityContext = &corev1.SecurityContext{Privileged: new(true)} }, []string{"spec.containers[0].securityContext"}},
		{"an environment variable", func(b *podBuilder) { b.last().Env = []corev1.EnvVar{{Name: "A", Value: "B"}} }, []string{"spec.containers[0].env"}},
	} {
		t.Run(way.name, func(t *testing.T) {
			pod := MakePod("restored").Shell("main", idle).RestoreFrom("one")
			way.change(pod)
			s := &scene{TB: t, Cluster: s.Cluster, namespace: s.namespace}
			if err := s.refused(s.Cluster, pod.Obj(), way.says...); !apierrors.IsInvalid(err) {
				t.Errorf("the refusal is not Invalid: %v", err)
			}
		})
	}
	// And the source's own manifest, with nothing but name and annotation changed, is admitted.
	s.running(MakePod("restored").Shell("main", idle).RestoreFrom("one").Obj())
}

// P20: who restores needs the verb restore on that PodCheckpoint.
func TestAUserWithoutTheVerbRestoreIsForbiddenToRestore(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	s.checkpoint("one", "source")
	s.checkpoint("two", "source")
	user := "alice-" + s.namespace
	alice, err := s.As(user)
	if err != nil {
		t.Fatal(err)
	}
	grant := func(name string, rules ...rbacv1.PolicyRule) {
		t.Helper()
		objects := []client.Object{
			&rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}, Rules: rules},
			&rbacv1.RoleBinding{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name},
				RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name},
				Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
			},
		}
		for _, object := range objects {
			if err := s.Create(s.Context(), object); err != nil {
				t.Fatal(err)
			}
		}
	}
	grant("pods", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"create", "get"}},
		rbacv1.PolicyRule{APIGroups: []string{checkpointv1alpha1.GroupName}, Resources: []string{"podcheckpoints"}, Verbs: []string{"get", "list", "create", "update", "delete"}})
	build := func(name, checkpoint string) *corev1.Pod {
		pod := MakePod(name).Shell("main", idle).RestoreFrom(checkpoint).Obj()
		pod.Namespace = s.namespace
		return pod
	}
	s.eventually("her rights have reached the API server", func() error {
		ordinary := MakePod("ordinary").Shell("main", idle).Obj()
		ordinary.Namespace = s.namespace
		return alice.Create(s.Context(), ordinary)
	})
	if err := s.refused(alice, build("restored", "one"), user, "restore"); !apierrors.IsForbidden(err) {
		t.Errorf("the refusal is not Forbidden: %v", err)
	}
	// Whether it exists is not hers to learn in this way.
	if err := s.refused(alice, build("restored", "absent"), "restore"); !apierrors.IsForbidden(err) {
		t.Errorf("the refusal is not Forbidden: %v", err)
	}
	grant("restore-one", rbacv1.PolicyRule{APIGroups: []string{checkpointv1alpha1.GroupName}, Resources: []string{"podcheckpoints"},
		ResourceNames: []string{"one"}, Verbs: []string{checkpointv1alpha1.VerbRestore}})
	s.eventually("she may restore one", func() error { return alice.Create(s.Context(), build("restored", "one")) })
	s.waitReady("restored")
	if err := s.refused(alice, build("other", "two"), "restore"); !apierrors.IsForbidden(err) {
		t.Errorf("the refusal is not Forbidden: %v", err)
	}
}

// P20: the annotation is decided on at creation.
func TestTheRestoreAnnotationCannotBeAddedOrChangedLater(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	s.checkpoint("one", "source")
	s.running(MakePod("ordinary").Shell("main", idle).Obj())
	s.running(MakePod("restored").Shell("main", idle).RestoreFrom("one").Obj())
	for _, way := range []struct{ name, pod, patch string }{
		{"added", "ordinary", `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":"one"}}}`},
		{"changed", "restored", `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":"two"}}}`},
		{"removed", "restored", `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":null}}}`},
		{"pin added", "ordinary", `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from-uid":"x"}}}`},
		{"pin changed", "restored", `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from-uid":"x"}}}`},
	} {
		for _, subresource := range []string{"", "status"} {
			pod := s.pod(way.pod)
			patch := client.RawPatch("application/merge-patch+json", []byte(way.patch))
			var err error
			if subresource == "" {
				err = s.Patch(s.Context(), pod, patch)
			} else {
				err = s.Status().Patch(s.Context(), pod, patch)
			}
			if !apierrors.IsForbidden(err) {
				t.Errorf("annotation %s through pods/%s: %v, want Forbidden", way.name, subresource, err)
			}
		}
	}
	// Anything else of a restored Pod may be annotated.
	if err := s.Patch(s.Context(), s.pod("restored"), client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"note":"x"}}}`))); err != nil {
		t.Errorf("an ordinary annotation of a restored Pod: %v", err)
	}
}

// P20: users write neither the pin nor the ticket.
func TestUsersCannotSetTheAnnotationsOfStasisThemselves(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	for _, name := range []string{checkpointv1alpha1.AnnotationRestoreFromUID, checkpointv1alpha1.AnnotationRestoreTicket} {
		s.refused(s.Cluster, MakePod("sly").Shell("main", idle).Annotation(name, "x").Obj(), name)
		s.refused(s.Cluster, MakePod("sly").RuntimeClass(engine.restores).Shell("main", idle).RestoreFrom("absent").Annotation(name, "x").Obj(), name)
	}
}

// P22: the checkpoint decides where the Pod runs: where it has the choice, on the node
// that has the data.
func TestARestoringPodGoesToTheNodeThatHasTheData(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	source := s.running(MakePod("source").Shell("main", idle).Obj())
	s.checkpoint("one", "source")
	err := s.refused(s.Cluster, MakePod("restored").Shell("main", idle).RestoreFrom("one").Node("elsewhere").Obj(), `no stasis-agent is heard of on node "elsewhere"`)
	if !apierrors.IsForbidden(err) {
		t.Errorf("the refusal is not Forbidden: %v", err)
	}
	if restored := s.running(MakePod("restored").Shell("main", idle).RestoreFrom("one").Obj()); restored.Spec.NodeName != source.Spec.NodeName {
		t.Errorf("restored on %s, the data are on %s", restored.Spec.NodeName, source.Spec.NodeName)
	}
}

// P29: deletion takes the data along.
func TestDeletingAPodCheckpointRemovesItsDataFromTheNode(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("source").Shell("main", idle).Obj())
	checkpoint := s.checkpoint("one", "source")
	s.onNode(checkpoint.Status.NodeName, "test -f "+data(checkpoint)+"/manifest.json")
	if mode := s.onNode(checkpoint.Status.NodeName, "stat -c %a "+data(checkpoint)); mode != "700\n" {
		t.Errorf("the checkpoint's directory has mode %q", mode)
	}
	if err := s.Delete(s.Context(), checkpoint); err != nil {
		t.Fatal(err)
	}
	s.eventually("the object is gone", func() error {
		if err := s.Get(s.Context(), s.key("one"), &checkpointv1alpha1.PodCheckpoint{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("reading it: %v", err)
		}
		return nil
	})
	s.onNode(checkpoint.Status.NodeName, "test ! -e "+data(checkpoint))
}

// P28: a Pod is restored whole or not at all. Here one of two containers cannot
// be: a file that it has open on the node is not as it was.
func TestAPodThatCannotBeRestoredWholeDoesNotRunInPart(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	directory := "/var/tmp/" + s.namespace
	build := func(name string) *podBuilder {
		pod := MakePod(name).
			Shell("able", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done").
			Shell("unable", "echo one >> /host/file; exec 3< /host/file; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
		pod.pod.Spec.Volumes = []corev1.Volume{{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{
			Path: directory, Type: new(corev1.HostPathDirectoryOrCreate),
		}}}}
		pod.last().VolumeMounts = []corev1.VolumeMount{{Name: "host", MountPath: "/host"}}
		return pod
	}
	s.running(build("source").Obj())
	checkpoint := s.checkpoint("one", "source")
	node := checkpoint.Status.NodeName
	s.remove("source")
	s.onNode(node, engine.spoils+" "+directory+"/file")

	for _, name := range []string{"given-up", "restored"} {
		pod := s.create(build(name).RestoreFrom("one").Obj())
		s.waitEvent(pod, checkpointv1alpha1.EventRestoreFailed, "unable", "file")
		s.never(2*time.Second, "the other container does not run", func() error {
			// There is no log until the kubelet has told of the start.
			if log, err := s.Kubectl(t.Context(), "-n", s.namespace, "logs", name, "-c", "able"); err == nil && log != "" {
				return fmt.Errorf("it logs %q", log)
			}
			return nil
		})
		if name == "given-up" {
			// It can be deleted as any Pod, within its grace period of 3 s and a little.
			start := time.Now()
			s.remove(name)
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("deletion took %s", took)
			}
			continue
		}
		// And it goes on by itself when the cause is gone.
		s.onNode(node, "echo one > "+directory+"/file")
		s.waitReady(name)
		s.eventually("both run", func() error {
			for _, container := range []string{"able", "unable"} {
				if log := s.logs(name, container); log == "" || strings.HasPrefix(log, "1\n") {
					return fmt.Errorf("container %s logs %q", container, log)
				}
			}
			return nil
		})
	}
	s.remove("restored")
	s.onNode(node, "rm -r "+directory)
}
