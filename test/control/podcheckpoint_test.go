package control

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestAPodCheckpointsSpecIsCheckedAtCreation(t *testing.T) {
	ns := namespace(t)
	tests := map[string]struct {
		change func(*checkpointv1alpha1.PodCheckpoint)
		words  string
	}{
		"no Pod":                        {func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.SourcePodName = "" }, "spec.sourcePodName"},
		"a Pod of another namespace":    {func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.SourcePodName = "other/pod" }, "spec.sourcePodName"},
		"an empty UID":                  {func(c *checkpointv1alpha1.PodCheckpoint) { u := types.UID(""); c.Spec.SourcePodUID = &u }, "leave it out"},
		"a negative timeout":            {func(c *checkpointv1alpha1.PodCheckpoint) { n := int32(-1); c.Spec.TimeoutSeconds = &n }, "spec.timeoutSeconds"},
		"a timeout beyond an hour":      {func(c *checkpointv1alpha1.PodCheckpoint) { n := int32(3601); c.Spec.TimeoutSeconds = &n }, "spec.timeoutSeconds"},
		"a container twice":             {func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.Containers = []string{"a", "a"} }, "spec.containers"},
		"a name that its files outgrow": {func(c *checkpointv1alpha1.PodCheckpoint) { c.Name = strings.Repeat("x", 129) }, "at most 128 characters"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := &checkpointv1alpha1.PodCheckpoint{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c"},
				Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "p"},
			}
			tc.change(c)
			refused(t, shared.client.Create(t.Context(), c), apierrors.IsInvalid, tc.words)
		})
	}
}

func TestAPodCheckpointGetsTheNodeOfItsPodWhateverTheUserWrote(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	pod := source(t, ns, on)
	for name, wrote := range map[string]string{"nothing": "", "another node": "elsewhere", "the right one": on} {
		t.Run(name, func(t *testing.T) {
			c := &checkpointv1alpha1.PodCheckpoint{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "c-"},
				Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name, NodeName: wrote},
			}
			must(t, shared.client.Create(t.Context(), c))
			if c.Spec.NodeName != on {
				t.Errorf("spec.nodeName = %q, want %q", c.Spec.NodeName, on)
			}
		})
	}
}

func TestAPodMayForbidCheckpointsOfIt(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	pod := source(t, ns, on)
	label := func(value string) {
		t.Helper()
		must(t, shared.client.Patch(t.Context(), pod, client.RawPatch(types.MergePatchType,
			[]byte(`{"metadata":{"labels":{"checkpoint.podstasis.dev/allowed":"`+value+`"}}}`))))
	}
	label("false")
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c"}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}
	refused(t, shared.client.Create(t.Context(), c.DeepCopy()), apierrors.IsForbidden, `Pod "counter" forbids it`, "checkpoint.podstasis.dev/allowed=false")
	_, err := ask(t, "", ns, pod.Name, subresources.PodCheckpointRequestSpec{CheckpointName: "c"})
	refused(t, err, apierrors.IsForbidden, `Pod "counter" forbids it`)
	label("true")
	must(t, shared.client.Create(t.Context(), c))
}

func TestAPodCheckpointsSpecDoesNotChange(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	c := checkpoint(t, ns, "c", pod.Name)
	changed := c.DeepCopy()
	changed.Spec.SourcePodName = "other"
	refused(t, shared.client.Update(t.Context(), changed), apierrors.IsInvalid, "spec is immutable")

	// A write to one part cannot change the other.
	changed = c.DeepCopy()
	changed.Spec.SourcePodName = "other"
	changed.Status.NodeName = on
	must(t, agent.Status().Update(t.Context(), changed))
	if changed.Spec.SourcePodName != pod.Name || changed.Status.NodeName != on {
		t.Errorf("after a status write: source %q, node %q", changed.Spec.SourcePodName, changed.Status.NodeName)
	}
	changed.Status.NodeName = "forged"
	changed.Labels = map[string]string{"a": "b"}
	must(t, shared.client.Update(t.Context(), changed))
	if changed.Status.NodeName != on || changed.Labels["a"] != "b" {
		t.Errorf("after a write of the object: node %q, labels %v", changed.Status.NodeName, changed.Labels)
	}
}

