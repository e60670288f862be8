package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
	"podstasis.dev/stasis/internal/nodeapi"
)

// fakeHooks is a container runtime whose containers take commands.
type fakeHooks struct {
	mu sync.Mutex
	// ran are "CONTAINER: COMMAND" and "stop CONTAINER".
	ran []string
	// exec answers a command; nil: all succeed.
	exec   func(ctx context.Context, in *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	states map[string]runtimeapi.ContainerState // others are running
}

func (f *fakeHooks) ExecSync(ctx context.Context, in *runtimeapi.ExecSyncRequest, _ ...grpc.CallOption) (*runtimeapi.ExecSyncResponse, error) {
	f.mu.Lock()
	f.ran = append(f.ran, in.ContainerId+": "+strings.Join(in.Cmd, " "))
	answer := f.exec
	f.mu.Unlock()
	if answer == nil {
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	return answer(ctx, in)
}

func (f *fakeHooks) ContainerStatus(_ context.Context, in *runtimeapi.ContainerStatusRequest, _ ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, known := f.states[in.ContainerId]
	if !known {
		state = runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	if state == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	if state == runtimeapi.ContainerState_CONTAINER_CREATED {
		f.states[in.ContainerId] = runtimeapi.ContainerState_CONTAINER_RUNNING // by the next look
	}
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: in.ContainerId, State: state}, Info: map[string]string{"info": `{"pid":42}`}}, nil
}

func (f *fakeHooks) PodSandboxStatus(context.Context, *runtimeapi.PodSandboxStatusRequest, ...grpc.CallOption) (*runtimeapi.PodSandboxStatusResponse, error) {
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Network: &runtimeapi.PodSandboxNetworkStatus{
		Ip: "10.0.0.7", AdditionalIps: []*runtimeapi.PodIP{{Ip: "fd00::7"}},
	}}}, nil
}

func (f *fakeHooks) StopContainer(_ context.Context, in *runtimeapi.StopContainerRequest, _ ...grpc.CallOption) (*runtimeapi.StopContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ran = append(f.ran, fmt.Sprintf("stop %s within %d s", in.ContainerId, in.Timeout))
	return &runtimeapi.StopContainerResponse{}, nil
}

func (f *fakeHooks) request(_ context.Context, pid int, ips []string, get *hooks.HTTPGet) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ran = append(f.ran, fmt.Sprintf("%d %v: GET %d%s", pid, ips, get.Port, get.Path))
	return nil
}

func (f *fakeHooks) log() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.ran, "\n")
}

func withHooks(pre, post string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.Annotations = map[string]string{v1alpha1.AnnotationPreCheckpoint: pre, v1alpha1.AnnotationPostCheckpoint: post}
	}
}

const (
	stopA = `{"container":"a","exec":{"command":["app","stop"]},"timeoutSeconds":3}`
	goOnA = `{"container":"a","exec":{"command":["app","go-on"]}}`
)

func TestHooksAreRunAroundACheckpoint(t *testing.T) {
	h := newHarness(t, makePod(withHooks(
		`[{"container":"b","httpGet":{"port":80,"path":"/stop"}},`+stopA+`]`, goOnA)), makePCP())
	h.cri.before = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
		h.hooks.mu.Lock()
		defer h.hooks.mu.Unlock()
		h.hooks.ran = append(h.hooks.ran, "checkpoint")
		return nil
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	want := "42 [10.0.0.7 fd00::7]: GET 80/stop\nid-a: app stop\ncheckpoint\nid-a: app go-on"
	if got := h.hooks.log(); got != want {
		t.Errorf("ran\n%s\nwant\n%s", got, want)
	}
	events := strings.Join(h.events(), "\n")
	for _, want := range []string{"PreCheckpointHookSucceeded Ran 2 pre-checkpoint hooks", "PostCheckpointHookSucceeded Ran 1 post-checkpoint hooks after PodCheckpoint cp"} {
		if !strings.Contains(events, want) {
			t.Errorf("no event says %q:\n%s", want, events)
		}
	}
	if left, err := h.store.dueHooks(v1alpha1.AnnotationPostCheckpoint); len(left) > 0 || err != nil {
		t.Errorf("still on record: %v, %v", left, err)
	}
}

