package criservice

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
)

// fakeRuntime implements CheckpointPod, RestorePod, both or neither, and takes down what
// of them it was asked for in earnest.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	checkpoints, restores bool

	mu     sync.Mutex
	probes int
	asked  []string
}

func (f *fakeRuntime) CheckpointPod(ctx context.Context, in *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !f.checkpoints:
		return f.UnimplementedRuntimeServiceServer.CheckpointPod(ctx, in)
	case in.PodSandboxId == "":
		f.probes++
		return nil, status.Error(codes.InvalidArgument, "no sandbox")
	}
	f.asked = append(f.asked, "checkpoint "+in.PodSandboxId)
	return &runtimeapi.CheckpointPodResponse{}, nil
}

func (f *fakeRuntime) RestorePod(ctx context.Context, in *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !f.restores:
		return f.UnimplementedRuntimeServiceServer.RestorePod(ctx, in)
	case in.CheckpointPath == "":
		return nil, status.Error(codes.NotFound, "no checkpoint")
	}
	f.asked = append(f.asked, "restore "+filepath.Base(in.CheckpointPath))
	return &runtimeapi.RestorePodResponse{PodSandboxId: "native"}, nil
}

// PodSandboxStatus is what the service's own CheckpointPod begins with.
func (f *fakeRuntime) PodSandboxStatus(_ context.Context, in *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, "status of "+in.PodSandboxId)
	return nil, status.Error(codes.NotFound, "no such sandbox")
}

func (f *fakeRuntime) was() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

// serve has a runtime answer at a socket until it is stopped.
func serve(t *testing.T, socket string, s runtimeapi.RuntimeServiceServer) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	stop = sync.OnceFunc(func() {
		server.Stop()
		<-done
	})
	t.Cleanup(stop)
	return stop
}

func dial(t *testing.T, socket string) (*grpc.ClientConn, runtimeapi.RuntimeServiceClient) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Minute, Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, runtimeapi.NewRuntimeServiceClient(conn)
}

// beside serves the service beside a runtime, and returns a client of it.
func beside(t *testing.T, socket string) runtimeapi.RuntimeServiceClient {
	t.Helper()
	conn, runtime := dial(t, socket)
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	native := &Native{Runtime: runtime, Log: slog.New(slog.DiscardHandler)}
	ctx, stop := context.WithCancel(context.Background())
	var following sync.WaitGroup
	following.Go(func() { native.Follow(ctx, conn) })
	t.Cleanup(func() { stop(); following.Wait() })
	own := filepath.Join(t.TempDir(), "own.sock")
	serve(t, own, New(Config{Runtime: runtime, Engines: engine.Engines{}, Host: host, Native: native, Log: slog.New(slog.DiscardHandler)}))
	_, client := dial(t, own)
	return client
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func request(t *testing.T) *runtimeapi.CheckpointPodRequest {
	return &runtimeapi.CheckpointPodRequest{PodSandboxId: "s", ContainerIds: []string{"c"}, OutputPath: t.TempDir()}
}

// C2: its data is opaque, and so it restores them, too.
func TestARuntimeThatImplementsTheCallsIsUsedItselfByDirectCallers(t *testing.T) {
	f := &fakeRuntime{checkpoints: true, restores: true}
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, socket, f)
	client := beside(t, socket)
	if _, err := client.CheckpointPod(within(t), request(t)); err != nil {
		t.Error(err)
	}
	opaque, ours := filepath.Join(t.TempDir(), "opaque"), filepath.Join(t.TempDir(), "ours")
	if err := errors.Join(os.Mkdir(opaque, 0o700), os.Mkdir(ours, 0o700), os.WriteFile(filepath.Join(ours, checkpoint.ManifestName), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	restore := func(dir string) (*runtimeapi.RestorePodResponse, error) {
		return client.RestorePod(within(t), &runtimeapi.RestorePodRequest{CheckpointPath: dir, Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{}},
			ContainerConfigs: []*runtimeapi.ContainerConfig{{Metadata: &runtimeapi.ContainerMetadata{Name: "a"}}}})
	}
	if answer, err := restore(opaque); err != nil || answer.PodSandboxId != "native" {
		t.Errorf("%v, %v", answer, err)
	}
	if answer, err := restore(ours); status.Code(err) != codes.DataLoss {
		t.Errorf("what Stasis has written, of which the manifest is no manifest: %v, %v", answer, err)
	}
	// What a PodCheckpoint asks for is Stasis' own, whatever the runtime can do.
	if _, err := client.CheckpointPod(InOwnFormat(within(t)), request(t)); status.Code(err) != codes.NotFound {
		t.Errorf("in Stasis' format: %v", err)
	}
	if want := []string{"checkpoint s", "restore opaque", "status of s"}; !slices.Equal(f.was(), want) {
		t.Errorf("the runtime was asked to %q, want %q", f.was(), want)
	}
	if f.probes == 0 {
		t.Error("it was used without having been probed")
	}
}

// What one cannot restore it is not to checkpoint.
func TestARuntimeThatImplementsOneOfTheCallsIsNotUsed(t *testing.T) {
	for name, f := range map[string]*fakeRuntime{"neither": {}, "only the one": {checkpoints: true}, "only the other": {restores: true}} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			serve(t, socket, f)
			if _, err := beside(t, socket).CheckpointPod(within(t), request(t)); status.Code(err) != codes.NotFound {
				t.Errorf("Stasis' own call: %v", err)
			}
			if want := []string{"status of s"}; !slices.Equal(f.was(), want) {
				t.Errorf("the runtime was asked to %q, want %q", f.was(), want)
			}
		})
	}
}

func TestARuntimeIsProbedAgainWhenAnotherOneIsThere(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	stop := serve(t, socket, &fakeRuntime{})
	client := beside(t, socket)
	call := func() error {
		_, err := client.CheckpointPod(within(t), request(t))
		return err
	}
	eventually := func(what string, want codes.Code) {
		t.Helper()
		var err error
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if err = call(); status.Code(err) == want {
				return
			}
		}
		t.Fatalf("%s: %v, want %s", what, err, want)
	}
	eventually("one without the calls", codes.NotFound)
	stop()
	eventually("none", codes.Unavailable)
	stop = serve(t, socket, &fakeRuntime{checkpoints: true, restores: true})
	eventually("one with the calls", codes.OK)
	stop()
	serve(t, socket, &fakeRuntime{})
	eventually("one without them again", codes.NotFound)
}