func TestOnlyTheAgentOfItsNodeWritesAPodCheckpointsStatus(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	_, stranger := node(t)
	pod := source(t, ns, on)
	c := checkpoint(t, ns, "c", pod.Name)
	c.Status = readyStatus(pod)

	refused(t, shared.client.Status().Update(t.Context(), c.DeepCopy()), apierrors.IsForbidden, "only Stasis writes the status")
	refused(t, user(t, ns, "eve", "stasis-admin").Status().Update(t.Context(), c.DeepCopy()), apierrors.IsForbidden)
	refused(t, stranger.Status().Update(t.Context(), c.DeepCopy()), apierrors.IsForbidden, "writes only to objects of that node")

	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	unbound, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), "stasis-agent", tokenRequest(), metav1.CreateOptions{})
	must(t, err)
	refused(t, withToken(t, unbound.Status.Token).Status().Update(t.Context(), c.DeepCopy()), apierrors.IsForbidden, "names no node")

	controller, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), "stasis-controller", tokenRequest(), metav1.CreateOptions{})
	must(t, err)
	refused(t, withToken(t, controller.Status.Token).Status().Update(t.Context(), c.DeepCopy()), apierrors.IsForbidden, "only the agent")

	elsewhere := c.DeepCopy()
	elsewhere.Status.NodeName = "elsewhere"
	refused(t, agent.Status().Update(t.Context(), elsewhere), apierrors.IsForbidden, "names no other node")
	must(t, agent.Status().Update(t.Context(), c))
}

func TestAnAgentChangesNothingOfAPodCheckpointButItsFinalizers(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	_, stranger := node(t)
	c := checkpoint(t, ns, "c", source(t, ns, on).Name)

	add := c.DeepCopy()
	add.Finalizers = []string{checkpointv1alpha1.FinalizerData}
	refused(t, stranger.Patch(t.Context(), add.DeepCopy(), client.MergeFrom(c)), apierrors.IsForbidden, "writes only to objects of that node")
	must(t, agent.Patch(t.Context(), add, client.MergeFrom(c)))

	label := add.DeepCopy()
	label.Labels = map[string]string{"a": "b"}
	refused(t, agent.Patch(t.Context(), label, client.MergeFrom(add)), apierrors.IsForbidden, "nothing else")
	refused(t, agent.Delete(t.Context(), add.DeepCopy()), apierrors.IsForbidden)
	add.Finalizers = nil
	must(t, shared.client.Update(t.Context(), add))
}

func TestAnAgentWritesTheStatusOfPodsOfItsNodeOnlyAndListsNone(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	_, stranger := node(t)
	pod := source(t, ns, on)
	condition := []byte(`{"status":{"conditions":[{"type":"checkpoint.podstasis.dev/Checkpointing","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`)
	patch := client.RawPatch(types.StrategicMergePatchType, condition)
	refused(t, stranger.Status().Patch(t.Context(), pod.DeepCopy(), patch), apierrors.IsForbidden, "writes only to objects of that node")
	must(t, agent.Status().Patch(t.Context(), pod.DeepCopy(), patch))
	givenUp := client.RawPatch(types.StrategicMergePatchType,
		[]byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/given-up":"now"}},"status":{"phase":"Failed","reason":"RestoreFailed"}}`))
	refused(t, stranger.Status().Patch(t.Context(), pod.DeepCopy(), givenUp), apierrors.IsForbidden, "writes only to objects of that node")
	given := pod.DeepCopy()
	must(t, agent.Status().Patch(t.Context(), given, givenUp))
	if given.Status.Phase != corev1.PodFailed || given.Annotations[checkpointv1alpha1.AnnotationGivenUp] != "now" {
		t.Errorf("phase %s, annotations %v", given.Status.Phase, given.Annotations)
	}
	refused(t, agent.Update(t.Context(), pod.DeepCopy()), apierrors.IsForbidden)
	refused(t, agent.List(t.Context(), &corev1.PodList{}), apierrors.IsForbidden)
	refused(t, agent.List(t.Context(), &corev1.SecretList{}), apierrors.IsForbidden)
}

func TestATerminalConditionDoesNotChange(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	now := metav1.NewTime(time.Now().Truncate(time.Second))
	condition := func(status metav1.ConditionStatus, reason string) []metav1.Condition {
		return []metav1.Condition{{Type: "Ready", Status: status, Reason: reason, Message: "m", LastTransitionTime: now}}
	}
	ready := readyStatus(pod).Conditions
	tests := map[string]struct{ first, second []metav1.Condition }{
		"Ready to failed":          {ready, condition("False", "CheckpointFailed")},
		"Ready to in progress":     {ready, condition("False", "CheckpointInProgress")},
		"Ready to nothing":         {ready, nil},
		"failed to Ready":          {condition("False", "CheckpointFailed"), ready},
		"failed to in progress":    {condition("False", "CheckpointFailed"), condition("False", "CheckpointInProgress")},
		"replaced to in progress":  {condition("False", "SourcePodReplaced"), condition("False", "CheckpointInProgress")},
		"failed to another reason": {condition("False", "CheckpointFailed"), condition("False", "SourcePodReplaced")},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "c-"}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}
			must(t, shared.client.Create(t.Context(), c))
			c.Status = readyStatus(pod)
			c.Status.Conditions = tc.first
			must(t, agent.Status().Update(t.Context(), c))
			c.Status.Conditions = tc.second
			refused(t, agent.Status().Update(t.Context(), c.DeepCopy()), apierrors.IsInvalid, "does not change any more")
		})
	}
	t.Run("in progress to Ready is how it goes", func(t *testing.T) {
		c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "c-"}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}
		must(t, shared.client.Create(t.Context(), c))
		c.Status.Conditions = condition("False", "CheckpointInProgress")
		must(t, agent.Status().Update(t.Context(), c))
		c.Status = readyStatus(pod)
		must(t, agent.Status().Update(t.Context(), c))
	})
}

