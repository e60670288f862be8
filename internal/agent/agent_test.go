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
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/podtemplate"
	"podstasis.dev/stasis/internal/restoring"
	checkpointstore "podstasis.dev/stasis/internal/store"
)

const (
	testNode = "node-1"
	podUID   = types.UID("11111111-2222-3333-4444-555555555555")
	pcpUID   = types.UID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
)

// makePod is a running Pod with containers a and b.
func makePod(change ...func(*corev1.Pod)) *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "app", UID: podUID, Labels: map[string]string{"app": "x"}},
		Spec: corev1.PodSpec{
			NodeName: testNode,
			InitContainers: []corev1.Container{
				{Name: "setup", Image: "img:setup"},
				{Name: "proxy", Image: "img:proxy", RestartPolicy: &always},
			},
			Containers: []corev1.Container{{Name: "a", Image: "img:a"}, {Name: "b", Image: "img:b"}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning,
			InitContainerStatuses: []corev1.ContainerStatus{
				{Name: "setup", Image: "img:setup", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 0}}},
				running("proxy"),
			},
			ContainerStatuses: []corev1.ContainerStatus{running("a"), running("b")},
		},
	}
	for _, c := range change {
		c(pod)
	}
	return pod
}

func running(name string) corev1.ContainerStatus {
	return corev1.ContainerStatus{
		Name: name, Image: "img:" + name, ContainerID: "containerd://id-" + name,
		State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
	}
}

// makePCP is a PodCheckpoint of makePod that nobody has acted on.
func makePCP(change ...func(*v1alpha1.PodCheckpoint)) *v1alpha1.PodCheckpoint {
	pcp := &v1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "cp", UID: pcpUID, Generation: 1},
		Spec:       v1alpha1.PodCheckpointSpec{SourcePodName: "app", NodeName: testNode},
	}
	for _, c := range change {
		c(pcp)
	}
	return pcp
}

func withReason(reason string) func(*v1alpha1.PodCheckpoint) {
	return func(pcp *v1alpha1.PodCheckpoint) {
		setReady(&pcp.Status, 1, metav1.Now(), reason, "as the test has it")
		pcp.Finalizers = []string{v1alpha1.FinalizerData}
		pcp.Status.NodeName = testNode
	}
}

// fakeRuntime lists one sandbox with the containers of makePod.
type fakeRuntime struct {
	sandboxes  []*runtimeapi.PodSandbox
	containers []*runtimeapi.Container
	err        error
}

func newFakeRuntime() *fakeRuntime {
	f := &fakeRuntime{sandboxes: []*runtimeapi.PodSandbox{{Id: "sandbox", CreatedAt: 1}}}
	for _, name := range []string{"proxy", "a", "b"} {
		f.containers = append(f.containers, &runtimeapi.Container{
			Id: "id-" + name, PodSandboxId: "sandbox", Metadata: &runtimeapi.ContainerMetadata{Name: name},
		})
	}
	return f
}

func (f *fakeRuntime) ListPodSandbox(_ context.Context, in *runtimeapi.ListPodSandboxRequest, _ ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error) {
	if in.Filter.LabelSelector[labelPodUID] != string(podUID) {
		return &runtimeapi.ListPodSandboxResponse{}, f.err
	}
	return &runtimeapi.ListPodSandboxResponse{Items: f.sandboxes}, f.err
}

func (f *fakeRuntime) ListContainers(context.Context, *runtimeapi.ListContainersRequest, ...grpc.CallOption) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: f.containers}, f.err
}

// fakeCRI writes a checkpoint as the CRI service would.
type fakeCRI struct {
	mu       sync.Mutex
	requests []*runtimeapi.CheckpointPodRequest
	format   []string // that the last one asks for
	// before is called first; its error ends the call.
	before func(ctx context.Context, in *runtimeapi.CheckpointPodRequest) error
	// names are the containers that the manifest lists; by default those asked for.
	names []string
}

func (f *fakeCRI) CheckpointPod(ctx context.Context, in *runtimeapi.CheckpointPodRequest, _ ...grpc.CallOption) (*runtimeapi.CheckpointPodResponse, error) {
	f.mu.Lock()
	f.requests = append(f.requests, in)
	if out, said := metadata.FromOutgoingContext(ctx); said {
		f.format = out.Get("podstasis-format")
	}
	f.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		return nil, status.Error(codes.InvalidArgument, "no deadline")
	}
	if f.before != nil {
		if err := f.before(ctx, in); err != nil {
			return nil, err
		}
	}
	m := &checkpoint.Manifest{
		Engine:         checkpoint.Program{Name: "criu", Version: "4.2"},
		Platform:       checkpoint.Platform{OS: "linux", Architecture: "amd64"},
		FreezeDuration: 120 * time.Millisecond,
		EarlierFreezes: []checkpoint.EarlierFreeze{{Duration: 40 * time.Millisecond, Reason: "an exec began"}, {Duration: 30 * time.Millisecond, Reason: "a process was ending"}},
		Capture:        &checkpoint.Capture{Mode: "plain", Reason: "with 4 MiB\x1bit would not be faster"},
		Phases:         []checkpoint.Phase{{Name: "freeze", Duration: 10 * time.Millisecond}, {Name: "capture", Duration: 110 * time.Millisecond}},
	}
	names := f.names
	if names == nil {
		for _, id := range in.ContainerIds {
			names = append(names, strings.TrimPrefix(id, "id-"))
		}
	}
	for _, name := range names {
		m.Containers = append(m.Containers, checkpoint.Container{Name: name})
	}
	if err := os.WriteFile(filepath.Join(in.OutputPath, "pages"), make([]byte, 4096), 0o600); err != nil {
		return nil, err
	}
	if _, err := checkpoint.Seal(ctx, in.OutputPath, m); err != nil {
		return nil, err
	}
	return &runtimeapi.CheckpointPodResponse{}, nil
}

