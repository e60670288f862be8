package control

import (
	"context"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func tokenRequest() *authenticationv1.TokenRequest { return &authenticationv1.TokenRequest{} }

// ready makes a Ready checkpoint "c" of the sample's Pod.
func ready(t *testing.T) (namespace_, node_ string, pod *corev1.Pod, c *checkpointv1alpha1.PodCheckpoint) {
	t.Helper()
	ns := namespace(t)
	on, agent := node(t)
	pod = source(t, ns, on)
	c = checkpoint(t, ns, "c", pod.Name)
	complete(t, agent, c, pod)
	return ns, on, pod, c
}

func TestTheSourcesManifestAppliedAgainIsPlacedAndPinned(t *testing.T) {
	ns, on, _, c := ready(t)
	pod := restoring(t, ns, "again", "c")
	must(t, shared.client.Create(t.Context(), pod))
	if class := pod.Spec.RuntimeClassName; class == nil || *class != "stasis" {
		t.Errorf("runtime class %v", class)
	}
	if pin := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]; pin != string(c.UID) {
		t.Errorf("pinned to %q, want %q", pin, c.UID)
	}
	if len(pod.Spec.SchedulingGates) > 0 {
		t.Errorf("gates %v although the checkpoint is Ready", pod.Spec.SchedulingGates)
	}
	terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if len(terms) != 1 || len(terms[0].MatchFields) != 1 || terms[0].MatchFields[0].Key != "metadata.name" || terms[0].MatchFields[0].Values[0] != on {
		t.Errorf("affinity %+v", terms)
	}
	if len(pod.Spec.Volumes) == 0 {
		t.Error("no token volume was injected: the comparison had nothing to normalise")
	}
}

func TestARestoredPodsTemplateRestoresAgain(t *testing.T) {
	ns, _, source, c := ready(t)
	// A Pod made of the template, as kubectl restore makes it.
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "from-template-", Labels: c.Status.CheckpointedPodTemplate.Labels,
			Annotations: map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: "c"}},
		Spec: c.Status.CheckpointedPodTemplate.Spec,
	}
	must(t, shared.client.Create(t.Context(), pod))
	if pod.Spec.Containers[0].Image != source.Spec.Containers[0].Image {
		t.Error("not the source's spec")
	}
}

func TestOnlyWhoMayRestoreACheckpointCreatesAPodFromIt(t *testing.T) {
	ns, _, _, _ := ready(t)
	t.Run("an editor of the namespace may not", func(t *testing.T) {
		err := user(t, ns, "ed", "stasis-editor").Create(t.Context(), restoring(t, ns, "r", "c"))
		refused(t, err, apierrors.IsForbidden, `user "ed" may not restore PodCheckpoint "c"`, "stasis-restorer")
	})
	t.Run("who may not learns nothing of the checkpoint", func(t *testing.T) {
		pod := restoring(t, ns, "r", "c")
		pod.Spec.Containers[0].Image = "other"
		err := as(t, "stranger", "pod-makers").Create(t.Context(), pod)
		refused(t, err, apierrors.IsForbidden)
		err = user(t, ns, "nosy").Create(t.Context(), pod)
		refused(t, err, apierrors.IsForbidden, "may not restore")
		if strings.Contains(err.Error(), "busybox") {
			t.Errorf("it tells the image: %v", err)
		}
	})
	t.Run("a controller may not, though the user who made its workload may", func(t *testing.T) {
		controller := user(t, ns, "system:serviceaccount:kube-system:job-controller")
		refused(t, controller.Create(t.Context(), restoring(t, ns, "r", "c")), apierrors.IsForbidden, "may not restore")
	})
	t.Run("who may restore another checkpoint may not", func(t *testing.T) {
		named := func(name string) {
			must(t, shared.client.Create(t.Context(), &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "restore-" + name},
				Rules: []rbacv1.PolicyRule{{APIGroups: []string{"checkpoint.podstasis.dev"}, Resources: []string{"podcheckpoints"}, ResourceNames: []string{name}, Verbs: []string{"restore"}}}}))
			bind(t, ns, "Role", "restore-"+name, rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: "restorers-of-" + name})
		}
		named("c")
		named("d")
		user(t, ns, "gina")
		refused(t, as(t, "gina", "restorers-of-d").Create(t.Context(), restoring(t, ns, "r", "c")), apierrors.IsForbidden, "may not restore")
		// Rights through a group count.
		must(t, as(t, "gina", "restorers-of-c").Create(t.Context(), restoring(t, ns, "of-group", "c")))
	})
	t.Run("a right in another namespace does not count", func(t *testing.T) {
		c := user(t, ns, "far")
		user(t, namespace(t), "far", "stasis-restorer")
		refused(t, c.Create(t.Context(), restoring(t, ns, "r", "c")), apierrors.IsForbidden, "may not restore")
	})
	t.Run("another namespace's checkpoint cannot be named", func(t *testing.T) {
		other := namespace(t)
		refused(t, shared.client.Create(t.Context(), restoring(t, other, "r", ns+"/c")), apierrors.IsInvalid,
			"metadata.annotations[checkpoint.podstasis.dev/restore-from]", "in the Pod's namespace")
	})
}