func TestAPreCheckpointHookThatFailsEndsTheCheckpointWithItsOutputAndTheApplicationGoesOn(t *testing.T) {
	h := newHarness(t, makePod(withHooks(stopA, goOnA)), makePCP())
	h.hooks.exec = func(_ context.Context, in *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		if in.Cmd[1] == "stop" {
			return &runtimeapi.ExecSyncResponse{ExitCode: 3, Stderr: []byte("disk \x1b[31mfull\n" + strings.Repeat("x", 100) + "\nlast words\n"), Stdout: []byte(strings.Repeat("y", 100))}, nil
		}
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, `The pre-checkpoint hook "app stop" in container a failed: it ended with 3: disk  [31mfull xxx`)
	if message := readyCondition(pcp).Message; !strings.HasSuffix(message, "; nothing was frozen") || len(message) > 1024 {
		t.Errorf("the message is %q", message)
	}
	if n := h.cri.calls(); n != 0 {
		t.Errorf("the Pod was checkpointed %d times", n)
	}
	if got := h.hooks.log(); got != "id-a: app stop\nid-a: app go-on" {
		t.Errorf("ran\n%s", got)
	}
	h.expectFiles()
}

func TestAPreCheckpointHookWhoseFailureIsIgnoredIsToldOfAndNoMore(t *testing.T) {
	h := newHarness(t, makePod(withHooks(`{"container":"a","exec":{"command":["app","stop"]},"failurePolicy":"Ignore"}`, goOnA)), makePCP())
	h.hooks.exec = func(_ context.Context, in *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		if in.Cmd[1] == "stop" {
			return nil, status.Error(codes.DeadlineExceeded, "timeout 10s exceeded")
		}
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	if events := strings.Join(h.events(), "\n"); !strings.Contains(events, "it did not end within 10s and was killed") {
		t.Errorf("no event says why the hook failed:\n%s", events)
	}
}

// X7: a quiesced application goes on, also where the agent dies in between.
func TestThePostCheckpointHookIsRunByTheNextAgentWhereThisOneDied(t *testing.T) {
	h := newHarness(t, makePod(withHooks(stopA, goOnA)), makePCP())
	died := make(chan struct{})
	h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		close(died)
		select {} // with the process
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go h.ops.Start(ctx)
	h.reconcile(ctx, "cp")
	<-died
	if got := h.hooks.log(); got != "id-a: app stop" {
		t.Fatalf("ran\n%s", got)
	}
	h.start() // the next agent
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "interrupted")
	if got := h.hooks.log(); got != "id-a: app stop\nid-a: app go-on" {
		t.Errorf("ran\n%s", got)
	}
	h.start()
	h.run()
	if got := h.hooks.log(); strings.Count(got, "go-on") != 1 {
		t.Errorf("ran again:\n%s", got)
	}
}

func TestAPostCheckpointHookIsTriedAgainAndItsFailureLeavesTheCheckpointAsItIs(t *testing.T) {
	h := newHarness(t, makePod(withHooks(stopA, goOnA)), makePCP())
	h.hooks.exec = func(_ context.Context, in *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		if in.Cmd[1] == "go-on" {
			return &runtimeapi.ExecSyncResponse{ExitCode: 1, Stdout: []byte("no")}, nil
		}
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	if got := h.hooks.log(); strings.Count(got, "go-on") != resumeTries {
		t.Errorf("ran\n%s", got)
	}
	if events := strings.Join(h.events(), "\n"); !strings.Contains(events, "PostCheckpointHookFailed After PodCheckpoint cp the post-checkpoint hook \"app go-on\" in container a failed 3 times") {
		t.Errorf("the events are\n%s", events)
	}
}

func TestHooksOfContainersThatAreNotCapturedAreNotRun(t *testing.T) {
	h := newHarness(t, makePod(withHooks(stopA, goOnA)), makePCP(func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.Containers = []string{"b"} }))
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	if got := h.hooks.log(); got != "" {
		t.Errorf("ran\n%s", got)
	}
}

func TestAPodWithAHookThatCannotBeRunIsNotCheckpointed(t *testing.T) {
	h := newHarness(t, makePod(withHooks(`{"container":"setup","exec":{"command":["x"]}}`, goOnA)), makePCP())
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, `asks for hooks that cannot be run: annotation checkpoint.podstasis.dev/pre-checkpoint: hook 1: the Pod has no container "setup"`)
	if h.cri.calls() != 0 || h.hooks.log() != "" {
		t.Errorf("something was run: %s", h.hooks.log())
	}
}

