package agent

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"podstasis.dev/stasis/api/v1alpha1"
)

func TestARestoreThatKeepsFailingIsGivenUpAndOneThatWaitsIsNot(t *testing.T) {
	failed := func(o *observer) {
		o.Failed(t.Context(), restoringSandbox(), "a", deny(v1alpha1.EventRestoreFailed, "criu: no such pid"))
	}
	refused := func(reason string) func(*observer) {
		return func(o *observer) { o.Refused(t.Context(), restoringSandbox(), deny(reason, "why")) }
	}
	succeeded := func(o *observer) { o.Succeeded(t.Context(), restoringSandbox(), nil) }
	times := func(n int, what func(*observer)) (all []func(*observer)) {
		for range n {
			all = append(all, what)
		}
		return all
	}
	for _, tc := range []struct {
		name  string
		every time.Duration
		after time.Duration
		what  []func(*observer)
		ended bool
	}{
		{"fails for long", 4 * time.Minute, 10 * time.Minute, times(5, failed), true},
		{"fails often and not for long", time.Minute, 10 * time.Minute, times(10, failed), false},
		{"fails for long and not often", 8 * time.Minute, 10 * time.Minute, times(4, failed), false},
		{"is another Pod for long", 4 * time.Minute, 10 * time.Minute, times(5, refused(v1alpha1.EventPodSpecMismatch)), true},
		{"has damaged data for long", 4 * time.Minute, 10 * time.Minute, times(5, refused(v1alpha1.EventCheckpointDataCorrupt)), true},
		{"waits for its checkpoint", 4 * time.Minute, 10 * time.Minute, times(50, refused(v1alpha1.EventCheckpointNotReady)), false},
		{"waits for its data", 4 * time.Minute, 10 * time.Minute, times(50, refused(v1alpha1.EventCheckpointDataMissing)), false},
		{"could not be looked up", 4 * time.Minute, 10 * time.Minute, times(50, refused(v1alpha1.EventRestoreFailed)), false},
		{"succeeds in between", 4 * time.Minute, 10 * time.Minute, append(append(times(4, failed), succeeded), times(4, failed)...), false},
		{"has failed long ago", time.Hour, 10 * time.Minute, times(20, failed), false},
		{"may fail for ever", 4 * time.Minute, 0, times(50, failed), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHarness(t, restoringPod())
			now := time.Now()
			recorder := events.NewFakeRecorder(1000)
			o := &observer{store: h.store, metrics: NewMetrics(prometheus.NewRegistry()), log: slog.New(slog.DiscardHandler),
				giveUpAfter: tc.after, now: func() time.Time { return now }}
			var last string
			patched := interceptor.NewClient(h.client, interceptor.Funcs{SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
				data, err := p.Data(obj)
				if err != nil {
					return err
				}
				last = string(data)
				return c.SubResource(sub).Patch(ctx, obj, p, opts...)
			}})
			o.connect(recorder, &marker{client: patched, log: o.log, now: o.now}, nil, nil)
			for _, what := range tc.what {
				what(o)
				now = now.Add(tc.every)
			}
			var pod corev1.Pod
			if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "again"}, &pod); err != nil {
				t.Fatal(err)
			}
			if ended := pod.Status.Phase == corev1.PodFailed; ended != tc.ended {
				t.Errorf("phase %q", pod.Status.Phase)
			}
			// Without it the kubelet would put its own status back.
			if tc.ended && !strings.Contains(last, `"annotations":{"`+v1alpha1.AnnotationGivenUp+`":`) {
				t.Errorf("the Pod was patched by %s", last)
			}
			if tc.ended && (pod.Status.Reason != "RestoreFailed" || !strings.Contains(pod.Status.Message, "Given up after 5 tries in 16m0s; the last: ")) {
				t.Errorf("%s: %s", pod.Status.Reason, pod.Status.Message)
			}
			told := 0
			for len(recorder.Events) > 0 {
				if strings.Contains(<-recorder.Events, v1alpha1.EventRestoreGivenUp) {
					told++
				}
			}
			if (told == 1) != tc.ended {
				t.Errorf("told %d times", told)
			}
		})
	}
}

func TestAPodWhoseContainersAreNotStartedAgainIsGivenUpAtOnce(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	for _, tc := range []struct {
		name      string
		container string
		change    func(*corev1.Pod)
		ended     bool
	}{
		{"Never", "a", func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }, true},
		{"OnFailure", "a", func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }, false},
		{"Never, and a rule of its own", "a", func(p *corev1.Pod) {
			p.Spec.RestartPolicy, p.Spec.Containers[0].RestartPolicy = corev1.RestartPolicyNever, &always
		}, false},
		{"Never, a sidecar", "sidecar", func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.InitContainers = []corev1.Container{{Name: "sidecar", RestartPolicy: &always}}
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHarness(t, restoringPod(func(p *corev1.Pod) { p.Spec.Containers[0].Name = "a" }, tc.change))
			o := &observer{store: h.store, metrics: NewMetrics(prometheus.NewRegistry()), log: slog.New(slog.DiscardHandler), giveUpAfter: time.Hour, now: time.Now}
			o.connect(events.NewFakeRecorder(100), &marker{client: h.client, log: o.log, now: o.now}, nil, nil)
			o.Failed(t.Context(), restoringSandbox(), tc.container, deny(v1alpha1.EventRestoreFailed, "criu: no such pid"))
			var pod corev1.Pod
			if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "again"}, &pod); err != nil {
				t.Fatal(err)
			}
			if ended := pod.Status.Phase == corev1.PodFailed; ended != tc.ended {
				t.Errorf("phase %q: %s", pod.Status.Phase, pod.Status.Message)
			}
		})
	}
}