func TestAPodThatDiffersFromTheCheckpointIsInvalid(t *testing.T) {
	ns, _, _, _ := ready(t)
	pod := restoring(t, ns, "r", "c")
	pod.Spec.Containers[1].Image = "localhost/busybox:2"
	err := shared.client.Create(t.Context(), pod)
	refused(t, err, apierrors.IsInvalid, "spec.containers[1].image", `"localhost/busybox:2"`, `"localhost/busybox:1"`)

	generated := restoring(t, ns, "", "c")
	generated.GenerateName = "r-"
	generated.Spec.HostNetwork = true
	refused(t, shared.client.Create(t.Context(), generated), apierrors.IsInvalid, `Pod "r-`, "spec.hostNetwork: Invalid value: true: the checkpoint has false")
}

func TestACheckpointOfSomeContainersIsNotRestored(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "part"},
		Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name, Containers: []string{"a"}}}
	must(t, shared.client.Create(t.Context(), c))
	complete(t, agent, c, pod)
	refused(t, shared.client.Create(t.Context(), restoring(t, ns, "r", "part")), apierrors.IsInvalid, "holds only the containers a")
}

func TestPlacementThatConflictsIsForbidden(t *testing.T) {
	ns, on, _, c := ready(t)
	gvisor := "gvisor"
	hostname := func(name string) *corev1.Affinity {
		return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: "In", Values: []string{name}}}}}}}}
	}
	tests := map[string]struct {
		change func(*corev1.Pod)
		words  string // empty: allowed
	}{
		"another nodeName":          {func(p *corev1.Pod) { p.Spec.NodeName = "elsewhere" }, `spec.nodeName is "elsewhere"`},
		"the checkpoint's nodeName": {func(p *corev1.Pod) { p.Spec.NodeName = on }, ""},
		"another hostname":          {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": "elsewhere"} }, "excludes node"},
		"the checkpoint's hostname": {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": on} }, ""},
		"affinity to another node":  {func(p *corev1.Pod) { p.Spec.Affinity = hostname("elsewhere") }, "excludes node"},
		"affinity to the same node": {func(p *corev1.Pod) { p.Spec.Affinity = hostname(on) }, ""},
		"another runtime class":     {func(p *corev1.Pod) { p.Spec.RuntimeClassName = &gvisor }, `spec.runtimeClassName is "gvisor"`},
		"a pin to another UID":      {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = "x" }, "is Stasis' to write"},
		"a pin to the right UID":    {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = string(c.UID) }, ""},
		"a ticket":                  {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreTicket] = "x" }, "is not for Pods"},
		"the gate, though Ready": {func(p *corev1.Pod) {
			p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: checkpointv1alpha1.SchedulingGate}}
		}, ""},
		"an affinity that is looser": {func(p *corev1.Pod) {
			p.Spec.Affinity = hostname(on)
			p.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchExpressions[0].Values = []string{on, "elsewhere"}
		}, ""},
	}
	must(t, client.IgnoreAlreadyExists(shared.client.Create(t.Context(), runtimeClass(gvisor))))
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			pod := restoring(t, ns, "", "c")
			pod.GenerateName = "r-"
			tc.change(pod)
			err := shared.client.Create(t.Context(), pod)
			if tc.words == "" {
				must(t, err)
				if len(pod.Spec.SchedulingGates) > 0 || pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] != string(c.UID) {
					t.Errorf("gates %v, annotations %v", pod.Spec.SchedulingGates, pod.Annotations)
				}
				return
			}
			refused(t, err, apierrors.IsForbidden, tc.words)
		})
	}
}

