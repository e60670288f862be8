package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
)

func asksForLazy(p *corev1.Pod) { p.Annotations[v1alpha1.AnnotationRestoreMemory] = "lazy" }

// memoryCondition is a Pod's.
func memoryCondition(status corev1.ConditionStatus, reason string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: v1alpha1.PodConditionMemoryRestored, Status: status, Reason: reason})
	}
}

func runs(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }

func (h *harness) podNamed(name string) *corev1.Pod {
	h.Helper()
	var pod corev1.Pod
	if err := h.client.Get(h.Context(), types.NamespacedName{Namespace: "ns", Name: name}, &pod); err != nil {
		h.Fatal(err)
	}
	return &pod
}

// memoryOf is the reason of a Pod's condition MemoryRestored; empty if it has none.
func (h *harness) memoryOf(name string) string {
	h.Helper()
	for _, c := range h.podNamed(name).Status.Conditions {
		if c.Type == v1alpha1.PodConditionMemoryRestored {
			return c.Reason
		}
	}
	return ""
}

// awayLater is an origin that nobody reaches once its manifest has been fetched.
func awayLater(from *fakeOrigin, away error) {
	open := from.open
	from.open = func(ctx context.Context, opens int, file string, offset int64) error {
		if file == checkpoint.ManifestName && opens > 1 {
			return away
		}
		return open(ctx, opens, file, offset)
	}
}

// P29: a Pod that runs before its memory is here says so first, or does not run.
func TestAPodRunsBeforeItsMemoryIsHereOnlyWhereItsCheckpointIsKeptUntilThen(t *testing.T) {
	away := errors.New("it is away")
	for name, tc := range map[string]struct {
		pod    func(*corev1.Pod)
		change func(h *harness, from *fakeOrigin, pcp *v1alpha1.PodCheckpoint)
		reason string // of the refusal; empty: it may run
		words  string
		kept   string // reason of the condition that is there then
	}{
		"all is well":              {kept: v1alpha1.ReasonMemoryComing},
		"it has been noted before": {pod: memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing), kept: v1alpha1.ReasonMemoryComing},
		"the condition cannot be written": {change: func(h *harness, _ *fakeOrigin, _ *v1alpha1.PodCheckpoint) {
			h.intercept.SubResourcePatch = func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
				return away
			}
		}, words: "it could not be noted that PodCheckpoint cp is needed until then: it is away"},
		"the PodCheckpoint is deleted meanwhile": {change: func(h *harness, _ *fakeOrigin, pcp *v1alpha1.PodCheckpoint) {
			h.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
				if err := client.IgnoreNotFound(c.Delete(ctx, pcp.DeepCopy())); err != nil {
					return err
				}
				return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
			}
		}, reason: v1alpha1.EventCheckpointNotReady, words: "PodCheckpoint cp is being deleted"},
		"it has been deleted before": {pod: memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing), change: func(h *harness, _ *fakeOrigin, pcp *v1alpha1.PodCheckpoint) {
			if err := h.client.Delete(h.Context(), pcp.DeepCopy()); err != nil {
				h.Fatal(err)
			}
		}, reason: v1alpha1.EventCheckpointNotReady, words: "PodCheckpoint cp is being deleted"},
		"the other node does not answer": {change: func(_ *harness, from *fakeOrigin, _ *v1alpha1.PodCheckpoint) {
			awayLater(from, away)
		}, reason: v1alpha1.EventCheckpointFetchFailed, words: "node node-2, which is to keep PodCheckpoint cp until it is, does not answer: it is away"},
		"it does not, and knows of the Pod": {change: func(_ *harness, from *fakeOrigin, _ *v1alpha1.PodCheckpoint) {
			awayLater(from, away)
			from.known = restoredUID
		}, kept: v1alpha1.ReasonMemoryComing},
	} {
		t.Run(name, func(t *testing.T) {
			e := memoryElsewhere(t)
			pcp := readyCheckpoint()
			pcp.Finalizers = []string{v1alpha1.FinalizerData}
			pcp.Status.NodeName, pcp.Status.ManifestDigest, pcp.Status.Requires = "node-2", e.digest, needsOf("avx")
			pods := []func(*corev1.Pod){asksForLazy}
			if tc.pod != nil {
				pods = append(pods, tc.pod)
			}
			from := &fakeOrigin{dir: e.dir, open: (&slowMemory{}).open}
			c, h := patientCopies(t, from, restoringPod(pods...), pcp)
			if tc.change != nil {
				tc.change(h, from, pcp)
			}
			src, err := (&resolver{nodeName: testNode, live: h.client, store: h.store, copies: c, marker: h.ops.marker, platform: thisPlatform()}).Resolve(t.Context(), restoringSandbox())
			if tc.words == "" {
				if err != nil || !src.Partial {
					t.Fatalf("%+v, %v", src, err)
				}
			} else if err == nil || src.Partial || reasonOf(err) != tc.reason || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("%+v, %q: %v", src, reasonOf(err), err)
			}
			h.intercept.SubResourcePatch = nil
			if got := h.memoryOf("again"); got != tc.kept {
				t.Errorf("the condition is there for %q, want %q", got, tc.kept)
			}
			if v1alpha1.AwaitsMemory(h.podNamed("again")) != (tc.kept != "") {
				t.Error("whether it awaits memory is not what its condition says")
			}
		})
	}
}

