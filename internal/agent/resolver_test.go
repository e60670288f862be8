package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/platform"
)

const restoredUID = types.UID("77777777-2222-3333-4444-555555555555")

// restoringPod is makePod under another name, as admission lets it in.
func restoringPod(change ...func(*corev1.Pod)) *corev1.Pod {
	return makePod(append([]func(*corev1.Pod){func(p *corev1.Pod) {
		p.Name, p.UID = "again", restoredUID
		p.Annotations = map[string]string{v1alpha1.AnnotationRestoreFrom: "cp", v1alpha1.AnnotationRestoreFromUID: string(pcpUID)}
		p.Status = corev1.PodStatus{Phase: corev1.PodPending}
		class := v1alpha1.RuntimeClassStasis
		p.Spec.RuntimeClassName = &class
	}}, change...)...)
}

func restoringSandbox() nodeapi.Sandbox {
	return nodeapi.Sandbox{
		ID: "sb", Namespace: "ns", Name: "again", UID: string(restoredUID),
		Annotations: map[string]string{v1alpha1.AnnotationRestoreFrom: "cp", v1alpha1.AnnotationRestoreFromUID: string(pcpUID)},
	}
}

func resolve(t *testing.T, sandbox nodeapi.Sandbox, objects ...client.Object) (*harness, error) {
	t.Helper()
	h := newHarness(t, objects...)
	for _, dir := range []string{dataOfCP, checkpointsDir + "/ns_other_uid"} {
		if err := os.MkdirAll(filepath.Join(h.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, err := (&resolver{nodeName: testNode, live: h.client, store: h.store, platform: thisPlatform()}).Resolve(t.Context(), sandbox)
	return h, err
}

// thisPlatform is that of the node of the tests.
func thisPlatform() platform.Description {
	return platform.Description{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPU: &checkpoint.CPU{Features: []string{"avx"}},
		Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1}
}

// needsOf is what a checkpoint needs whose processes saw CPU features.
func needsOf(features ...string) *v1alpha1.PlatformRequirements {
	return &v1alpha1.PlatformRequirements{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPUFeatures: features,
		Engine: v1alpha1.EngineStatus{Name: "criu", Version: "4.2"}, FormatVersion: 1}
}

func TestARestoreOfAnotherNodesCheckpointIsResolvedToACopyOfIt(t *testing.T) {
	e := newElsewhere(t, 1000)
	pcp := readyCheckpoint()
	pcp.Status.NodeName, pcp.Status.ManifestDigest, pcp.Status.Requires = "node-2", e.digest, needsOf("avx")
	c, h := newTestCopies(t, &fakeOrigin{dir: e.dir}, restoringPod(), pcp)
	src, err := (&resolver{nodeName: testNode, live: h.client, store: h.store, copies: c, platform: thisPlatform()}).Resolve(t.Context(), restoringSandbox())
	if err != nil {
		t.Fatal(err)
	}
	if src.Dir != h.store.copyPath(pcpUID) || src.ManifestDigest != e.digest {
		t.Errorf("%+v", src)
	}
	whole(t, src.Dir, e)
}

func TestAPodThatWaitsForItsDataIsToldHowFarTheyAreAndHasNotFailed(t *testing.T) {
	h := newHarness(t, restoringPod())
	metrics := NewMetrics(prometheus.NewRegistry())
	o := &observer{store: h.store, metrics: metrics, log: slog.New(slog.DiscardHandler), now: time.Now}
	o.connect(&events.FakeRecorder{}, &marker{client: h.client, log: slog.New(slog.DiscardHandler), now: time.Now}, nil, nil)
	for _, how := range []string{"it begins", "3 % of 10Gi", "7 % of 10Gi", "30 % of 10Gi", "38 % of 10Gi"} {
		o.Refused(t.Context(), restoringSandbox(), deny(v1alpha1.EventCheckpointFetching, "the data of PodCheckpoint cp are being fetched from node node-2: %s", how))
	}
	if got := testutil.ToFloat64(metrics.restores.WithLabelValues(resultFailure)); got != 0 {
		t.Errorf("%v failures counted", got)
	}
	var pod corev1.Pod
	if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "again"}, &pod); err != nil {
		t.Fatal(err)
	}
	if len(pod.Status.Conditions) != 1 || pod.Status.Conditions[0].Reason != v1alpha1.EventCheckpointFetching || !strings.Contains(pod.Status.Conditions[0].Message, "38 % of 10Gi") {
		t.Errorf("conditions %+v", pod.Status.Conditions)
	}
	var told eventsv1.EventList
	if err := h.client.List(t.Context(), &told); err != nil {
		t.Fatal(err)
	}
	if len(told.Items) != 3 { // the beginning, and the first and the fourth tenth
		for _, e := range told.Items {
			t.Log(e.Type, e.Reason, e.Note)
		}
		t.Errorf("%d events", len(told.Items))
	}
}

func TestARestoreIsResolvedToItsCheckpoint(t *testing.T) {
	h := newHarness(t, restoringPod(), readyCheckpoint())
	if err := os.MkdirAll(filepath.Join(h.dir, dataOfCP), 0o700); err != nil {
		t.Fatal(err)
	}
	src, err := (&resolver{nodeName: testNode, live: h.client, store: h.store}).Resolve(t.Context(), restoringSandbox())
	if err != nil {
		t.Fatal(err)
	}
	if src.Dir != filepath.Join(h.dir, dataOfCP) || src.ManifestDigest == "" || src.Ordinary || !slices.Equal(src.CompletedInit, []string{"setup"}) {
		t.Errorf("%+v", src)
	}
}

func TestEveryRefusalOfARestoreHasReasonAndMessage(t *testing.T) {
	for _, tc := range []struct {
		name       string
		pod        func(*corev1.Pod)
		pcp        func(*v1alpha1.PodCheckpoint)
		sandbox    func(*nodeapi.Sandbox)
		noPod      bool
		noPCP      bool
		reason     string
		wantInside string
	}{
		{name: "a Pod that the API server does not have", noPod: true, reason: v1alpha1.EventRestoreFailed, wantInside: "has no Pod ns/again"},
		{name: "another instance of the Pod", pod: func(p *corev1.Pod) { p.UID = "other" }, reason: v1alpha1.EventRestoreFailed, wantInside: `the API server has UID "other"`},
		{name: "a sandbox without UID", sandbox: func(s *nodeapi.Sandbox) { s.UID = "" }, reason: v1alpha1.EventRestoreFailed, wantInside: "with UID"},
		{name: "a mirror Pod", pod: func(p *corev1.Pod) { p.Annotations[corev1.MirrorPodAnnotationKey] = "x" }, reason: v1alpha1.EventRestoreFailed, wantInside: "static Pod"},
		{name: "a Pod being deleted", pod: func(p *corev1.Pod) {
			p.DeletionTimestamp, p.Finalizers = &metav1.Time{Time: time.Now()}, []string{"x/y"}
		}, reason: v1alpha1.EventRestoreFailed, wantInside: "being deleted"},
		{name: "a Pod of another node", pod: func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }, reason: v1alpha1.EventCheckpointWrongNode, wantInside: "node-2"},
		{name: "a Pod without pin", pod: func(p *corev1.Pod) { delete(p.Annotations, v1alpha1.AnnotationRestoreFromUID) }, reason: v1alpha1.EventRestoreFailed, wantInside: "was not admitted as a restore"},
		{name: "a sandbox that asks for another checkpoint", sandbox: func(s *nodeapi.Sandbox) { s.Annotations[v1alpha1.AnnotationRestoreFrom] = "other" }, reason: v1alpha1.EventRestoreFailed, wantInside: `"other" in the sandbox`},
		{name: "a Pod with a ticket", pod: func(p *corev1.Pod) { p.Annotations[v1alpha1.AnnotationRestoreTicket] = "x" }, reason: v1alpha1.EventRestoreFailed, wantInside: "not for Pods"},
		{name: "no such checkpoint", noPCP: true, reason: v1alpha1.EventCheckpointNotReady, wantInside: "does not exist"},
		{name: "another checkpoint of the name", pcp: func(p *v1alpha1.PodCheckpoint) { p.UID = "another" }, reason: v1alpha1.EventCheckpointNotReady, wantInside: "has UID another"},
		{name: "a checkpoint being deleted", pcp: func(p *v1alpha1.PodCheckpoint) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, reason: v1alpha1.EventCheckpointNotReady, wantInside: "being deleted"},
		{name: "a checkpoint under way", pcp: withReason(v1alpha1.ReasonCheckpointInProgress), reason: v1alpha1.EventCheckpointNotReady, wantInside: "CheckpointInProgress"},
		{name: "a failed checkpoint", pcp: withReason(v1alpha1.ReasonCheckpointFailed), reason: v1alpha1.EventCheckpointNotReady, wantInside: "CheckpointFailed: as the test has it"},
		{name: "data on another node, of which nobody knows what they need", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.NodeName = "node-2" }, reason: v1alpha1.EventCheckpointWrongNode, wantInside: `on node "node-2"`},
		{name: "data on another node, that need what this one lacks", pcp: func(p *v1alpha1.PodCheckpoint) {
			p.Status.NodeName, p.Status.Requires = "node-2", needsOf("avx", "avx512f")
		}, reason: v1alpha1.EventCheckpointWrongNode, wantInside: `cannot be restored on node "node-1", which lacks the CPU feature avx512f`},
		{name: "no digest", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.ManifestDigest = "" }, reason: v1alpha1.EventCheckpointDataCorrupt, wantInside: "digest"},
		{name: "some containers only", pcp: func(p *v1alpha1.PodCheckpoint) {
			p.Status.CheckpointedContainers = p.Status.CheckpointedContainers[:1]
		}, reason: v1alpha1.EventPodSpecMismatch, wantInside: "not of b"},
		{name: "no template", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointedPodTemplate = nil }, reason: v1alpha1.EventPodSpecMismatch, wantInside: "no Pod template"},
		{name: "another spec", pod: func(p *corev1.Pod) { p.Spec.Containers[0].Image = "img:evil" }, reason: v1alpha1.EventPodSpecMismatch, wantInside: "img:evil"},
		{name: "no location", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation = nil }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "no location"},
		{name: "data that are gone", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation.NodeLocal.Path = "ns_cp_gone" }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "not on node node-1 any more"},
		{name: "data of another checkpoint", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation.NodeLocal.Path = "ns_other_uid" }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "its own would be in"},
		{name: "a location outside of the root", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation.NodeLocal.Path = "../records" }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "does not name a directory beneath"},
		{name: "an absolute location", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation.NodeLocal.Path = "/etc" }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "does not name a directory beneath"},
		{name: "a partial checkpoint as location", pcp: func(p *v1alpha1.PodCheckpoint) { p.Status.CheckpointLocation.NodeLocal.Path = ".partial-x" }, reason: v1alpha1.EventCheckpointDataMissing, wantInside: "does not name a directory beneath"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod, pcp, sandbox := restoringPod(), readyCheckpoint(), restoringSandbox()
			if tc.pod != nil {
				tc.pod(pod)
			}
			if tc.pcp != nil {
				tc.pcp(pcp)
			}
			if tc.sandbox != nil {
				tc.sandbox(&sandbox)
			}
			var objects []client.Object
			if !tc.noPod {
				objects = append(objects, pod)
			}
			if !tc.noPCP {
				objects = append(objects, pcp)
			}
			_, err := resolve(t, sandbox, objects...)
			var refusal *nodeapi.Error
			if !errors.As(err, &refusal) {
				t.Fatalf("no refusal: %v", err)
			}
			if refusal.Reason != tc.reason || !strings.Contains(refusal.Message, tc.wantInside) {
				t.Errorf("reason %s, message %q; want %s and %q", refusal.Reason, refusal.Message, tc.reason, tc.wantInside)
			}
		})
	}
}