func TestADryRunLeavesNothingAndDecidesAlike(t *testing.T) {
	ns, _, _, _ := ready(t)
	must(t, shared.client.Create(t.Context(), restoring(t, ns, "dry", "c"), client.DryRunAll))
	if err := shared.client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "dry"}, &corev1.Pod{}); !apierrors.IsNotFound(err) {
		t.Errorf("the Pod exists: %v", err)
	}
	refused(t, user(t, ns, "dry").Create(t.Context(), restoring(t, ns, "dry", "c"), client.DryRunAll), apierrors.IsForbidden, "may not restore")
}

func TestTheRestoreAnnotationsStayAsTheyWereAtCreation(t *testing.T) {
	ns, on, _, _ := ready(t)
	ordinary := sample[corev1.Pod](t, "pod.yaml")
	ordinary.Namespace, ordinary.Name = ns, "ordinary"
	must(t, shared.client.Create(t.Context(), ordinary))
	restored := restoring(t, ns, "restored", "c")
	must(t, shared.client.Create(t.Context(), restored))

	// Each user may do anything with Pods, and restore.
	eve := user(t, ns, "eve", "stasis-admin")
	from := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":"c"}}}`)
	uid := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from-uid":"x"}}}`)
	ticket := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-ticket":"x"}}}`)
	other := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":"d"}}}`)
	gone := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":null}}}`)
	unpinned := []byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from-uid":null}}}`)
	for name, who := range map[string]client.Client{"a user": eve, "an administrator": shared.client} {
		for _, tc := range []struct {
			what  string
			pod   *corev1.Pod
			patch []byte
		}{
			{"added", ordinary, from}, {"uid added", ordinary, uid}, {"ticket added", ordinary, ticket},
			{"changed", restored, other}, {"removed", restored, gone}, {"uid changed", restored, uid}, {"uid removed", restored, unpinned},
		} {
			patch := client.RawPatch(types.MergePatchType, tc.patch)
			t.Run(name+", "+tc.what+" through pods", func(t *testing.T) {
				refused(t, who.Patch(t.Context(), tc.pod.DeepCopy(), patch), apierrors.IsForbidden, "checkpoint.podstasis.dev/restore-")
			})
			t.Run(name+", "+tc.what+" through pods/status", func(t *testing.T) {
				refused(t, who.Status().Patch(t.Context(), tc.pod.DeepCopy(), patch), apierrors.IsForbidden, "checkpoint.podstasis.dev/restore-")
			})
		}
	}
	t.Run("through a binding", func(t *testing.T) {
		binding := &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: ordinary.Name, Annotations: map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: "c"}},
			Target:     corev1.ObjectReference{Kind: "Node", Name: on},
		}
		refused(t, shared.client.SubResource("binding").Create(t.Context(), ordinary.DeepCopy(), binding), apierrors.IsForbidden, "a Binding carries no annotations")
		refused(t, shared.client.Create(t.Context(), binding), apierrors.IsForbidden, "a Binding carries no annotations")
	})
	t.Run("a pin without a name", func(t *testing.T) {
		pod := sample[corev1.Pod](t, "pod.yaml")
		pod.Namespace, pod.Name = ns, "pinned"
		pod.Annotations = map[string]string{checkpointv1alpha1.AnnotationRestoreFromUID: "x"}
		refused(t, shared.client.Create(t.Context(), pod), apierrors.IsForbidden, "is Stasis' to write")
	})
	t.Run("other annotations are free", func(t *testing.T) {
		free := []byte(`{"metadata":{"annotations":{"team":"a"}}}`)
		must(t, eve.Patch(t.Context(), restored.DeepCopy(), client.RawPatch(types.MergePatchType, free)))
	})
}