func (f *fakeCRI) calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests)
}

// harness is an agent without its process: API server, runtime and CRI service
// are fakes, the directory is real.
type harness struct {
	*testing.T
	dir        string
	client     client.WithWatch
	runtime    *fakeRuntime
	cri        *fakeCRI
	recorder   *events.FakeRecorder
	reconciler *reconciler
	ops        *operations
	store      *store
	arrived    chan event.TypedGenericEvent[*v1alpha1.PodCheckpoint]
	inUse      []string
	hooks      *fakeHooks
	opens      openStores // of CheckpointStores; nil: none can be reached
	// intercept changes what the API server does.
	intercept interceptor.Funcs
	wait      func(context.Context, string) (error, error)
}

func newHarness(t *testing.T, objects ...client.Object) *harness {
	t.Helper()
	h := &harness{T: t, dir: filepath.Join(t.TempDir(), "stasis"), runtime: newFakeRuntime(), cri: &fakeCRI{}, hooks: &fakeHooks{}}
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	h.client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&v1alpha1.PodCheckpoint{}).
		WithIndex(&v1alpha1.PodCheckpoint{}, fieldNodeName, func(o client.Object) []string {
			return []string{o.(*v1alpha1.PodCheckpoint).Spec.NodeName}
		}).
		WithInterceptorFuncs(interceptor.Funcs{
			Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
				if h.intercept.Get != nil {
					return h.intercept.Get(ctx, c, key, obj, opts...)
				}
				return c.Get(ctx, key, obj, opts...)
			},
			Update: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
				if h.intercept.Update != nil {
					return h.intercept.Update(ctx, c, obj, opts...)
				}
				return c.Update(ctx, obj, opts...)
			},
			SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, obj client.Object, opts ...client.SubResourceUpdateOption) error {
				if h.intercept.SubResourceUpdate != nil {
					return h.intercept.SubResourceUpdate(ctx, c, sub, obj, opts...)
				}
				return c.SubResource(sub).Update(ctx, obj, opts...)
			},
			SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
				if h.intercept.SubResourcePatch != nil {
					return h.intercept.SubResourcePatch(ctx, c, sub, obj, patch, opts...)
				}
				return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
			},
		}).Build()
	h.start()
	return h
}

