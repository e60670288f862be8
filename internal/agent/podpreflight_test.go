package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine"
)

// fakeExaminer has looked at the Pod.
type fakeExaminer struct {
	asked *runtimeapi.CheckpointPodRequest
	found criservice.Examined
	err   error
}

func (f *fakeExaminer) Examine(_ context.Context, in *runtimeapi.CheckpointPodRequest) (criservice.Examined, error) {
	f.asked = in
	return f.found, f.err
}

func (f *fakeExaminer) Look(context.Context, string, []string) (engine.Examination, error) {
	return f.found.Examination, f.err
}

func TestWhatACheckpointWouldMeetIsToldAndNothingIsTaken(t *testing.T) {
	s := newServed(t)
	pod := makePod(withHooks(stopA, goOnA), func(pod *corev1.Pod) {
		pod.Spec.Containers[0].LivenessProbe = &corev1.Probe{PeriodSeconds: 10, TimeoutSeconds: 1, FailureThreshold: 3}
	})
	if err := s.client.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	x := &fakeExaminer{found: criservice.Examined{
		Examination: engine.Examination{Problems: []string{"container a, process 7 (x): it uses io_uring", "container b, process 8 (y): it is stopped"},
			Outside: []engine.Connection{{Container: "a", Remote: "10.0.0.9:5432"}}},
		Estimate: engine.Estimate{Bytes: 10 << 20, Freeze: 350 * time.Millisecond, Capture: &checkpoint.Capture{Mode: "plain", Reason: "small"}},
		Engine:   "e",
		Options:  []engine.Option{{Name: "freezeBudget", Form: "a duration such as 800ms", Default: "a", Help: "b"}, {Name: "how", Values: []string{"this", "that"}, Default: "c", Help: "d"}},
	}}
	s.server.pods = &podPreflight{nodeName: testNode, live: s.client, runtime: s.runtime, examiner: x, root: "/checkpoints"}
	ask := func(pcp *v1alpha1.PodCheckpoint) api.CheckpointPreflight {
		t.Helper()
		body, err := json.Marshal(pcp)
		if err != nil {
			t.Fatal(err)
		}
		answer, text := s.do(http.MethodPost, agentapi.PreflightPath, string(body))
		var found api.CheckpointPreflight
		if err := json.Unmarshal(text, &found); err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s: %v", answer.Status, text, err)
		}
		return found
	}
	found := ask(makePCP())
	if !slices.Equal(found.Problems, x.found.Problems) || len(found.Warnings) != 1 || !strings.Contains(found.Warnings[0], "10.0.0.9:5432") {
		t.Errorf("found %+v", found)
	}
	if found.EstimatedSize.LogicalBytes != 10<<20 || found.EstimatedFreezeDuration.Duration != 350*time.Millisecond ||
		found.FreezeBudget.Duration != 18900*time.Millisecond || !strings.Contains(found.FreezeBudgetReason, "liveness probe of container a") {
		t.Errorf("it would cost %+v", found)
	}
	if want := []api.EngineOption{{Name: "freezeBudget", Values: "a duration such as 800ms", Default: "a", Description: "b"}, {Name: "how", Values: "this|that", Default: "c", Description: "d"}}; found.Engine != "e" || !slices.Equal(found.Options, want) {
		t.Errorf("the engine %q has the options %+v", found.Engine, found.Options)
	}
	if found.Capture == nil || found.Capture.Mode != "plain" || found.Capture.Reason != "small" {
		t.Errorf("it would be captured %+v", found.Capture)
	}
	if want := []string{`before: "app stop" in container a`, `after: "app go-on" in container a`}; !slices.Equal(found.Hooks, want) {
		t.Errorf("the hooks are %q", found.Hooks)
	}
	if x.asked.PodSandboxId != "sandbox" || !slices.Equal(x.asked.ContainerIds, []string{"id-proxy", "id-a", "id-b"}) || x.asked.OutputPath != "/checkpoints" {
		t.Errorf("looked at %+v", x.asked)
	}
	// A budget that the user gives counts where it is the smaller one, and no probe is why.
	found = ask(makePCP(func(pcp *v1alpha1.PodCheckpoint) {
		pcp.Spec.Options = map[string]string{engine.OptionFreezeBudget: "2s"}
	}))
	if found.FreezeBudget.Duration != 2*time.Second || found.FreezeBudgetReason != "" {
		t.Errorf("a budget of the user's: %+v", found)
	}
	// What the agent refuses, it says without looking at processes.
	x.asked = nil
	found = ask(makePCP(func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.Containers = []string{"absent"} }))
	if x.asked != nil || len(found.Problems) != 1 || !strings.Contains(found.Problems[0], "no container absent") {
		t.Errorf("a container that is not there: %+v", found)
	}
	if s.hooks.log() != "" || s.cri.calls() != 0 {
		t.Errorf("something was done to the Pod: %s", s.hooks.log())
	}
	x.err = errors.New("the runtime is away")
	if answer, text := s.do(http.MethodPost, agentapi.PreflightPath, `{"metadata":{"namespace":"ns"},"spec":{"sourcePodName":"app"}}`); answer.StatusCode != http.StatusInternalServerError || !strings.Contains(string(text), "away") {
		t.Errorf("when the Pod cannot be looked at: %s: %s", answer.Status, text)
	}
	for _, body := range []string{"", "[]", strings.Repeat(" ", agentapi.MaxPreflight) + "{}"} {
		if answer, text := s.do(http.MethodPost, agentapi.PreflightPath, body); answer.StatusCode != http.StatusBadRequest {
			t.Errorf("%.10q: %s: %s", body, answer.Status, text)
		}
	}
}