func TestAPodWaitsForItsCheckpointAndIsLetGoWhenThatIsReady(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	source := source(t, ns, on)
	pod := restoring(t, ns, "early", "later")
	must(t, shared.client.Create(t.Context(), pod))
	if len(pod.Spec.SchedulingGates) != 1 || pod.Spec.SchedulingGates[0].Name != checkpointv1alpha1.SchedulingGate {
		t.Fatalf("gates %v", pod.Spec.SchedulingGates)
	}
	if _, pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]; pinned || pod.Spec.Affinity != nil {
		t.Errorf("annotations %v, affinity %v before there is a checkpoint", pod.Annotations, pod.Spec.Affinity)
	}
	if text := event(t, ns, pod.UID, "CheckpointNotReady"); text != `PodCheckpoint "later" does not exist in this namespace` {
		t.Errorf("event: %s", text)
	}
	ungated := pod.DeepCopy()
	ungated.Spec.SchedulingGates = nil
	refused(t, shared.client.Update(t.Context(), ungated), apierrors.IsForbidden, "taken off by Stasis")

	differs := restoring(t, ns, "differs", "later")
	differs.Spec.Containers[0].Command[2] = "sleep 1"
	must(t, shared.client.Create(t.Context(), differs))
	narrow := restoring(t, ns, "narrow", "later")
	narrow.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: "Exists"}}}}}}}
	narrow.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/other"}}
	must(t, shared.client.Create(t.Context(), narrow))

	c := checkpoint(t, ns, "later", source.Name)
	time.Sleep(200 * time.Millisecond)
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod))
	if len(pod.Spec.SchedulingGates) != 1 {
		t.Error("let go before its checkpoint was Ready")
	}
	complete(t, agent, c, source)
	must(t, eventually(t.Context(), func() error {
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod))
		if len(pod.Spec.SchedulingGates) > 0 {
			return apierrors.NewBadRequest("still held back")
		}
		return nil
	}))
	if pin := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]; pin != string(c.UID) {
		t.Errorf("pinned to %q, want %q", pin, c.UID)
	}
	if f := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchFields; len(f) != 1 || f[0].Values[0] != on {
		t.Errorf("affinity %+v", f)
	}
	must(t, eventually(t.Context(), func() error {
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(narrow), narrow))
		if len(narrow.Spec.SchedulingGates) != 1 || narrow.Spec.SchedulingGates[0].Name != "example.com/other" {
			return apierrors.NewBadRequest("another controller's gate stays, Stasis' goes")
		}
		return nil
	}))
	if term := narrow.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0]; len(term.MatchFields) != 1 || len(term.MatchExpressions) != 1 {
		t.Errorf("not tightened: %+v", term)
	}

	if text := event(t, ns, differs.UID, "PodSpecMismatch"); !strings.Contains(text, "spec.containers[0].command[2]") {
		t.Errorf("event: %s", text)
	}
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(differs), differs))
	if len(differs.Spec.SchedulingGates) != 1 {
		t.Error("a Pod that differs was let go")
	}
}

func TestAPodThatWaitsMayNotNameANode(t *testing.T) {
	ns := namespace(t)
	pod := restoring(t, ns, "r", "later")
	pod.Spec.NodeName = "node"
	refused(t, shared.client.Create(t.Context(), pod), apierrors.IsForbidden, "spec.nodeName")
}

func TestTheControllerMayChangeOnlyPodsThatWait(t *testing.T) {
	ns, _, _, _ := ready(t)
	pod := sample[corev1.Pod](t, "pod.yaml")
	pod.Namespace, pod.Name = ns, "ordinary"
	must(t, shared.client.Create(t.Context(), pod))
	controller := as(t, "system:serviceaccount:stasis-system:stasis-controller")
	patch := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`))
	refused(t, controller.Patch(t.Context(), pod, patch), apierrors.IsForbidden, "only Pods that wait")
}

func TestWithoutTheControllerOrdinaryPodsAreCreatedAndRestoringOnesRefused(t *testing.T) {
	ns := namespace(t)
	shared.plane.end()
	t.Cleanup(func() {
		var err error
		shared.plane, err = shared.startPlane(context.Background())
		if err != nil {
			t.Errorf("the control plane does not start again: %v", err)
		}
	})
	pod := sample[corev1.Pod](t, "pod.yaml")
	pod.Namespace = ns
	must(t, shared.client.Create(t.Context(), pod))
	must(t, shared.client.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	err := shared.client.Create(t.Context(), restoring(t, ns, "r", "c"))
	if err == nil || !strings.Contains(err.Error(), "place.checkpoint.podstasis.dev") {
		t.Errorf("a restoring Pod is not refused by the missing webhook: %v", err)
	}
}
