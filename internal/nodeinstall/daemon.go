package nodeinstall

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hostns"
)

// connectTimeout is how long one attempt to connect may take. Unset, it would be the first
// pause between attempts, which is little on a busy node.
const connectTimeout = 20 * time.Second

// New makes an installer for the node whose container runtime listens on the
// configured socket. close gives its connection back.
func New(c Config) (i *Installer, close func() error, err error) {
	c.Socket = strings.TrimPrefix(c.Socket, "unix://")
	conn, err := grpc.NewClient("unix://"+c.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: connectTimeout, Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second}}))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to the container runtime: %w", err)
	}
	return &Installer{Config: c, daemon: &socketDaemon{socket: c.Socket, client: runtimeapi.NewRuntimeServiceClient(conn)}}, conn.Close, nil
}

// socketDaemon is the process behind a socket.
type socketDaemon struct {
	socket string
	client runtimeapi.RuntimeServiceClient
}

func (d *socketDaemon) find() (process, host, error) {
	pid, err := hostns.PeerPID(d.socket)
	if err != nil {
		return process{}, nil, err
	}
	p, err := readProcess("/proc", pid)
	if err != nil {
		return process{}, nil, err
	}
	h, err := hostns.FromPID(pid)
	if err != nil {
		return process{}, nil, err
	}
	return p, h, nil
}

func (d *socketDaemon) cri() cri { return patientCRI{d.client} }

func (d *socketDaemon) signal(p process) error { return signalProcess(p) }

// callTimeout bounds one call of a container runtime that is there.
const callTimeout = 10 * time.Second

// patientCRI gives each call a deadline, and lets it wait for a runtime that is
// being restarted.
type patientCRI struct {
	client runtimeapi.RuntimeServiceClient
}

func (c patientCRI) Version(ctx context.Context, in *runtimeapi.VersionRequest, opts ...grpc.CallOption) (*runtimeapi.VersionResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return c.client.Version(ctx, in, append(opts, grpc.WaitForReady(true))...)
}

func (c patientCRI) Status(ctx context.Context, in *runtimeapi.StatusRequest, opts ...grpc.CallOption) (*runtimeapi.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return c.client.Status(ctx, in, append(opts, grpc.WaitForReady(true))...)
}

func (c patientCRI) ListPodSandbox(ctx context.Context, in *runtimeapi.ListPodSandboxRequest, opts ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return c.client.ListPodSandbox(ctx, in, append(opts, grpc.WaitForReady(true))...)
}