// start makes the agent's parts anew, as a start of its process does; what is on
// disk and in the API stays.
func (h *harness) start() {
	h.Helper()
	var err error
	if h.store, err = openStore(h.dir); err != nil {
		h.Fatal(err)
	}
	if _, err := h.store.removeLeftovers(); err != nil {
		h.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	metrics := NewMetrics(prometheus.NewRegistry())
	guard := newFlights(2)
	h.recorder = events.NewFakeRecorder(100)
	h.ops = &operations{
		nodeName: testNode, client: h.client, live: h.client, cri: h.cri, store: h.store, flights: guard,
		wait: func(ctx context.Context, path string) (error, error) {
			if h.wait != nil {
				return h.wait(ctx, path)
			}
			return nil, nil
		},
		marker:   &marker{client: h.client, log: log, now: time.Now},
		recorder: h.recorder, metrics: metrics, log: log, now: time.Now, queue: make(chan operation),
		hooks: &hookRunner{runtime: h.hooks, request: h.hooks.request},
	}
	h.ops.storing = newStoring(&storing{
		client: h.client, live: h.client, store: h.store, done: h.ops.tell, first: 10 * time.Millisecond, log: log, now: time.Now,
		open: func(ctx context.Context, of *v1alpha1.CheckpointStore, waiting func(error)) (*checkpointstore.Store, func() error, error) {
			if h.opens == nil {
				return nil, nil, errors.New("it cannot be reached")
			}
			return h.opens(ctx, of, waiting)
		},
	})
	storing := h.ops.storing
	h.Cleanup(func() { // it writes in the directory, which is about to be removed
		storing.end()
		storing.all.Wait()
	})
	h.reconciler = &reconciler{
		nodeName: testNode, client: h.client, live: h.client, runtime: h.runtime, store: h.store, flights: guard,
		ops: h.ops, users: h.usersOf, metrics: metrics, log: log, now: time.Now,
		room: newRoom(DiskLimits{MaxShare: 1}, h.store.checkpointRoot()),
	}
	h.arrived = make(chan event.TypedGenericEvent[*v1alpha1.PodCheckpoint], 8)
	h.reconciler.uploads = newUploads(h.store, h.reconciler.room, h.arrived)
	h.reconciler.imports = &imports{ops: h.ops, room: h.reconciler.room, queue: make(chan importOp), log: log}
}

// usersOf is a Pod that is being restored where the test says that a directory is used.
func (h *harness) usersOf(dir string) (users []restoring.User, err error) {
	if slices.Contains(h.inUse, dir) {
		users = append(users, restoring.User{Sandbox: restoringSandbox()})
	}
	return users, nil
}

func (h *harness) reconcile(ctx context.Context, name string) ctrl.Result {
	h.Helper()
	result, err := h.reconciler.Reconcile(ctx, ctrl.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
	if err != nil {
		h.Fatalf("reconcile %s: %v", name, err)
	}
	return result
}

// run reconciles objects once and lets the operations that this began come to
// their end.
func (h *harness) run(names ...string) {
	h.Helper()
	ctx, stop := context.WithCancel(h.Context())
	done := make(chan error)
	go func() { done <- h.ops.Start(ctx) }()
	for _, name := range names {
		h.reconcile(ctx, name)
	}
	for h.busy() {
		time.Sleep(5 * time.Millisecond)
	}
	stop()
	<-done
}

// condition is the status of a condition of the Pod app; empty if it has none.
func (h *harness) condition(kind string) corev1.ConditionStatus {
	h.Helper()
	var pod corev1.Pod
	if err := h.client.Get(h.Context(), types.NamespacedName{Namespace: "ns", Name: "app"}, &pod); err != nil {
		h.Fatal(err)
	}
	for _, c := range pod.Status.Conditions {
		if string(c.Type) == kind {
			return c.Status
		}
	}
	return ""
}

func (h *harness) busy() bool {
	h.ops.flights.mu.Lock()
	defer h.ops.flights.mu.Unlock()
	return len(h.ops.flights.byObject) > 0
}

func (h *harness) get(name string) *v1alpha1.PodCheckpoint {
	h.Helper()
	var pcp v1alpha1.PodCheckpoint
	if err := h.client.Get(h.Context(), types.NamespacedName{Namespace: "ns", Name: name}, &pcp); err != nil {
		h.Fatalf("get %s: %v", name, err)
	}
	return &pcp
}

// expectReady checks reason and a part of the message of the Ready condition.
func (h *harness) expectReady(name, reason, message string) *v1alpha1.PodCheckpoint {
	h.Helper()
	pcp := h.get(name)
	c := readyCondition(pcp)
	if c == nil {
		h.Fatalf("%s has no Ready condition, want reason %s", name, reason)
	}
	if c.Reason != reason || !strings.Contains(c.Message, message) {
		h.Errorf("%s: reason %s, message %q; want %s and a message with %q", name, c.Reason, c.Message, reason, message)
	}
	return pcp
}

// files lists what is beneath the checkpoint root and the records.
func (h *harness) files() []string {
	h.Helper()
	var names []string
	for _, dir := range []string{checkpointsDir, recordsDir} {
		entries, err := os.ReadDir(filepath.Join(h.dir, dir))
		if err != nil {
			h.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return names
}

func (h *harness) expectFiles(want ...string) {
	h.Helper()
	if got := h.files(); !slices.Equal(got, want) {
		h.Errorf("on disk: %q, want %q", got, want)
	}
}

func (h *harness) events() []string {
	var all []string
	for {
		select {
		case e := <-h.recorder.Events:
			all = append(all, e)
		default:
			return all
		}
	}
}

var dataOfCP = checkpointsDir + "/" + dataName("ns", "cp", pcpUID)

func TestACheckpointEndsReadyAndSaysEverythingAboutItself(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "frozen for 120ms")
	s := pcp.Status
	if s.NodeName != testNode || s.SourcePodUID == nil || *s.SourcePodUID != podUID || s.CompletionTime == nil || s.StartTime == nil {
		t.Errorf("node, Pod or times are missing: %+v", s)
	}
	if got := s.CheckpointLocation.NodeLocal.Path; checkpointsDir+"/"+got != dataOfCP {
		t.Errorf("location %q", got)
	}
	if _, err := checkpoint.Verify(t.Context(), filepath.Join(h.dir, dataOfCP), s.ManifestDigest); err != nil {
		t.Errorf("the digest in the status does not verify the data: %v", err)
	}
	if len(s.CheckpointedContainers) != 2 || len(s.CheckpointedInitContainers) != 2 {
		t.Errorf("containers %v, init containers %v", s.CheckpointedContainers, s.CheckpointedInitContainers)
	}
	if s.CheckpointedPodTemplate == nil || s.CheckpointedPodTemplate.Spec.NodeName != "" || s.CheckpointedPodTemplate.Labels["app"] != "x" {
		t.Errorf("template %+v", s.CheckpointedPodTemplate)
	}
	if len(s.EarlierFreezes) != 2 || s.EarlierFreezes[0].Duration.Duration != 40*time.Millisecond || s.EarlierFreezes[1].Reason != "a process was ending" {
		t.Errorf("freezes for nothing: %+v", s.EarlierFreezes)
	}
	if s.Engine.Name != "criu" || s.Platform != "linux/amd64" || s.Size.LogicalBytes != 4096 || s.FreezeDuration.Duration != 120*time.Millisecond || len(s.Phases) != 2 {
		t.Errorf("figures: %+v %s %+v %v %v", s.Engine, s.Platform, s.Size, s.FreezeDuration, s.Phases)
	}
	if c := s.Capture; c == nil || c.Mode != "plain" || c.Reason != "with 4 MiB it would not be faster" {
		t.Errorf("captured %+v", s.Capture)
	}
	if !slices.Contains(pcp.Finalizers, v1alpha1.FinalizerData) {
		t.Error("the finalizer that keeps the object until its data are gone is missing")
	}
	// C2: what kubelets restore is not of a runtime's own format.
	if !slices.Equal(h.cri.format, []string{"stasis"}) {
		t.Errorf("asked the CRI for the format %q", h.cri.format)
	}
	if ids := h.cri.requests[0].ContainerIds; !slices.Equal(ids, []string{"id-proxy", "id-a", "id-b"}) {
		t.Errorf("asked the CRI for %v", ids)
	}
	h.expectFiles(dataOfCP)
	events := h.events()
	for _, reason := range []string{v1alpha1.EventCheckpointingPod, v1alpha1.EventCheckpointStarted, v1alpha1.EventCheckpointSucceeded} {
		if !slices.ContainsFunc(events, func(e string) bool { return strings.HasPrefix(e, "Normal "+reason+" ") }) {
			t.Errorf("no event %s among %q", reason, events)
		}
	}
}

func TestThePodSaysThatItIsBeingCheckpointedWhileItIs(t *testing.T) {
	for _, outcome := range []error{nil, status.Error(codes.Internal, "criu said no")} {
		h := newHarness(t, makePod(), makePCP())
		var during corev1.ConditionStatus
		h.cri.before = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
			during = h.condition(v1alpha1.PodConditionCheckpointing)
			return outcome
		}
		h.run("cp")
		if during != corev1.ConditionTrue {
			t.Errorf("while it was: %q", during)
		}
		if after := h.condition(v1alpha1.PodConditionCheckpointing); after != "" {
			t.Errorf("after it: %q", after)
		}
	}
}

func TestACrashDoesNotLeaveThePodMarked(t *testing.T) {
	h := newHarness(t, makePod(), makePCP(withReason(v1alpha1.ReasonCheckpointInProgress), func(p *v1alpha1.PodCheckpoint) {
		uid := podUID
		p.Status.SourcePodUID = &uid
	}))
	h.ops.marker.set(t.Context(), podRef{"ns", "app", podUID}, v1alpha1.PodConditionCheckpointing, corev1.ConditionTrue, "x", "y")
	if h.condition(v1alpha1.PodConditionCheckpointing) != corev1.ConditionTrue {
		t.Fatal("the condition is not set")
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "interrupted")
	if after := h.condition(v1alpha1.PodConditionCheckpointing); after != "" {
		t.Errorf("condition %q", after)
	}
}

// A Pod that stays marked is denied resizes and ephemeral containers for good.
func TestAPodIsUnmarkedBeforeItsObjectEndsHoweverOftenThatFails(t *testing.T) {
	for name, begin := range map[string]func(h *harness){
		"taken": func(h *harness) { h.run("cp") },
		"interrupted": func(h *harness) {
			uid := podUID
			pcp := h.get("cp")
			pcp.Status.SourcePodUID = &uid
			setReady(&pcp.Status, 1, metav1.Now(), v1alpha1.ReasonCheckpointInProgress, "")
			if err := h.client.Status().Update(t.Context(), pcp); err != nil {
				t.Fatal(err)
			}
			h.ops.marker.set(t.Context(), podRef{"ns", "app", podUID}, v1alpha1.PodConditionCheckpointing, corev1.ConditionTrue, "x", "y")
			for range 3 {
				_, _ = h.reconciler.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "cp"}})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, makePod(), makePCP())
			failures := 2
			h.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
				data, err := patch.Data(obj)
				if err == nil && strings.Contains(string(data), "$patch") && failures > 0 {
					failures--
					if terminal(h.get("cp")) {
						t.Error("the object has ended and the Pod is marked")
					}
					return apierrors.NewServiceUnavailable("the test says so")
				}
				return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
			}
			begin(h)
			if !terminal(h.get("cp")) || failures > 0 {
				t.Errorf("the object has not ended, or nothing failed: %d", failures)
			}
			if after := h.condition(v1alpha1.PodConditionCheckpointing); after != "" {
				t.Errorf("the Pod is still marked: %q", after)
			}
		})
	}
}

