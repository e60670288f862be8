package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	eventsv1 "k8s.io/api/events/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hostns"
)

// What an agent is asked for again until it has told everybody.
func TestTheSuccessOfARestoreIsToldOnceThoughTheAgentOrTheAPIServerWasAway(t *testing.T) {
	h := newHarness(t, restoringPod())
	m := NewMetrics(prometheus.NewRegistry())
	newObserver := func() *observer {
		return &observer{store: h.store, metrics: m, log: slog.New(slog.DiscardHandler), now: time.Now}
	}
	o := newObserver()
	if err := o.Succeeded(t.Context(), restoringSandbox(), nil); !errors.Is(err, errUnconnected) {
		t.Errorf("before the API server was reached: %v", err)
	}
	o.connect(h.recorder, h.ops.marker, nil, nil)
	away := errors.New("the API server is away")
	h.intercept.SubResourcePatch = func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
		return away
	}
	if err := o.Succeeded(t.Context(), restoringSandbox(), nil); !errors.Is(err, away) {
		t.Errorf("while the API server is away: %v", err)
	}
	if n := testutil.ToFloat64(m.restores.WithLabelValues(resultSuccess)); n != 0 {
		t.Errorf("%v successes counted before anybody was told", n)
	}
	h.intercept.SubResourcePatch = nil
	o = newObserver() // the next agent
	o.connect(h.recorder, h.ops.marker, nil, nil)
	if err := o.Succeeded(t.Context(), restoringSandbox(), nil); err != nil {
		t.Fatal(err)
	}
	var list eventsv1.EventList
	if err := h.client.List(t.Context(), &list, client.InNamespace("ns")); err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 {
		t.Fatalf("there are %d events: %+v", len(list.Items), list.Items)
	}
	if e := list.Items[0]; e.Reason != v1alpha1.EventRestoreSucceeded || e.Regarding.UID != restoredUID || e.Note != "Restored from PodCheckpoint cp" ||
		e.Action == "" || e.ReportingInstance == "" || e.EventTime.IsZero() {
		t.Errorf("the event is %+v", e)
	}
	if n := testutil.ToFloat64(m.restores.WithLabelValues(resultSuccess)); n != 1 {
		t.Errorf("%v successes counted", n)
	}
}

type sandboxList struct {
	items []*runtimeapi.PodSandbox
	err   error
}

func (l sandboxList) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest, ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: l.items}, l.err
}

func (l sandboxList) ContainerStatus(_ context.Context, in *runtimeapi.ContainerStatusRequest, _ ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error) {
	s, ok := map[string]*runtimeapi.ContainerStatus{
		"runs":    {State: runtimeapi.ContainerState_CONTAINER_RUNNING, StartedAt: 1},
		"ran":     {State: runtimeapi.ContainerState_CONTAINER_EXITED, StartedAt: 1, ExitCode: 128},
		"did not": {State: runtimeapi.ContainerState_CONTAINER_EXITED, ExitCode: 128, Reason: "StartError"},
		"yet to":  {State: runtimeapi.ContainerState_CONTAINER_CREATED},
	}[in.ContainerId]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &runtimeapi.ContainerStatusResponse{Status: s}, l.err
}

func TestAStartFailedWhereTheContainerEndedWithoutHavingBeenStarted(t *testing.T) {
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	root := t.TempDir()
	n := &restoresNode{runtime: sandboxList{}, host: host}
	for id, want := range map[string]bool{"runs": false, "ran": false, "did not": true, "forgotten": false, "yet to": true} {
		if got, err := n.StartFailed(t.Context(), root, id); err != nil || got != want {
			t.Errorf("%s: %t, %v", id, got, err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "yet to"), 0o700); err != nil {
		t.Fatal(err)
	}
	for id, n := range map[string]*restoresNode{"yet to": n, "runs": {runtime: sandboxList{err: errors.New("connection refused")}, host: host}} {
		if _, err := n.StartFailed(t.Context(), root, id); err == nil {
			t.Errorf("%s: nobody can know", id)
		}
	}
}

func TestOnlySandboxesThatAreReadyAreUpAndARuntimeThatIsAwayKnowsOfNone(t *testing.T) {
	up, err := (&restoresNode{runtime: sandboxList{items: []*runtimeapi.PodSandbox{
		{Id: "up", State: runtimeapi.PodSandboxState_SANDBOX_READY}, {Id: "ended", State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY},
	}}}).SandboxesUp(t.Context())
	if err != nil || len(up) != 1 || !up["up"] {
		t.Errorf("up are %v, %v", up, err)
	}
	up, err = (&restoresNode{runtime: sandboxList{}}).SandboxesUp(t.Context())
	if err != nil || up == nil {
		t.Errorf("of no sandboxes: %v, %v", up, err)
	}
	up, err = (&restoresNode{runtime: sandboxList{err: errors.New("connection refused")}}).SandboxesUp(t.Context())
	if up != nil || err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("of a runtime that is away: %v, %v", up, err)
	}
}
