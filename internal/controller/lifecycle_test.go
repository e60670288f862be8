package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// told collects events.
type told []string

func (e *told) Eventf(_, _ runtime.Object, eventtype, reason, _, note string, args ...any) {
	*e = append(*e, eventtype+" "+reason+" "+fmt.Sprintf(note, args...))
}

// newLifecycle returns a reconciler over the objects; its status writes are
// counted.
func newLifecycle(t *testing.T, statusError error, objects ...client.Object) (*lifecycle, *told, *int) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, checkpointv1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	var events told
	var writes int
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithStatusSubresource(&checkpointv1alpha1.PodCheckpoint{}).
		WithIndex(&corev1.Pod{}, "spec.nodeName", func(o client.Object) []string { return []string{o.(*corev1.Pod).Spec.NodeName} }).
		WithInterceptorFuncs(interceptor.Funcs{SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			writes++
			if statusError != nil {
				return statusError
			}
			return c.SubResource(sub).Patch(ctx, o, patch, opts...)
		}, SubResourceUpdate: func(context.Context, client.Client, string, client.Object, ...client.SubResourceUpdateOption) error {
			return errors.New("a PodCheckpoint is written as a whole: what a newer agent has written there would be gone")
		}}).Build()
	return &lifecycle{client: c, live: c, namespace: "stasis-system", clock: clocktesting.NewFakePassiveClock(born.Add(time.Minute)), events: &events, log: slog.New(slog.DiscardHandler)}, &events, &writes
}

var request = reconcile.Request{NamespacedName: client.ObjectKey{Namespace: "n", Name: "c"}}

func TestAnEndIsWrittenOnceAndToldAfterwards(t *testing.T) {
	r, events, writes := newLifecycle(t, nil, checkpoint(""))
	for range 3 {
		if _, err := r.Reconcile(t.Context(), request); err != nil {
			t.Fatal(err)
		}
	}
	if *writes != 1 || len(*events) != 1 || (*events)[0] != `Warning CheckpointFailed Pod "p" does not exist in this namespace` {
		t.Errorf("%d writes, events %q", *writes, *events)
	}
	var c checkpointv1alpha1.PodCheckpoint
	if err := r.client.Get(t.Context(), request.NamespacedName, &c); err != nil {
		t.Fatal(err)
	}
	if ready := c.ReadyCondition(); ready == nil || ready.Reason != "CheckpointFailed" || !ready.LastTransitionTime.Time.Equal(born.Add(time.Minute)) {
		t.Errorf("condition %+v", ready)
	}
	if c.Status.CompletionTime != nil {
		t.Error("a checkpoint that failed has a completion time")
	}
}

func TestAControllerThatHasJustStartedWaitsForAgentsBeforeItEndsACheckpoint(t *testing.T) {
	r, _, writes := newLifecycle(t, nil, checkpoint("node"), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}})
	now := r.clock.Now()
	r.since = now.Add(-10 * time.Second)
	result, err := r.Reconcile(t.Context(), request)
	if err != nil || *writes != 0 || result.RequeueAfter != 20*time.Second {
		t.Errorf("%d writes, result %+v, error %v", *writes, result, err)
	}
	r.since = now.Add(-settle)
	if _, err := r.Reconcile(t.Context(), request); err != nil || *writes != 1 {
		t.Errorf("%d writes, error %v", *writes, err)
	}
}

func TestNothingIsToldOfAnEndThatWasNotWritten(t *testing.T) {
	r, events, _ := newLifecycle(t, errors.New("no etcd"), checkpoint(""))
	if _, err := r.Reconcile(t.Context(), request); err == nil {
		t.Error("the failure was swallowed")
	}
	if len(*events) > 0 {
		t.Errorf("events %q", *events)
	}
}

func TestAConflictIsTriedAgain(t *testing.T) {
	conflict := apierrors.NewConflict(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource(), "c", errors.New("changed"))
	r, events, _ := newLifecycle(t, conflict, checkpoint(""))
	result, err := r.Reconcile(t.Context(), request)
	if err != nil || result.RequeueAfter == 0 || len(*events) > 0 {
		t.Errorf("result %+v, error %v, events %q", result, err, *events)
	}
}