func TestAPodIsUnmarkedWhenItsObjectIsDeletedAfterACrash(t *testing.T) {
	uid := podUID
	h := newHarness(t, makePod(), makePCP(withReason(v1alpha1.ReasonCheckpointInProgress), func(p *v1alpha1.PodCheckpoint) {
		p.Status.SourcePodUID = &uid
	}))
	h.ops.marker.set(t.Context(), podRef{"ns", "app", podUID}, v1alpha1.PodConditionCheckpointing, corev1.ConditionTrue, "x", "y")
	if err := h.client.Delete(t.Context(), h.get("cp")); err != nil {
		t.Fatal(err)
	}
	h.reconcile(t.Context(), "cp")
	if after := h.condition(v1alpha1.PodConditionCheckpointing); after != "" {
		t.Errorf("the Pod is still marked: %q", after)
	}
}

func TestATerminalObjectIsNeverExecutedAgain(t *testing.T) {
	for _, reason := range []string{v1alpha1.ReasonCheckpointCompleted, v1alpha1.ReasonCheckpointFailed, v1alpha1.ReasonSourcePodReplaced} {
		h := newHarness(t, makePod(), makePCP(withReason(reason)))
		h.run("cp")
		h.expectReady("cp", reason, "as the test has it")
		if h.cri.calls() != 0 {
			t.Errorf("%s: the Pod was checkpointed", reason)
		}
	}
}