func TestALinkBeneathTheRootIsNotFollowed(t *testing.T) {
	h := newHarness(t, restoringPod(), readyCheckpoint())
	if err := os.Symlink("/etc", filepath.Join(h.dir, dataOfCP)); err != nil {
		t.Fatal(err)
	}
	_, err := (&resolver{nodeName: testNode, live: h.client, store: h.store}).Resolve(t.Context(), restoringSandbox())
	var refusal *nodeapi.Error
	if !errors.As(err, &refusal) || refusal.Reason != v1alpha1.EventCheckpointDataMissing {
		t.Errorf("%v", err)
	}
}

func TestAPodIsRestoredOnceAndStartsOrdinarilyAfter(t *testing.T) {
	h := newHarness(t, restoringPod(), readyCheckpoint())
	recorder := events.NewFakeRecorder(10)
	metrics := NewMetrics(prometheus.NewRegistry())
	o := &observer{store: h.store, marker: h.ops.marker, recorder: recorder, metrics: metrics, log: slog.New(slog.NewTextHandler(io.Discard, nil)), now: time.Now}
	restoring := func() (status corev1.ConditionStatus) {
		var pod corev1.Pod
		if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "again"}, &pod); err != nil {
			t.Fatal(err)
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == v1alpha1.PodConditionRestoring {
				status = c.Status
			}
		}
		return status
	}
	o.Began(t.Context(), restoringSandbox())
	if s := restoring(); s != corev1.ConditionTrue {
		t.Errorf("condition Restoring is %q while it is", s)
	}
	if err := errors.Join(o.Remember(restoringSandbox()), o.Succeeded(t.Context(), restoringSandbox(), nil)); err != nil {
		t.Fatal(err)
	}
	if s := restoring(); s != "" {
		t.Errorf("condition Restoring is %q after it", s)
	}
	src, err := (&resolver{nodeName: testNode, live: h.client, store: h.store}).Resolve(t.Context(), restoringSandbox())
	if err != nil || !src.Ordinary {
		t.Errorf("a later sandbox of the Pod: %+v, %v", src, err)
	}
	if n := testutil.ToFloat64(metrics.restores.WithLabelValues(resultSuccess)); n != 1 {
		t.Errorf("%v restores counted", n)
	}
	if got := <-recorder.Events; !strings.Contains(got, v1alpha1.EventRestoreInProgress) {
		t.Errorf("event %q", got)
	}

	if err := h.reconciler.forgetPods(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, err := h.store.wasRestored(restoredUID); err != nil || !again {
		t.Error("a Pod that exists was forgotten")
	}
	if err := h.client.Delete(t.Context(), restoringPod()); err != nil {
		t.Fatal(err)
	}
	if err := h.reconciler.forgetPods(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, err := h.store.wasRestored(restoredUID); err != nil || again {
		t.Errorf("a Pod that is gone is remembered (%v)", err)
	}
}

func TestRefusalsAndFailuresBecomeEventsOfThePod(t *testing.T) {
	h := newHarness(t)
	recorder := events.NewFakeRecorder(10)
	o := &observer{store: h.store, recorder: recorder, metrics: NewMetrics(prometheus.NewRegistry()), log: slog.New(slog.NewTextHandler(io.Discard, nil)), now: time.Now}
	o.Refused(t.Context(), restoringSandbox(), deny(v1alpha1.EventCheckpointWrongNode, "it is elsewhere"))
	o.Failed(t.Context(), restoringSandbox(), "a", deny(v1alpha1.EventRestoreFailed, "criu: no such pid"))
	for _, want := range []string{"Warning CheckpointWrongNode Not restored from PodCheckpoint cp: it is elsewhere", "Warning RestoreFailed Container a could not be restored from PodCheckpoint cp: criu: no such pid"} {
		if got := <-recorder.Events; got != want {
			t.Errorf("event %q, want %q", got, want)
		}
	}
	// RestorePod of the CRI: no Pod, no event.
	withoutPod := nodeapi.Sandbox{ID: "x", UID: "u", Annotations: map[string]string{v1alpha1.AnnotationRestoreTicket: "t"}}
	if err := errors.Join(o.Remember(withoutPod), o.Succeeded(context.Background(), withoutPod, nil)); err != nil {
		t.Error(err)
	}
	select {
	case e := <-recorder.Events:
		t.Errorf("event %q about a sandbox without a Pod", e)
	default:
	}
	if again, _ := h.store.wasRestored("u"); again {
		t.Error("a sandbox without a Pod is remembered as one")
	}
}