// A Pod that asks for nothing, and one that was restored before, need nothing of the other
// node once they run.
func TestAPodThatHasAllItsMemoryBeforeItRunsKeepsNoCheckpoint(t *testing.T) {
	for name, tc := range map[string]struct {
		pod      func(*corev1.Pod)
		restored bool
	}{
		"it does not ask for lazy restore": {pod: func(*corev1.Pod) {}},
		"it asks for the contrary":         {pod: func(p *corev1.Pod) { p.Annotations[v1alpha1.AnnotationRestoreMemory] = "eager" }},
		"it was restored before":           {pod: asksForLazy, restored: true},
	} {
		t.Run(name, func(t *testing.T) {
			e := memoryElsewhere(t)
			pcp := readyCheckpoint()
			pcp.Status.NodeName, pcp.Status.ManifestDigest, pcp.Status.Requires = "node-2", e.digest, needsOf("avx")
			// An earlier sandbox was to have its memory later.
			c, h := patientCopies(t, &fakeOrigin{dir: e.dir}, restoringPod(tc.pod, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing)), pcp)
			c.policy.Threshold = 1
			if tc.restored {
				if err := h.store.markRestored(types.NamespacedName{Namespace: "ns", Name: "again"}, restoredUID); err != nil {
					t.Fatal(err)
				}
			}
			src, err := (&resolver{nodeName: testNode, live: h.client, store: h.store, copies: c, marker: h.ops.marker, platform: thisPlatform()}).Resolve(t.Context(), restoringSandbox())
			if err != nil || src.Partial || src.Ordinary != tc.restored {
				t.Fatalf("%+v, %v", src, err)
			}
			if got := h.memoryOf("again"); got != "" {
				t.Errorf("the condition is there for %q", got)
			}
		})
	}
}

func TestAPodSaysThatItNeedsItsCheckpointNoMoreAndWhetherMemoryWasLost(t *testing.T) {
	for name, tc := range map[string]struct {
		lost   []string
		status corev1.ConditionStatus
		reason string
	}{
		"all is there":  {nil, corev1.ConditionTrue, v1alpha1.ReasonMemoryRestored},
		"some was lost": {[]string{"b"}, corev1.ConditionFalse, v1alpha1.ReasonMemoryLost},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, restoringPod(runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing)))
			o := &observer{store: h.store, log: slog.New(slog.DiscardHandler), now: time.Now}
			if err := o.MemoryEnded(t.Context(), restoringSandbox(), tc.lost); !errors.Is(err, errUnconnected) {
				t.Errorf("before the API server was reached: %v", err)
			}
			o.connect(h.recorder, h.ops.marker, nil, nil)
			away := errors.New("the API server is away")
			h.intercept.SubResourcePatch = func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
				return away
			}
			if err := o.MemoryEnded(t.Context(), restoringSandbox(), tc.lost); !errors.Is(err, away) {
				t.Errorf("while the API server is away: %v", err)
			}
			h.intercept.SubResourcePatch = nil
			if !v1alpha1.AwaitsMemory(h.podNamed("again")) {
				t.Fatal("it needs nothing, and nobody said so")
			}
			if err := o.MemoryEnded(t.Context(), restoringSandbox(), tc.lost); err != nil {
				t.Fatal(err)
			}
			pod := h.podNamed("again")
			if c := pod.Status.Conditions; len(c) != 1 || c[0].Status != tc.status || c[0].Reason != tc.reason || v1alpha1.AwaitsMemory(pod) {
				t.Errorf("%+v", c)
			}
		})
	}
}

// leaving is a checkpoint that is being deleted after a Pod of another node was given some
// of it.
func leaving(t *testing.T, pod ...func(*corev1.Pod)) *neighbour {
	t.Helper()
	n := newNeighbour(t, append([]func(*corev1.Pod){asksForLazy}, pod...)...)
	if _, err := n.ask(n.wanted(checkpoint.ManifestName)); err != nil {
		t.Fatal(err)
	}
	pcp := n.get("cp")
	pcp.Finalizers = []string{v1alpha1.FinalizerData}
	if err := errors.Join(n.client.Update(t.Context(), pcp), n.client.Delete(t.Context(), pcp)); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *neighbour) there() bool {
	n.Helper()
	var pcp v1alpha1.PodCheckpoint
	err := n.client.Get(n.Context(), types.NamespacedName{Namespace: "ns", Name: "cp"}, &pcp)
	if client.IgnoreNotFound(err) != nil {
		n.Fatal(err)
	}
	held, heldErr := n.store.held()
	if heldErr != nil || apierrors.IsNotFound(err) != (held[pcpUID] == "") {
		n.Errorf("the object's and the data's ends are not one: %v, %v, %v", err, held, heldErr)
	}
	return err == nil
}