func TestACacheThatIsBehindDoesNotExecuteAnObjectTwice(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	stale := h.get("cp")
	h.run("cp")
	h.intercept.Get = func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
		if pcp, ok := obj.(*v1alpha1.PodCheckpoint); ok && key.Name == "cp" {
			stale.DeepCopyInto(pcp)
			return nil
		}
		return c.Get(ctx, key, obj, opts...)
	}
	h.run("cp")
	h.intercept.Get = nil
	if h.cri.calls() != 1 {
		t.Errorf("the Pod was checkpointed %d times", h.cri.calls())
	}
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
}

func TestTwoObjectsOfOnePodAreTakenOneAfterTheOther(t *testing.T) {
	h := newHarness(t, makePod(), makePCP(), makePCP(func(p *v1alpha1.PodCheckpoint) { p.Name, p.UID = "other", "bbbbbbbb-bbbb-cccc-dddd-eeeeeeeeeeee" }))
	at := make(chan struct{})
	release := make(chan struct{})
	h.cri.before = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
		at <- struct{}{}
		<-release
		return nil
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.ops.Start(ctx) }()
	h.reconcile(ctx, "cp")
	<-at
	if result := h.reconcile(ctx, "other"); result.RequeueAfter == 0 {
		t.Error("the second object is not looked at again")
	}
	if c := readyCondition(h.get("other")); c != nil {
		t.Errorf("the second object was taken up: %s", c.Reason)
	}
	h.reconcile(ctx, "cp") // a repeated event does nothing
	close(release)
	for h.busy() {
		time.Sleep(time.Millisecond)
	}
	h.reconcile(ctx, "other")
	<-at
	for h.busy() {
		time.Sleep(time.Millisecond)
	}
	stop()
	<-done
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	h.expectReady("other", v1alpha1.ReasonCheckpointCompleted, "")
	if h.cri.calls() != 2 {
		t.Errorf("%d calls", h.cri.calls())
	}
}

func TestAFailedCheckpointSaysWhyAndLeavesNothing(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.cri.before = func(_ context.Context, in *runtimeapi.CheckpointPodRequest) error {
		os.WriteFile(filepath.Join(in.OutputPath, "half"), nil, 0o600)
		return status.Error(codes.Internal, "criu: no space left on device")
	}
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "no space left on device")
	if pcp.Status.CheckpointLocation != nil || pcp.Status.CompletionTime != nil {
		t.Error("a failed checkpoint has a location or a completion time")
	}
	h.expectFiles()
	if !slices.ContainsFunc(h.events(), func(e string) bool { return strings.Contains(e, "Warning CheckpointFailed") }) {
		t.Error("no event CheckpointFailed")
	}
}

func TestACheckpointOfOtherContainersThanAskedForFails(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.cri.names = []string{"a"}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "captured containers a, asked for were a, b, proxy")
	h.expectFiles()
}

func TestATimeoutSaysSoAndWhatTheRuntimeSaidLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := int32(1)
		h := newHarness(t, makePod(), makePCP(func(p *v1alpha1.PodCheckpoint) { p.Spec.TimeoutSeconds = &one }))
		served := make(chan struct{})
		h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		}
		h.wait = func(ctx context.Context, path string) (error, error) {
			close(served)
			return status.Error(codes.DeadlineExceeded, "criu was killed, the Pod thawed"), nil
		}
		h.run("cp")
		<-served
		h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "Timeout: the checkpoint was not done within 1s (the runtime: criu was killed, the Pod thawed)")
		h.expectFiles()
	})
}

func TestAStoppingAgentLetsACheckpointFinish(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	at, release := make(chan struct{}), make(chan struct{})
	h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		close(at)
		<-release
		return ctx.Err()
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.ops.Start(ctx) }()
	h.reconcile(ctx, "cp")
	<-at
	stop()
	close(release)
	<-done
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	h.expectFiles(dataOfCP)
}

func TestAStoppingAgentThatCannotWaitAnyLongerWaitsForTheThaw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t, makePod(), makePCP())
		at := make(chan struct{})
		h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
			close(at)
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		}
		thawed := false
		h.wait = func(context.Context, string) (error, error) {
			time.Sleep(5 * time.Second)
			thawed = true
			return nil, nil
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.ops.Start(ctx) }()
		h.reconcile(ctx, "cp")
		<-at
		stopping := time.Now()
		stop()
		<-done
		if !thawed {
			t.Error("the agent ended before the CRI service did")
		}
		if took := time.Since(stopping); took > stopLimit {
			t.Errorf("it took %s", took)
		}
		h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "the agent on node node-1 was stopped")
		h.expectFiles()
	})
}