// restoredWith has a sandbox told of as restored to the agent's restoreHooks.
func restoredWith(t *testing.T, h *harness, annotation string, containers map[string]string) (*restoreHooks, nodeapi.Sandbox) {
	t.Helper()
	sandbox := restoringSandbox()
	sandbox.Annotations[v1alpha1.AnnotationPostRestore] = annotation
	r := &restoreHooks{store: h.store, runner: h.ops.hooks, live: h.client, recorder: h.recorder, log: slog.New(slog.DiscardHandler), queue: make(chan *dueHooks, 1)}
	o := &observer{store: h.store, metrics: h.ops.metrics, log: slog.New(slog.DiscardHandler), now: time.Now}
	o.connect(h.recorder, h.ops.marker, r, nil)
	if err := o.Succeeded(t.Context(), sandbox, containers); err != nil {
		t.Fatal(err)
	}
	return r, sandbox
}

// work runs what is due until it has been.
func work(t *testing.T, r *restoreHooks) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Start(ctx) }()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		due, err := r.store.dueHooks(v1alpha1.AnnotationPostRestore)
		if err != nil {
			t.Fatal(err)
		}
		if len(due) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still due: %+v", due)
		}
	}
	stop()
	<-done
}

func TestAPostRestoreHookIsRunOnceThoughTheSuccessIsToldAgain(t *testing.T) {
	h := newHarness(t, restoringPod())
	h.hooks.states = map[string]runtimeapi.ContainerState{"new-a": runtimeapi.ContainerState_CONTAINER_CREATED}
	r, sandbox := restoredWith(t, h, `{"container":"a","exec":{"command":["app","register"]}}`, map[string]string{"a": "new-a"})
	work(t, r)
	if err := r.restored(sandbox, map[string]string{"a": "new-a"}); err != nil { // by the next agent
		t.Fatal(err)
	}
	work(t, r)
	if got := h.hooks.log(); got != "new-a: app register" {
		t.Errorf("ran\n%s", got)
	}
	if events := strings.Join(h.events(), "\n"); !strings.Contains(events, "PostRestoreHookSucceeded Ran 1 post-restore hooks") {
		t.Errorf("the events are\n%s", events)
	}
	if err := errors.Join(h.store.markRestored(types.NamespacedName{Namespace: "ns", Name: "x"}, restoredUID), h.store.forgetRestored(restoredUID)); err != nil {
		t.Fatal(err)
	}
	if due, err := h.store.readDueHooks(v1alpha1.AnnotationPostRestore, restoredUID); due != nil || err != nil {
		t.Errorf("of a Pod that is gone: %+v, %v", due, err)
	}
}

func TestPostRestoreHooksThatAnAgentLeftAreRunByTheNext(t *testing.T) {
	h := newHarness(t, restoringPod())
	r, _ := restoredWith(t, h, `{"container":"a","exec":{"command":["app","register"]}}`, map[string]string{"a": "new-a"})
	<-r.queue // it died
	h.start()
	r.store = h.store
	work(t, r)
	if got := h.hooks.log(); got != "new-a: app register" {
		t.Errorf("ran\n%s", got)
	}
}

func TestAPostRestoreHookThatFailsStopsItsContainerAndEndsTheRow(t *testing.T) {
	h := newHarness(t, restoringPod(func(pod *corev1.Pod) { grace := int64(7); pod.Spec.TerminationGracePeriodSeconds = &grace }))
	h.hooks.exec = func(_ context.Context, in *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		return &runtimeapi.ExecSyncResponse{ExitCode: 1, Stderr: []byte("no token")}, nil
	}
	r, _ := restoredWith(t, h, `[{"container":"a","exec":{"command":["one"]},"failurePolicy":"Ignore"},
		{"container":"a","exec":{"command":["two"]}},{"container":"b","exec":{"command":["three"]}}]`, map[string]string{"a": "new-a", "b": "new-b"})
	work(t, r)
	if got := h.hooks.log(); got != "new-a: one\nnew-a: two\nstop new-a within 7 s" {
		t.Errorf("ran\n%s", got)
	}
	events := strings.Join(h.events(), "\n")
	for _, want := range []string{`The post-restore hook "one" in container a failed: it ended with 1: no token`, `The post-restore hook "two" in container a failed: it ended with 1: no token; its container was stopped`} {
		if !strings.Contains(events, want) {
			t.Errorf("no event says %q:\n%s", want, events)
		}
	}
}

