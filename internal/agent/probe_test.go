package agent

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/criservice"
)

func probe(timeout, period, threshold int32) *corev1.Probe {
	return &corev1.Probe{TimeoutSeconds: timeout, PeriodSeconds: period, FailureThreshold: threshold}
}

func TestTheFreezeBudgetIsThatOfTheTightestProbe(t *testing.T) {
	started, starting := true, false
	for name, c := range map[string]struct {
		change func(*corev1.Pod)
		trips  time.Duration // 0: no probe bounds the freeze
		budget time.Duration
		of     string
	}{
		"no probe":            {func(*corev1.Pod) {}, 0, 0, ""},
		"readiness only":      {func(p *corev1.Pod) { p.Spec.Containers[0].ReadinessProbe = probe(1, 1, 1) }, 0, 0, ""},
		"one failure":         {func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = probe(1, 1, 1) }, time.Second, 700 * time.Millisecond, "liveness probe of container a"},
		"Kubernetes' default": {func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = probe(0, 0, 0) }, 21 * time.Second, 18900 * time.Millisecond, "container a"},
		"a timeout longer than the period": {func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = probe(5, 2, 3) },
			15 * time.Second, 13500 * time.Millisecond, "container a"},
		"the tighter of two": {func(p *corev1.Pod) {
			p.Spec.Containers[0].LivenessProbe, p.Spec.Containers[1].LivenessProbe = probe(1, 10, 3), probe(2, 1, 2)
		}, 4 * time.Second, 3600 * time.Millisecond, "container b"},
		"a sidecar's": {func(p *corev1.Pod) { p.Spec.InitContainers[1].LivenessProbe = probe(1, 1, 2) },
			2 * time.Second, 1700 * time.Millisecond, "container proxy"},
		"a startup probe that has succeeded": {func(p *corev1.Pod) {
			p.Spec.Containers[0].StartupProbe, p.Status.ContainerStatuses[0].Started = probe(1, 1, 1), &started
		}, 0, 0, ""},
		"a startup probe that has not": {func(p *corev1.Pod) {
			p.Spec.Containers[0].StartupProbe, p.Status.ContainerStatuses[0].Started = probe(2, 10, 30), &starting
			p.Spec.Containers[0].LivenessProbe = probe(1, 1, 1)
		}, 2 * time.Second, 1700 * time.Millisecond, "startup probe of container a"},
		"of a container that does not run": {func(p *corev1.Pod) {
			p.Spec.Containers[0].LivenessProbe = probe(1, 1, 1)
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{}
		}, 0, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			l := tightest(makePod(c.change))
			if c.trips == 0 {
				if l != nil {
					t.Fatalf("bounded by %s", l)
				}
				return
			}
			if l == nil {
				t.Fatal("nothing bounds it")
			}
			if l.trips != c.trips || l.budget() != c.budget || !strings.Contains(l.String(), c.of) {
				t.Errorf("trips after %v, budget %v: %s", l.trips, l.budget(), l)
			}
		})
	}
}

func TestAUsersFreezeBudgetCountsWhereItIsTheSmallerOne(t *testing.T) {
	limit := tightest(makePod(func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = probe(1, 1, 1) }))
	for given, want := range map[string]string{"": "700ms", "200ms": "200ms", "5s": "700ms", "soon": "soon"} {
		options := map[string]string{"other": "x"}
		if given != "" {
			options["freezeBudget"] = given
		}
		got := withFreezeBudget(options, limit)
		if got["freezeBudget"] != want || got["other"] != "x" {
			t.Errorf("given %q: %v", given, got)
		}
		if options["freezeBudget"] != given {
			t.Errorf("given %q: the object's own options were changed", given)
		}
	}
	if got := withFreezeBudget(nil, nil); got != nil {
		t.Errorf("without a probe: %v", got)
	}
}

func TestACheckpointThatAProbeForbidsSaysWhichAndBothFigures(t *testing.T) {
	h := newHarness(t, makePod(func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = probe(1, 1, 1) }), makePCP())
	h.cri.before = func(_ context.Context, in *runtimeapi.CheckpointPodRequest) error {
		if in.Options["freezeBudget"] != "700ms" {
			t.Errorf("the call's options are %v", in.Options)
		}
		st, err := status.New(codes.FailedPrecondition, "freeze budget: expected to stand still for 3s, its budget is 700ms").
			WithDetails(&errdetails.ErrorInfo{Reason: criservice.ReasonFreezeBudget, Domain: "podstasis.dev"})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	h.run("cp")
	for _, want := range []string{"3s", "700ms", "liveness probe of container a", "failureThreshold 1"} {
		h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, want)
	}
	h.expectFiles()
}