func TestWhatWillNotComeBackIsWarnedOf(t *testing.T) {
	const api = "10.96.0.1:443"
	token := corev1.Volume{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}}}}}
	withToken := func(pod *corev1.Pod) {
		pod.Spec.Volumes = []corev1.Volume{token}
		pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "token"}}
	}
	out := func(remotes ...string) (x engine.Examination) {
		for _, r := range remotes {
			x.Outside = append(x.Outside, engine.Connection{Container: "a", Remote: r})
		}
		return x
	}
	for name, c := range map[string]struct {
		change func(*corev1.Pod)
		found  engine.Examination
		want   []string
	}{
		"nothing":                  {func(*corev1.Pod) {}, out(), nil},
		"a token that nobody uses": {withToken, out(), nil},
		"a connection":             {withToken, out("192.0.2.1:5432"), []string{"container a has 1 TCP connection to outside the Pod (192.0.2.1:5432): in a restored Pod it is closed, here it goes on"}},
		"many":                     {func(*corev1.Pod) {}, out("192.0.2.4:1", "192.0.2.3:1", "192.0.2.2:1", "192.0.2.1:1", "192.0.2.1:1"), []string{"5 TCP connections to outside the Pod (192.0.2.1:1, 192.0.2.2:1, 192.0.2.3:1, …)"}},
		"a token in use":           {withToken, out(api), []string{"1 TCP connection", "calls the Kubernetes API by a token of its service account"}},
		"the API without a token":  {func(*corev1.Pod) {}, out(api), []string{"1 TCP connection"}},
		"a GPU": {func(pod *corev1.Pod) {
			pod.Spec.Containers[1].Resources.Limits = corev1.ResourceList{"nvidia.com/gpu": resource.MustParse("1"), "cpu": resource.MustParse("1"), "example.kubernetes.io/x": resource.MustParse("1")}
		}, out(), []string{"container b uses nvidia.com/gpu: what is in a device"}},
		"a hook that nothing answers":     {func(pod *corev1.Pod) { pod.Annotations = map[string]string{v1alpha1.AnnotationPreCheckpoint: stopA} }, out(), []string{"no post-checkpoint hook"}},
		"a hook that another one answers": {withHooks(stopA, goOnA), out(), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := warningsOf(makePod(c.change), []string{"proxy", "a", "b"}, c.found, api)
			if len(got) != len(c.want) {
				t.Fatalf("warned of %q, want %q", got, c.want)
			}
			for i, want := range c.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("warned of %q, want %q", got[i], want)
				}
			}
		})
	}
	if got := warningsOf(makePod(), []string{"b"}, out("192.0.2.1:1"), api); len(got) != 0 {
		t.Errorf("of a container that is not captured: %q", got)
	}
}

func TestACheckpointKeepsItsWarnings(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.ops.look = (&fakeExaminer{found: criservice.Examined{Examination: engine.Examination{Outside: []engine.Connection{{Container: "a", Remote: "192.0.2.1:1"}}}}}).Look
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	if len(pcp.Status.Warnings) != 1 || !strings.Contains(pcp.Status.Warnings[0], "192.0.2.1:1") {
		t.Errorf("the warnings are %q", pcp.Status.Warnings)
	}
	if events := strings.Join(h.events(), "\n"); !strings.Contains(events, "CheckpointWarning Container a has 1 TCP connection") {
		t.Errorf("the events are\n%s", events)
	}
}

func TestAPodThatCannotBeLookedAtIsCheckpointedWithoutWarnings(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.ops.look = (&fakeExaminer{err: errors.New("gone")}).Look
	h.run("cp")
	if pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, ""); len(pcp.Status.Warnings) != 0 {
		t.Errorf("the warnings are %q", pcp.Status.Warnings)
	}
}
