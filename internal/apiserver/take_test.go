package apiserver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// everywhere finds an agent on every node.
type everywhere struct{}

func (everywhere) Locate(context.Context, string, int) (agentapi.Announcement, error) {
	return agentapi.Announcement{}, nil
}

func takerOf(t *testing.T, funcs interceptor.Funcs, objects ...client.Object) (*taker, client.WithWatch) {
	t.Helper()
	scheme, _ := knownTypes()
	base := fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithStatusSubresource(&checkpointv1alpha1.PodCheckpoint{}).Build()
	return &taker{objects: interceptor.NewClient(base, funcs), agents: everywhere{}, clock: clock.RealClock{}}, base
}

func running() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", UID: "pod-1"}, Spec: corev1.PodSpec{NodeName: "node-1"}}
}

func asked(seconds int32) wanted {
	return wanted{namespace: "n", pod: "p", user: "ann", spec: subresources.PodCheckpointRequestSpec{CheckpointName: "c", WaitSeconds: &seconds}}
}

func finish(t *testing.T, c client.Client) {
	t.Helper()
	var checkpoint checkpointv1alpha1.PodCheckpoint
	for c.Get(t.Context(), client.ObjectKey{Namespace: "n", Name: "c"}, &checkpoint) != nil {
		time.Sleep(time.Millisecond)
	}
	checkpoint.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: "True", Reason: "CheckpointCompleted", LastTransitionTime: metav1.Now()}}
	if err := c.Status().Update(t.Context(), &checkpoint); err != nil {
		t.Error(err)
	}
}

func TestACallWaitsForTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, c := takerOf(t, interceptor.Funcs{}, running())
		go func() {
			time.Sleep(50 * time.Millisecond)
			finish(t, c)
		}()
		got, err := k.take(t.Context(), asked(30))
		if err != nil || !got.IsReady() {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func TestACallEndsWithItsTimeAndSaysWhatThereIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, _ := takerOf(t, interceptor.Funcs{}, running())
		began := time.Now()
		got, err := k.take(t.Context(), asked(1))
		if err != nil || got.Name != "c" || got.IsTerminal() {
			t.Errorf("%+v, %v", got, err)
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("after %s", took)
		}
	})
}

func TestACallEndsWhenItsClientGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, c := takerOf(t, interceptor.Funcs{}, running())
		ctx, leave := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer leave()
		began := time.Now()
		if _, err := k.take(ctx, asked(30)); err == nil {
			t.Error("an answer for nobody")
		}
		if took := time.Since(began); took != 100*time.Millisecond {
			t.Errorf("after %s", took)
		}
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "n", Name: "c"}, &checkpointv1alpha1.PodCheckpoint{}); err != nil {
			t.Errorf("the checkpoint is gone with it: %v", err)
		}
	})
}

func TestAWatchThatBreaksIsBegunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := 0
		k, c := takerOf(t, interceptor.Funcs{Watch: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) (watch.Interface, error) {
			switch broken++; broken {
			case 1:
				return nil, errors.New("not now")
			case 2:
				w := watch.NewFake()
				go w.Error(&metav1.Status{Code: 410})
				return w, nil
			}
			return c.Watch(ctx, list, opts...)
		}}, running())
		go func() {
			time.Sleep(1500 * time.Millisecond)
			finish(t, c)
		}()
		if got, err := k.take(t.Context(), asked(30)); err != nil || !got.IsReady() || broken < 3 {
			t.Errorf("%+v, %v, %d watches", got, err, broken)
		}
	})
}

func TestACheckpointThatIsDeletedMeanwhileIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, c := takerOf(t, interceptor.Funcs{}, running())
		go func() {
			time.Sleep(100 * time.Millisecond)
			if err := c.Delete(t.Context(), &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c"}}); err != nil {
				t.Error(err)
			}
		}()
		if _, err := k.take(t.Context(), asked(30)); !apierrors.IsGone(err) {
			t.Errorf("%v", err)
		}
	})
}

func TestOnlyTheSameRequestFindsACheckpointAgain(t *testing.T) {
	seconds, uid, other := int32(9), types.UID("pod-1"), types.UID("pod-2")
	there := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c"}, Spec: checkpointv1alpha1.PodCheckpointSpec{
		SourcePodName: "p", Containers: []string{"a", "b"}, TimeoutSeconds: &seconds, Options: map[string]string{"k": "v"}},
		Status: checkpointv1alpha1.PodCheckpointStatus{SourcePodUID: &uid}}
	same := func() wanted {
		w := asked(0)
		w.spec.Containers, w.spec.TimeoutSeconds, w.spec.Options = []string{"b", "a"}, &seconds, map[string]string{"k": "v"}
		return w
	}
	for name, tc := range map[string]struct {
		change func(*wanted)
		found  bool
	}{
		"the same":           {func(*wanted) {}, true},
		"with its Pod's UID": {func(w *wanted) { w.spec.SourcePodUID = &uid }, true},
		"of another Pod":     {func(w *wanted) { w.pod = "q" }, false},
		"of another UID":     {func(w *wanted) { w.spec.SourcePodUID = &other }, false},
		"of fewer":           {func(w *wanted) { w.spec.Containers = []string{"a"} }, false},
		"another timeout":    {func(w *wanted) { w.spec.TimeoutSeconds = nil }, false},
		"another option":     {func(w *wanted) { w.spec.Options = nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			// Its Pod may be gone by now.
			k, _ := takerOf(t, interceptor.Funcs{}, there.DeepCopy())
			w := same()
			tc.change(&w)
			_, err := k.take(t.Context(), w)
			if tc.found && err != nil || !tc.found && !apierrors.IsConflict(err) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestTwoCallsAtOneTimeTakeOneCheckpoint(t *testing.T) {
	raced := false
	k, c := takerOf(t, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
		if !raced {
			raced = true
			if err := c.Create(ctx, o.DeepCopyObject().(client.Object)); err != nil {
				return err
			}
		}
		return c.Create(ctx, o, opts...)
	}}, running())
	if got, err := k.take(t.Context(), asked(0)); err != nil || got.Name != "c" {
		t.Errorf("%+v, %v", got, err)
	}
	var all checkpointv1alpha1.PodCheckpointList
	if err := c.List(t.Context(), &all); err != nil || len(all.Items) != 1 {
		t.Errorf("%d checkpoints, %v", len(all.Items), err)
	}
}

func TestWhatCannotBeCheckpointedIsSaidAtOnce(t *testing.T) {
	unscheduled := running()
	unscheduled.Spec.NodeName = ""
	replaced := asked(0)
	old := types.UID("pod-0")
	replaced.spec.SourcePodUID = &old
	for name, tc := range map[string]struct {
		pod  *corev1.Pod
		w    wanted
		want func(error) bool
	}{
		"no Pod":      {&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "other"}}, asked(0), apierrors.IsNotFound},
		"unscheduled": {unscheduled, asked(0), apierrors.IsConflict},
		"replaced":    {running(), replaced, apierrors.IsConflict},
	} {
		t.Run(name, func(t *testing.T) {
			k, c := takerOf(t, interceptor.Funcs{}, tc.pod)
			if _, err := k.take(t.Context(), tc.w); !tc.want(err) {
				t.Errorf("%v", err)
			}
			var all checkpointv1alpha1.PodCheckpointList
			if err := c.List(t.Context(), &all); err != nil || len(all.Items) != 0 {
				t.Errorf("%d checkpoints, %v", len(all.Items), err)
			}
		})
	}
}