func TestWhatAReadyCheckpointIsRestoredByIsCompleteAndDoesNotChange(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	c := checkpoint(t, ns, "c", pod.Name)
	changes := map[string]func(*checkpointv1alpha1.PodCheckpointStatus){
		"nodeName":                func(s *checkpointv1alpha1.PodCheckpointStatus) { s.NodeName = "" },
		"sourcePodUID":            func(s *checkpointv1alpha1.PodCheckpointStatus) { s.SourcePodUID = nil },
		"checkpointLocation":      func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CheckpointLocation = nil },
		"manifestDigest":          func(s *checkpointv1alpha1.PodCheckpointStatus) { s.ManifestDigest = "" },
		"completionTime":          func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CompletionTime = nil },
		"checkpointedPodTemplate": func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CheckpointedPodTemplate = nil },
	}
	for name, change := range changes {
		t.Run("not without "+name, func(t *testing.T) {
			incomplete := c.DeepCopy()
			incomplete.Status = readyStatus(pod)
			change(&incomplete.Status)
			refused(t, agent.Status().Update(t.Context(), incomplete), apierrors.IsInvalid, "a checkpoint that is Ready has")
		})
	}
	for name, path := range map[string]string{"absolute": "/etc", "up": "../x", "up in the middle": "a/../../x", "empty": ""} {
		t.Run("no location "+name, func(t *testing.T) {
			outside := c.DeepCopy()
			outside.Status = readyStatus(pod)
			outside.Status.CheckpointLocation.NodeLocal.Path = path
			refused(t, agent.Status().Update(t.Context(), outside), apierrors.IsInvalid, "path")
		})
	}
	complete(t, agent, c, pod)
	forge := map[string]func(*checkpointv1alpha1.PodCheckpointStatus){
		"digest": func(s *checkpointv1alpha1.PodCheckpointStatus) {
			s.ManifestDigest = "sha256:" + strings.Repeat("1", 64)
		},
		"location": func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CheckpointLocation.NodeLocal.Path = "other" },
		"source":   func(s *checkpointv1alpha1.PodCheckpointStatus) { u := types.UID("other"); s.SourcePodUID = &u },
		"template": func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CheckpointedPodTemplate.Spec.HostNetwork = true },
	}
	for name, change := range forge {
		t.Run("another "+name, func(t *testing.T) {
			forged := c.DeepCopy()
			change(&forged.Status)
			refused(t, agent.Status().Update(t.Context(), forged), apierrors.IsInvalid, "does not change any more")
		})
	}
}

func TestWhatNoAgentOwnsEndsWithItsOwnMessage(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	t.Run("a Pod that does not exist", func(t *testing.T) {
		c := checkpoint(t, ns, "none", "ghost")
		r := ended(t, c)
		if r.Reason != "CheckpointFailed" || r.Message != `Pod "ghost" does not exist in this namespace` {
			t.Errorf("%s: %s", r.Reason, r.Message)
		}
		if text := event(t, ns, c.UID, "CheckpointFailed"); text != r.Message {
			t.Errorf("event: %s", text)
		}
	})
	t.Run("a Pod of another namespace", func(t *testing.T) {
		source(t, ns, on)
		if r := ended(t, checkpoint(t, namespace(t), "far", "counter")); r.Message != `Pod "counter" does not exist in this namespace` {
			t.Error(r.Message)
		}
	})
	t.Run("a Pod that is not scheduled", func(t *testing.T) {
		pod := sample[corev1.Pod](t, "pod.yaml")
		pod.Namespace, pod.Name = ns, "waiting"
		must(t, shared.client.Create(t.Context(), pod))
		if r := ended(t, checkpoint(t, ns, "waiting", "waiting")); r.Message != `Pod "waiting" is not scheduled to a node (phase Pending)` {
			t.Error(r.Message)
		}
	})
	t.Run("another instance of a Pod that is not scheduled", func(t *testing.T) {
		uid := types.UID("other")
		c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "replaced"},
			Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "waiting", SourcePodUID: &uid}}
		must(t, shared.client.Create(t.Context(), c))
		if r := ended(t, c); r.Reason != "SourcePodReplaced" {
			t.Errorf("%s: %s", r.Reason, r.Message)
		}
	})
	t.Run("a Pod of a node with an agent is left to it", func(t *testing.T) {
		c := checkpoint(t, ns, "owned", "counter")
		time.Sleep(300 * time.Millisecond)
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c))
		if len(c.Status.Conditions) > 0 {
			t.Errorf("conditions: %+v", c.Status.Conditions)
		}
	})
}

