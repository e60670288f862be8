package cri_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hostns"
)

// A container runtime that may implement CheckpointPod and RestorePod: containerd, and
// Stasis' own service for these two. What it writes is in a directory of a name that
// Stasis does not know: nobody can take it for anything else than opaque.
const (
	runtimeCommand = "be-a-runtime" // this program's first argument, when it is one
	runtimeSocket  = "/run/other-runtime.sock"
	opaque         = "opaque"
)

// beARuntime serves at a socket until it is killed.
func beARuntime(socket string, implements bool) error {
	to := map[bool]*grpc.ClientConn{}
	for own, at := range map[bool]string{false: "/run/containerd/containerd.sock", true: "/run/stasis/cri.sock"} {
		conn, err := grpc.NewClient("unix://"+at, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		to[own] = conn
	}
	if err := os.RemoveAll(socket); err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	return grpc.NewServer(grpc.ForceServerCodec(asItIs{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		var in, out []byte
		if err := stream.RecvMsg(&in); err != nil {
			return err
		}
		call := path.Base(method)
		own := implements && (call == "CheckpointPod" || call == "RestorePod")
		if own {
			var err error
			if in, err = below(call, in); err != nil {
				return status.Error(codes.InvalidArgument, err.Error())
			}
		}
		if err := to[own].Invoke(stream.Context(), method, &in, &out, grpc.ForceCodec(asItIs{})); err != nil {
			return err
		}
		return stream.SendMsg(&out)
	})).Serve(l)
}

// below has a request be about the directory opaque in its own.
func below(call string, request []byte) ([]byte, error) {
	if call == "RestorePod" {
		var in runtimeapi.RestorePodRequest
		if err := proto.Unmarshal(request, &in); err != nil || in.CheckpointPath == "" {
			return request, err
		}
		in.CheckpointPath = filepath.Join(in.CheckpointPath, opaque)
		return proto.Marshal(&in)
	}
	var in runtimeapi.CheckpointPodRequest
	if err := proto.Unmarshal(request, &in); err != nil || in.OutputPath == "" {
		return request, err
	}
	in.OutputPath = filepath.Join(in.OutputPath, opaque)
	if err := os.Mkdir(in.OutputPath, 0o700); err != nil {
		return nil, err
	}
	return proto.Marshal(&in)
}

// asItIs passes messages on unread.
type asItIs struct{}

func (asItIs) Name() string                       { return "proto" }
func (asItIs) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (asItIs) Unmarshal(data []byte, v any) error { *v.(*[]byte) = slices.Clone(data); return nil }

// background runs a program on the node, which ends by the signal that stop sends to
// whoever listens at its socket.
func (n *node) background(t *testing.T, socket string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(n.root+"/bin/devcluster", append([]string{"--state", n.state, "exec", "node-1", "--"}, args...)...)
	log, err := os.Create(filepath.Join(n.state, "log", filepath.Base(args[0])+".log"))
	must(t, err)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	log.Close()
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		pid, err := hostns.PeerPID(n.host.Path(socket))
		must(t, err)
		must(t, syscall.Kill(pid, syscall.SIGTERM))
		<-ended
	}
	t.Cleanup(stop)
	eventually(t, args[0]+" listens", func() bool {
		select {
		case <-ended:
			text, _ := os.ReadFile(log.Name())
			stopped = true
			t.Fatalf("it has ended: %s", text)
		default:
		}
		conn, err := net.Dial("unix", n.host.Path(socket))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return stop
}

// self is this program where the node finds it, which has a /tmp of its own.
func (n *node) self(t *testing.T) string {
	t.Helper()
	program, err := os.Executable()
	must(t, err)
	data, err := os.ReadFile(program)
	must(t, err)
	there := filepath.Join(n.payload, "cri.test")
	must(t, os.WriteFile(there, data, 0o700))
	return there
}

// C2: probed at the start and with each reconnection.
func TestAnAgentUsesTheCallsOfARuntimeThatHasThemForAsLongAsItHasThem(t *testing.T) {
	n := theNode
	program := n.self(t)
	const runDir, root = "/run/stasis-front", "/var/lib/stasis-front"
	stop := n.background(t, runtimeSocket, program, runtimeCommand, runtimeSocket, "true")
	t.Cleanup(func() { n.host.Do(func() error { return os.RemoveAll(root) }) })
	n.background(t, runDir+"/agent.sock", n.dist+"/bin/stasis-agent", "--no-kubernetes", "--metrics-address=", "--min-free-disk=0.01",
		"--runtime-endpoint=unix://"+runtimeSocket, "--run-dir="+runDir, "--root="+root)
	front, err := n.dial(runDir + "/cri.sock")
	must(t, err)

	a := container("a", counting)
	p := n.run(t, "", a)
	p.numbers(t, "a", 5)
	in := p.checkpointRequest(t)
	_, err = front.CheckpointPod(testContext(t), in)
	must(t, err)
	if got := n.entries(t, in.OutputPath); !slices.Equal(got, []string{opaque}) {
		t.Errorf("the checkpoint holds %v, and not what the runtime has written", got)
	}
	restored := &pod{node: n, name: podName(), configs: []*runtimeapi.ContainerConfig{a}, containers: map[string]string{}}
	restored.config = sandboxConfig(restored.name)
	answer, err := front.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{CheckpointPath: in.OutputPath, Config: restored.config, ContainerConfigs: restored.configs})
	must(t, err)
	restored.sandbox = answer.PodSandboxId
	restored.removeAfter(t)
	restored.containers["a"] = answer.RestoredContainers[0].ContainerId
	restored.start(t)
	restored.goesOn(t, "a")
	if first := restored.numbers(t, "a", 1)[0]; first < 5 {
		t.Errorf("it began at %d", first)
	}

	stop()
	n.background(t, runtimeSocket, program, runtimeCommand, runtimeSocket, "false")
	eventually(t, "the agent has found the other runtime", func() bool {
		in = p.checkpointRequest(t)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err = front.CheckpointPod(ctx, in)
		return status.Code(err) != codes.Unavailable
	})
	must(t, err)
	_, err = verify(n, in.OutputPath)
	must(t, err)
	p.goesOn(t, "a")
}

// becomeARuntime does what the program was started for, if it is not for the tests.
func becomeARuntime() {
	if len(os.Args) == 4 && os.Args[1] == runtimeCommand {
		fmt.Fprintln(os.Stderr, beARuntime(os.Args[2], strings.HasPrefix(os.Args[3], "t")))
		os.Exit(1)
	}
}