func TestDeletingAnObjectEndsItsOperationAndRemovesEverything(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	at := make(chan struct{})
	h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		close(at)
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.ops.Start(ctx) }()
	h.reconcile(ctx, "cp")
	<-at
	if err := h.client.Delete(ctx, h.get("cp")); err != nil {
		t.Fatal(err)
	}
	for h.reconcile(ctx, "cp").RequeueAfter > 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	<-done
	var pcp v1alpha1.PodCheckpoint
	if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "cp"}, &pcp); !apierrors.IsNotFound(err) {
		t.Errorf("the object is still there: %v", err)
	}
	h.expectFiles()
}

func TestDataInUseByARestoreAreRemovedAfterIt(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.run("cp")
	h.inUse = []string{filepath.Join(h.dir, dataOfCP)}
	if err := h.client.Delete(t.Context(), h.get("cp")); err != nil {
		t.Fatal(err)
	}
	if result := h.reconcile(t.Context(), "cp"); result.RequeueAfter == 0 {
		t.Error("the deletion is not looked at again")
	}
	h.expectFiles(dataOfCP)
	if told := h.events(); !slices.Contains(told, `Normal DeletionDelayed Pod "again" is being restored from it`) {
		t.Errorf("told %q", told)
	}
	h.inUse = nil
	h.reconcile(t.Context(), "cp")
	h.expectFiles()
	var pcp v1alpha1.PodCheckpoint
	if err := h.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "cp"}, &pcp); !apierrors.IsNotFound(err) {
		t.Errorf("the object is still there: %v", err)
	}
}

// crash runs an operation up to a point and then starts the agent anew. The point
// is a write to the status that never returns to the agent.
func crash(t *testing.T, h *harness, at func(*v1alpha1.PodCheckpoint) bool) {
	t.Helper()
	ctx, kill := context.WithCancel(t.Context())
	defer kill()
	reached := make(chan struct{})
	h.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
		if pcp, ok := obj.(*v1alpha1.PodCheckpoint); ok && at(pcp) {
			close(reached)
			select {} // the process is gone
		}
		return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
	}
	go h.ops.Start(ctx)
	h.reconcile(ctx, "cp")
	<-reached
	h.intercept = interceptor.Funcs{}
	h.start()
}

func TestACrashBetweenRenameAndStatusEndsReady(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	crash(t, h, ready)
	h.expectFiles(dataOfCP, recordsDir+"/"+string(pcpUID)+".json")
	if c := readyCondition(h.get("cp")); c.Reason != v1alpha1.ReasonCheckpointInProgress {
		t.Fatalf("the crash came too late: %s", c.Reason)
	}
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	if pcp.Status.ManifestDigest == "" || pcp.Status.CheckpointedPodTemplate == nil {
		t.Error("the outcome is not whole")
	}
	h.expectFiles(dataOfCP)
	if h.cri.calls() != 1 {
		t.Errorf("the Pod was checkpointed %d times", h.cri.calls())
	}
}

func TestACrashBetweenRecordAndRenameEndsReady(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	crash(t, h, ready)
	// The state before the rename.
	if err := os.Rename(filepath.Join(h.dir, dataOfCP), filepath.Join(h.dir, checkpointsDir, partialPrefix+string(pcpUID))); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	h.expectFiles(dataOfCP)
}

func TestACrashBeforeTheRecordEndsAsInterrupted(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	crash(t, h, ready)
	if err := errors.Join(
		os.Rename(filepath.Join(h.dir, dataOfCP), filepath.Join(h.dir, checkpointsDir, partialPrefix+string(pcpUID))),
		os.Remove(filepath.Join(h.dir, recordsDir, string(pcpUID)+".json"))); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.expectFiles() // before anything is asked of the API
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "interrupted")
	if h.cri.calls() != 1 {
		t.Errorf("the Pod was checkpointed %d times", h.cri.calls())
	}
}

func TestARecordWhoseDataAreGoneEndsAsFailed(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	crash(t, h, ready)
	if err := os.RemoveAll(filepath.Join(h.dir, dataOfCP)); err != nil {
		t.Fatal(err)
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "could not be kept")
	h.expectFiles()
}

func TestACrashBeforeTheFailureIsToldStillTellsIt(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.cri.before = func(context.Context, *runtimeapi.CheckpointPodRequest) error {
		return status.Error(codes.Internal, "criu said no")
	}
	crash(t, h, func(p *v1alpha1.PodCheckpoint) bool { return terminal(p) })
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "Criu said no")
	h.expectFiles()
}

func TestTheOutcomeIsWrittenWhenTheAPIServerIsBack(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	failures := 0
	h.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
		if pcp, ok := obj.(*v1alpha1.PodCheckpoint); ok && ready(pcp) && failures < 3 {
			failures++
			if failures == 2 {
				return apierrors.NewConflict(schema.GroupResource{}, "cp", errors.New("changed"))
			}
			return apierrors.NewServiceUnavailable("etcd is away")
		}
		return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
	h.expectFiles(dataOfCP)
	if failures != 3 || h.cri.calls() != 1 {
		t.Errorf("%d failures, %d checkpoints", failures, h.cri.calls())
	}
}