func TestAContainerThatStartedAnewIsNotTakenForTheRestoredOne(t *testing.T) {
	h := newHarness(t, restoringPod())
	h.hooks.states = map[string]runtimeapi.ContainerState{"new-a": runtimeapi.ContainerState_CONTAINER_EXITED}
	r, _ := restoredWith(t, h, `{"container":"a","exec":{"command":["one"]},"failurePolicy":"Ignore"}`, map[string]string{"a": "new-a"})
	work(t, r)
	if got := h.hooks.log(); got != "" {
		t.Errorf("ran\n%s", got)
	}
	if events := strings.Join(h.events(), "\n"); !strings.Contains(events, "its container is not running") {
		t.Errorf("the events are\n%s", events)
	}
}

// X7: a server of the Pod is asked inside the Pod's network, and nothing else ever.
func TestAPodsServerIsAskedInsideItsOwnNetwork(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test makes a network namespace: run it as root")
	}
	there := exec.Command("unshare", "--net", "sh", "-c", "ip link set lo up; echo up; read x")
	in, err := there.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := there.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := there.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); there.Wait() }()
	if n, err := out.Read(make([]byte, 3)); n == 0 {
		t.Fatalf("the namespace is not up: %v", err)
	}
	outside := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("somebody outside was asked") }))
	defer outside.Close()
	port := int32(outside.Listener.Addr().(*net.TCPAddr).Port)

	nobody := func() (int, error) { t.Error("the node's network was asked for"); return 0, errors.New("no") }
	err = requestIn(t.Context(), there.Process.Pid, nobody, nil, &hooks.HTTPGet{Port: port, Path: "/"})
	if err == nil || !strings.Contains(err.Error(), "nothing in the Pod listens on port") {
		t.Errorf("a port that is taken outside alone: %v", err)
	}

	var asked []string
	inside := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.RequestURI)
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, outside.URL, http.StatusFound)
		case "/ill":
			http.Error(w, "still \x07busy", http.StatusServiceUnavailable)
		}
	})}
	listener, err := listenIn(there.Process.Pid, port)
	if err != nil {
		t.Fatal(err)
	}
	go inside.Serve(listener)
	defer inside.Close()
	for path, says := range map[string]string{"/stop?now=1": "", "/away": "302", "/ill": "503 Service Unavailable: still  busy"} {
		err := requestIn(t.Context(), there.Process.Pid, nobody, nil, &hooks.HTTPGet{Port: port, Path: path})
		if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
			t.Errorf("%s: %v, want %q", path, err, says)
		}
	}
	if len(asked) != 3 {
		t.Errorf("it was asked %q", asked)
	}
}

// A sandbox that has a network stack of its own leaves nothing in its namespace.
func TestAPodWhoseNetworkIsItsSandboxsOwnIsAskedAtItsAddressFromTheNode(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	// The node's network is this test's; the Pod's address is one of it, and its namespace is empty.
	empty := exec.Command("unshare", "--net", "sh", "-c", "echo up; read x")
	in, err := empty.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := empty.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := empty.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); empty.Wait() }()
	if n, err := out.Read(make([]byte, 3)); n == 0 {
		t.Fatalf("the namespace is not there: %v", err)
	}
	address := ownAddress(t)
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ })}
	go server.Serve(listener)
	port := int32(listener.Addr().(*net.TCPAddr).Port)
	node := func() (int, error) { return os.Getpid(), nil }
	if err := requestIn(t.Context(), empty.Process.Pid, node, []string{address}, &hooks.HTTPGet{Port: port, Path: "/"}); err != nil || asked != 1 {
		t.Errorf("asked %d times, %v", asked, err)
	}
	server.Close()
	err = requestIn(t.Context(), empty.Process.Pid, node, []string{address}, &hooks.HTTPGet{Port: port, Path: "/"})
	if err == nil || !strings.Contains(err.Error(), "of its address") {
		t.Errorf("with nobody there: %v", err)
	}
	// The node's own loopback address is nobody's but the node's.
	outside := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the node was asked") }))
	defer outside.Close()
	port = int32(outside.Listener.Addr().(*net.TCPAddr).Port)
	if err := requestIn(t.Context(), empty.Process.Pid, node, []string{address}, &hooks.HTTPGet{Port: port, Path: "/"}); err == nil {
		t.Error("somebody answered")
	}
}

// ownAddress is one of this machine's that is not loopback.
func ownAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() && ip.IP.To4() != nil {
			return ip.IP.String()
		}
	}
	t.Fatal("this machine has no address")
	return ""
}

// listenIn listens on the loopback address of another network namespace.
func listenIn(pid int, port int32) (net.Listener, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	var listener net.Listener
	err = inNetwork(ns, func() error {
		listener, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	})
	return listener, err
}