func TestACheckpointWhoseNodeIsGoneCanBeDeleted(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	c := checkpoint(t, ns, "c", pod.Name)
	complete(t, agent, c, pod)
	held := c.DeepCopy()
	held.Finalizers = []string{checkpointv1alpha1.FinalizerData}
	must(t, agent.Patch(t.Context(), held, client.MergeFrom(c)))
	must(t, shared.client.Delete(t.Context(), held))

	time.Sleep(300 * time.Millisecond)
	if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
		t.Fatalf("gone although its node exists: %v", err)
	}
	must(t, shared.client.Delete(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: on}}))
	must(t, eventually(t.Context(), func() error {
		err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there: %v", err)
	}))
}

func TestPodCheckpointsAreSelectedByPodAndNode(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	c := checkpoint(t, ns, "c", pod.Name)
	complete(t, agent, c, pod)
	checkpoint(t, ns, "other", "ghost")
	for _, selector := range []string{"spec.sourcePodName=" + pod.Name, "spec.nodeName=" + on, "status.nodeName=" + on} {
		var list checkpointv1alpha1.PodCheckpointList
		must(t, shared.client.List(t.Context(), &list, client.InNamespace(ns), &client.ListOptions{Raw: &metav1.ListOptions{FieldSelector: selector}}))
		if len(list.Items) != 1 || list.Items[0].Name != "c" {
			t.Errorf("%s: %d objects", selector, len(list.Items))
		}
	}
}

func TestPrinterColumnsSayWhatKubectlUsersAsk(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	complete(t, agent, checkpoint(t, ns, "c", pod.Name), pod)
	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	raw, err := set.Discovery().RESTClient().Get().AbsPath("/apis/checkpoint.podstasis.dev/v1alpha1/namespaces/"+ns+"/podcheckpoints").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(t.Context())
	must(t, err)
	var table metav1.Table
	must(t, json.Unmarshal(raw, &table))
	got := make(map[string]any)
	for i, column := range table.ColumnDefinitions {
		got[column.Name] = table.Rows[0].Cells[i]
	}
	want := map[string]any{"Name": "c", "Ready": "True", "Reason": "CheckpointCompleted", "Pod": "counter", "Node": on, "Size": "12Mi", "Frozen": "123ms"}
	for name, value := range want {
		if got[name] != value {
			t.Errorf("%s = %v, want %v", name, got[name], value)
		}
	}
	if _, aged := got["Age"]; !aged {
		t.Error("no column Age")
	}
}

func TestRolesGrantWhatTheirNamesSay(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	pod := source(t, ns, on)
	existing := checkpoint(t, ns, "c", pod.Name)
	tests := map[string]struct{ read, create, restore bool }{
		"stasis-viewer":   {read: true},
		"stasis-editor":   {read: true, create: true},
		"stasis-restorer": {read: true, restore: true},
		"stasis-admin":    {read: true, create: true, restore: true},
	}
	for role, may := range tests {
		t.Run(role, func(t *testing.T) {
			c := user(t, ns, "user-of-"+role, role)
			check := func(what string, err error, allowed bool) {
				if allowed && err != nil {
					t.Errorf("may not %s: %v", what, err)
				}
				if !allowed && !apierrors.IsForbidden(err) {
					t.Errorf("may %s: %v", what, err)
				}
			}
			check("read", c.Get(t.Context(), client.ObjectKeyFromObject(existing), &checkpointv1alpha1.PodCheckpoint{}), may.read)
			check("create", c.Create(t.Context(), &checkpointv1alpha1.PodCheckpoint{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "by-"},
				Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}), may.create)
			check("restore", c.Create(t.Context(), restoring(t, ns, "by-"+role, "c")), may.restore)
			check("read in another namespace", c.List(t.Context(), &checkpointv1alpha1.PodCheckpointList{}, client.InNamespace("default")), false)
		})
	}
}