func TestWhatHasEndedIsLeftAlone(t *testing.T) {
	for _, condition := range []metav1.Condition{
		{Type: "Ready", Status: "True", Reason: "CheckpointCompleted"},
		{Type: "Ready", Status: "False", Reason: "CheckpointFailed"},
		{Type: "Ready", Status: "False", Reason: "SourcePodReplaced"},
	} {
		c := checkpoint("")
		c.Status.Conditions = []metav1.Condition{condition}
		r, _, writes := newLifecycle(t, nil, c)
		if _, err := r.Reconcile(t.Context(), request); err != nil || *writes > 0 {
			t.Errorf("%s: %d writes, error %v", condition.Reason, *writes, err)
		}
	}
}

func TestTheAgentThatIsReadyCountsWhileOneIsReplaced(t *testing.T) {
	labels := map[string]string{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "agent"}
	pod := func(namespace, name, node string, ready corev1.ConditionStatus) *corev1.Pod {
		p := agentThat(ready)
		p.ObjectMeta = metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}
		p.Spec.NodeName = node
		return p
	}
	r, _, _ := newLifecycle(t, nil, nodeThat("True"),
		pod("stasis-system", "a-old", "node-1", "False"), pod("stasis-system", "b-new", "node-1", "True"), pod("stasis-system", "c-old", "node-1", "False"),
		pod("stasis-system", "elsewhere", "node-2", "True"), pod("other", "forged", "node-1", "True"))
	f, err := r.look(t.Context(), checkpoint("node-1"))
	if err != nil || f.agent == nil || f.agent.Name != "b-new" {
		t.Errorf("agent %+v, error %v", f.agent, err)
	}
}

func TestAFinalizerIsTakenOffOnlyWhenNoNodeHoldsData(t *testing.T) {
	tests := map[string]struct {
		node     string
		objects  []client.Object
		released bool
	}{
		"its node exists":     {"node-1", []client.Object{nodeThat("True")}, false},
		"its node is away":    {"node-1", []client.Object{nodeThat("Unknown")}, false},
		"its node is gone":    {"node-1", nil, true},
		"it never had a node": {"", nil, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := checkpoint(tc.node)
			c.Finalizers = []string{checkpointv1alpha1.FinalizerData, "example.com/other"}
			c.DeletionTimestamp = &metav1.Time{Time: born}
			r, _, writes := newLifecycle(t, nil, append(tc.objects, c)...)
			if _, err := r.Reconcile(t.Context(), request); err != nil {
				t.Fatal(err)
			}
			if err := r.client.Get(t.Context(), request.NamespacedName, c); err != nil {
				t.Fatal(err)
			}
			if released := len(c.Finalizers) == 1 && c.Finalizers[0] == "example.com/other"; released != tc.released || *writes > 0 {
				t.Errorf("finalizers %v, %d status writes", c.Finalizers, *writes)
			}
		})
	}
}

// The first questions about a PodCheckpoint are of node and agent; with a node that
// does not exist they would end it, and with none that is Ready call it Pending.
func TestACheckpointIsLeftToItsAgentForAMoment(t *testing.T) {
	r, _, writes := newLifecycle(t, nil, checkpoint("node-1"), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}})
	clock := clocktesting.NewFakePassiveClock(born.Add(time.Second))
	r.clock = clock
	r.live = nil // nobody is asked
	again, err := r.Reconcile(t.Context(), request)
	if err != nil || again.RequeueAfter != headStart-time.Second {
		t.Errorf("%+v, %v", again, err)
	}
	r.live = r.client
	clock.SetTime(born.Add(headStart))
	if _, err := r.Reconcile(t.Context(), request); err != nil || *writes != 1 {
		t.Errorf("after it: %v, %d writes", err, *writes)
	}
}