// P29, X5.
func TestTheDataOfADeletedCheckpointStayUntilAPodOfAnotherNodeHasItsMemory(t *testing.T) {
	n := leaving(t, runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing))
	for range 2 {
		if r := n.reconcile(t.Context(), "cp"); r.RequeueAfter == 0 || !n.there() {
			t.Fatalf("it is not waited for: %+v", r)
		}
		if told := n.events(); !slices.Contains(told, `Normal DeletionDelayed Pod "again" on node "node-2" is still being given memory of it`) {
			t.Errorf("told %q", told)
		}
		// The next agent knows it too, and goes on giving.
		n.server.peers.known = nil
		if got, err := n.ask(n.wanted("containers/a/criu/pages-1.img")); err != nil || len(got) != 3<<20 {
			t.Errorf("what it needs: %d bytes, %v", len(got), err)
		}
		n.start()
	}
	if answer, _ := n.do("GET", archivePath, "", "Authorization", "Bearer token"); answer.StatusCode != http.StatusConflict {
		t.Errorf("an archive of what is being deleted: %s", answer.Status)
	}
	pod := n.podNamed("again")
	pod.Status.Conditions[0].Status, pod.Status.Conditions[0].Reason = corev1.ConditionTrue, v1alpha1.ReasonMemoryRestored
	if err := n.client.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if n.reconcile(t.Context(), "cp"); n.there() {
		t.Error("it is held for ever")
	}
	if left, err := n.store.needed(); err != nil || len(left) > 0 {
		t.Errorf("notes are left: %v, %v", left, err)
	}
}

func TestADeletionWaitsForNoPodThatNeedsNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		pod  []func(*corev1.Pod)
		gone bool
	}{
		"it runs with all its memory": {pod: []func(*corev1.Pod){runs}},
		"its memory is there":         {pod: []func(*corev1.Pod){runs, memoryCondition(corev1.ConditionTrue, v1alpha1.ReasonMemoryRestored)}},
		"its memory was lost":         {pod: []func(*corev1.Pod){runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryLost)}},
		"it has not begun":            {}, // and will not: it is refused
		"it is gone":                  {pod: []func(*corev1.Pod){runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing)}, gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := leaving(t, tc.pod...)
			pod := n.podNamed("again")
			if tc.gone {
				again := pod.DeepCopy()
				again.UID, again.ResourceVersion = "another", ""
				if err := errors.Join(n.client.Delete(t.Context(), pod), n.client.Create(t.Context(), again)); err != nil {
					t.Fatal(err)
				}
			}
			n.server.peers.known = nil
			if _, err := n.ask(n.wanted(checkpoint.ManifestName)); !tc.gone {
				var refusal *agentapi.Refusal
				if !errors.As(err, &refusal) || refusal.Status != http.StatusConflict {
					t.Errorf("what is being deleted is given to who does not need it: %v", err)
				}
			}
			if n.reconcile(t.Context(), "cp"); n.there() {
				t.Errorf("it stays: %q", n.events())
			}
		})
	}
	t.Run("it has ended", func(t *testing.T) {
		n := leaving(t, runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing))
		pod := n.podNamed("again")
		pod.Status.Phase = corev1.PodFailed
		if err := n.client.Status().Update(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		if n.reconcile(t.Context(), "cp"); n.there() {
			t.Errorf("it stays: %q", n.events())
		}
	})
	t.Run("whether it needs them cannot be found out", func(t *testing.T) {
		n := leaving(t, runs)
		n.intercept.Get = func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
			if _, pod := obj.(*corev1.Pod); pod {
				return io.ErrUnexpectedEOF
			}
			return c.Get(ctx, key, obj, opts...)
		}
		if _, err := n.reconciler.deleted(t.Context(), n.get("cp")); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v", err)
		}
		if !n.there() {
			t.Error("nobody knew, and the data are gone")
		}
	})
}

func TestNotesOfPodsThatNeedACheckpointAreDroppedWithTheNeed(t *testing.T) {
	pods := map[string][]func(*corev1.Pod){
		"begins": nil, "waits": {runs, memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing)},
		"runs": {runs}, "ended": {memoryCondition(corev1.ConditionFalse, v1alpha1.ReasonMemoryComing), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }},
	}
	h := newHarness(t)
	for name, change := range pods {
		pod := restoringPod(append(change, func(p *corev1.Pod) { p.Name, p.UID = name, types.UID(name) })...)
		if err := errors.Join(h.client.Create(t.Context(), pod), h.store.markNeeded(pcpUID, client.ObjectKeyFromObject(pod), pod.UID)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(h.store.markNeeded(pcpUID, types.NamespacedName{Namespace: "ns", Name: "gone"}, "gone"), h.reconciler.forgetNeeds(t.Context())); err != nil {
		t.Fatal(err)
	}
	left, err := h.store.needed()
	if err != nil || len(left) != 2 || left[0].uid != "begins" || left[1].uid != "waits" {
		t.Errorf("%+v, %v", left, err)
	}
	for _, uid := range []types.UID{"", "../x", "a.b"} {
		if h.store.markNeeded(pcpUID, types.NamespacedName{}, uid) == nil || h.store.markNeeded(uid, types.NamespacedName{}, "pod") == nil {
			t.Errorf("%q makes a file's name", uid)
		}
	}
}