// An update holds the fields of this version alone: what the next one's controller has
// written beside them would be gone, and a field of the spec that is not known here would
// make each write one that changes the spec, which nobody may.
func TestAnAgentWritesNothingButWhatItChanges(t *testing.T) {
	run := func(h *harness) (*harness, func()) { return h, func() { h.run("cp") } }
	for name, begin := range map[string]func(t *testing.T) (*harness, func()){
		"a checkpoint": func(t *testing.T) (*harness, func()) { return run(newHarness(t, makePod(), makePCP())) },
		"a refusal":    func(t *testing.T) (*harness, func()) { return run(newHarness(t, makePCP())) },
		"an import": func(t *testing.T) (*harness, func()) {
			data := exportOf(t)
			s := expecting(t, data)
			s.send(data, 0, len(data)-1, len(data))
			return s.harness, s.finish
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, finish := begin(t)
			whole := func(obj client.Object) error {
				if _, ok := obj.(*v1alpha1.PodCheckpoint); ok {
					t.Error("a PodCheckpoint is written as a whole")
				}
				return nil
			}
			h.intercept.Update = func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
				return errors.Join(whole(obj), c.Update(ctx, obj, opts...))
			}
			h.intercept.SubResourceUpdate = func(ctx context.Context, c client.Client, sub string, obj client.Object, opts ...client.SubResourceUpdateOption) error {
				return errors.Join(whole(obj), c.SubResource(sub).Update(ctx, obj, opts...))
			}
			finish()
			if c := readyCondition(h.get("cp")); c == nil || !terminal(h.get("cp")) {
				t.Errorf("it has not ended: %+v", c)
			}
		})
	}
}

func TestAnOutcomeThatComesTooLateGivesItsDataUp(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.cri.before = func(ctx context.Context, _ *runtimeapi.CheckpointPodRequest) error {
		// The controller takes the node for lost and ends the object.
		pcp := h.get("cp")
		setReady(&pcp.Status, 1, metav1.Now(), v1alpha1.ReasonCheckpointFailed, "the node was lost")
		return h.client.Status().Update(ctx, pcp)
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "the node was lost")
	h.expectFiles()
}

func TestARuntimeThatIsAwayIsAskedAgain(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.runtime.err = status.Error(codes.Unavailable, "containerd is being restarted")
	if _, err := h.reconciler.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "cp"}}); err == nil {
		t.Fatal("no error: the object is not looked at again")
	}
	if readyCondition(h.get("cp")) != nil || h.busy() {
		t.Fatal("the object was taken up")
	}
	h.runtime.err = nil
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "")
}

func TestTheSandboxHasToBeWhatThePodTells(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*fakeRuntime)
		want   string
	}{
		{"no sandbox", func(f *fakeRuntime) { f.sandboxes = nil }, "no running sandbox"},
		{"a container is missing", func(f *fakeRuntime) { f.containers = f.containers[:2] }, "Container b of Pod ns/app is not running in the container runtime"},
		{"a container runs twice", func(f *fakeRuntime) {
			f.containers = append(f.containers, &runtimeapi.Container{Id: "id-b2", PodSandboxId: "sandbox", Metadata: &runtimeapi.ContainerMetadata{Name: "b"}})
		}, "runs more than once"},
		{"another instance of a container", func(f *fakeRuntime) { f.containers[1].Id = "id-new" }, "Container a of Pod ns/app is being replaced"},
		{"containers of another sandbox do not count", func(f *fakeRuntime) { f.containers[1].PodSandboxId = "old" }, "Container a of Pod ns/app is not running"},
		{"only the newest sandbox counts", func(f *fakeRuntime) {
			f.sandboxes = append(f.sandboxes, &runtimeapi.PodSandbox{Id: "newer", CreatedAt: 2})
		}, "is not running in the container runtime"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHarness(t, makePod(), makePCP())
			tc.change(h.runtime)
			h.run("cp")
			h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, tc.want)
			if h.cri.calls() != 0 {
				t.Error("the CRI was called")
			}
			if f := h.get("cp").Finalizers; len(f) != 0 {
				t.Errorf("finalizers %v keep an object that has no data", f)
			}
		})
	}
}

func TestOnlyDataOfObjectsThatAreGoneOrFailedAreRemoved(t *testing.T) {
	uids := map[string]types.UID{}
	for i, name := range []string{"ready", "pending", "failed", "gone", "replaced"} {
		uids[name] = types.UID(strings.Repeat(string(rune('1'+i)), 8) + "-0000-0000-0000-000000000000")
	}
	object := func(name string, uid types.UID, reason string) *v1alpha1.PodCheckpoint {
		return makePCP(func(p *v1alpha1.PodCheckpoint) { p.Name, p.UID = name, uid }, withReason(reason))
	}
	h := newHarness(t,
		object("ready", uids["ready"], v1alpha1.ReasonCheckpointCompleted),
		object("pending", uids["pending"], v1alpha1.ReasonCheckpointInProgress),
		object("failed", uids["failed"], v1alpha1.ReasonCheckpointFailed),
		object("replaced", "99999999-0000-0000-0000-000000000000", v1alpha1.ReasonCheckpointCompleted),
	)
	for name, uid := range uids {
		if err := os.MkdirAll(filepath.Join(h.dir, checkpointsDir, dataName("ns", name, uid)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(h.dir, checkpointsDir, "somebody-elses"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := h.reconciler.removeOrphans(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.expectFiles(
		checkpointsDir+"/"+dataName("ns", "pending", uids["pending"]),
		checkpointsDir+"/"+dataName("ns", "ready", uids["ready"]),
		checkpointsDir+"/somebody-elses")
}

func TestAListThatLeavesAnObjectOutCostsNoCheckpoint(t *testing.T) {
	h := newHarness(t, makePod(), makePCP(func(p *v1alpha1.PodCheckpoint) { p.Spec.NodeName = testNode }))
	h.run("cp")
	pcp := h.get("cp")
	pcp.Spec.NodeName = "elsewhere" // the list by node does not show it any more
	if err := h.client.Update(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	if err := h.reconciler.removeOrphans(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.expectFiles(dataOfCP)
}

func TestAnObjectDeletedByForceLosesItsData(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.run("cp")
	pcp := h.get("cp")
	pcp.Finalizers = nil
	if err := errors.Join(h.client.Update(t.Context(), pcp), h.client.Delete(t.Context(), pcp)); err != nil {
		t.Fatal(err)
	}
	h.reconcile(t.Context(), "cp")
	h.expectFiles()
}

func TestANodeTakesNoMoreThanItsLimitAtATime(t *testing.T) {
	f := newFlights(2)
	first, second := f.begin("o1", "p1"), f.begin("o2", "p2")
	if first == nil || second == nil || f.begin("o3", "p3") != nil {
		t.Fatal("the limit of two does not hold")
	}
	f.end(first)
	if f.begin("o3", "p2") != nil {
		t.Error("one Pod is in two operations")
	}
	if f.begin("o3", "p3") == nil {
		t.Error("the freed place is not given")
	}
}

func TestAStopThatComesBeforeTheOperationBeginsEndsIt(t *testing.T) {
	fl := newFlights(1).begin("o", "p")
	fl.stop(errDeleted)
	ctx, cancel := fl.context(t.Context())
	defer cancel(nil)
	if !errors.Is(context.Cause(ctx), errDeleted) {
		t.Errorf("cause %v", context.Cause(ctx))
	}
}

func TestTheServersEndIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls Calls
		go calls.Intercept(t.Context(), &runtimeapi.CheckpointPodRequest{OutputPath: "/x"}, nil, func(context.Context, any) (any, error) {
			time.Sleep(5 * time.Second)
			return nil, errors.New("last words")
		})
		synctest.Wait()
		begun := time.Now()
		answer, err := calls.Wait(t.Context(), "/x")
		if err != nil || answer == nil || answer.Error() != "last words" || time.Since(begun) != 5*time.Second {
			t.Errorf("answer %v, error %v after %s", answer, err, time.Since(begun))
		}
		if answer, err := calls.Wait(t.Context(), "/x"); answer != nil || err != nil {
			t.Errorf("an ended call still answers: %v, %v", answer, err)
		}
		go calls.Intercept(t.Context(), &runtimeapi.CheckpointPodRequest{OutputPath: "/x"}, nil, func(context.Context, any) (any, error) {
			time.Sleep(time.Hour)
			return nil, nil
		})
		synctest.Wait()
		limited, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := calls.Wait(limited, "/x"); err == nil {
			t.Error("the wait has no limit")
		}
		time.Sleep(2 * time.Hour)
	})
}

func TestDataNamesFitAndComeApart(t *testing.T) {
	name := dataName("ns", "cp", pcpUID)
	if uid, ok := uidOfDataName(name); !ok || uid != pcpUID {
		t.Errorf("%q gives %q", name, uid)
	}
	long := dataName(strings.Repeat("n", 63), strings.Repeat("c", 253), pcpUID)
	if uid, ok := uidOfDataName(long); len(long) > maxName || !ok || uid != pcpUID {
		t.Errorf("%d bytes, UID %q", len(long), uid)
	}
	for _, bad := range []string{"", "x", ".partial-1", "a_b", "_b_c", "a_b_c_d", ".a_b_c"} {
		if uid, ok := uidOfDataName(bad); ok {
			t.Errorf("%q gives %q", bad, uid)
		}
	}
}

func TestSizesAreShort(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 1023: "1023", 4096: "4Ki", 1536: "1.5Ki", 12 << 20: "12Mi", 355543: "347Ki", 1<<30 + 1<<29: "1.5Gi"} {
		if got := binaryBytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// readyCheckpoint is a PodCheckpoint of makePod that is Ready.
func readyCheckpoint(change ...func(*v1alpha1.PodCheckpoint)) *v1alpha1.PodCheckpoint {
	return makePCP(append([]func(*v1alpha1.PodCheckpoint){withReason(v1alpha1.ReasonCheckpointCompleted), func(p *v1alpha1.PodCheckpoint) {
		src := &source{pod: makePod(), containers: []string{"proxy", "a", "b"}}
		p.Status.CheckpointedPodTemplate = podtemplate.FromPod(src.pod)
		p.Status.CheckpointedContainers, p.Status.CheckpointedInitContainers = capturedContainers(src)
		p.Status.ManifestDigest = "sha256:" + strings.Repeat("0", 64)
		p.Status.CheckpointLocation = &v1alpha1.CheckpointSource{
			Type: v1alpha1.CheckpointSourceTypeNodeLocal, NodeLocal: &v1alpha1.NodeLocalCheckpointSource{Path: dataName("ns", "cp", pcpUID)},
		}
	}}, change...)...)
}
