package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hooks"
	"podstasis.dev/stasis/internal/hostns"
)

const (
	// hookGrace is how much longer than the hook's own timeout the container runtime
	// may take to say what came of it.
	hookGrace = 5 * time.Second
	// runningPatience is how long a restored container that was let go may take to be
	// running for the container runtime too, and runningInterval how often it is asked.
	runningPatience = 10 * time.Second
	runningInterval = 50 * time.Millisecond
	// maxHookOutput bounds what is told of a hook's output: its end.
	maxHookOutput = 512
	// maxHookAnswer bounds what is read of the answer to a request.
	maxHookAnswer = 4 << 10
)

// hookRuntime is what hooks need of the container runtime's CRI.
type hookRuntime interface {
	ExecSync(ctx context.Context, in *runtimeapi.ExecSyncRequest, opts ...grpc.CallOption) (*runtimeapi.ExecSyncResponse, error)
	ContainerStatus(ctx context.Context, in *runtimeapi.ContainerStatusRequest, opts ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error)
	PodSandboxStatus(ctx context.Context, in *runtimeapi.PodSandboxStatusRequest, opts ...grpc.CallOption) (*runtimeapi.PodSandboxStatusResponse, error)
	StopContainer(ctx context.Context, in *runtimeapi.StopContainerRequest, opts ...grpc.CallOption) (*runtimeapi.StopContainerResponse, error)
}

// hookRunner runs hooks in the containers of Pods of this node.
type hookRunner struct {
	runtime hookRuntime
	// request asks a server in the network namespace of a process.
	request func(ctx context.Context, pid int, ips []string, get *hooks.HTTPGet) error
}

// newHookRunner takes the container runtime's socket, by which the node's network is found.
func newHookRunner(r hookRuntime, socket string) *hookRunner {
	return &hookRunner{runtime: r, request: func(ctx context.Context, pid int, ips []string, get *hooks.HTTPGet) error {
		return requestIn(ctx, pid, func() (int, error) { return hostns.PeerPID(strings.TrimPrefix(socket, "unix://")) }, ips, get)
	}}
}

// errNotRunning says that a hook's container is not there any more, or not yet.
var errNotRunning = errors.New("its container is not running")

// run runs one hook in a container. The container has to be running, or to be about
// to.
func (r *hookRunner) run(ctx context.Context, sandboxID, containerID string, h hooks.Hook) error {
	pid, err := r.awaitRunning(ctx, containerID)
	if err != nil {
		return err
	}
	limit := time.Duration(h.TimeoutSeconds) * time.Second
	if h.Exec != nil {
		return r.exec(ctx, containerID, h.Exec.Command, limit)
	}
	ips, err := r.addresses(ctx, sandboxID)
	if err != nil {
		return err
	}
	asking, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it did not answer within %s", limit))
	defer cancel()
	if err := r.request(asking, pid, ips, h.HTTPGet); err != nil {
		if cause := context.Cause(asking); cause != nil {
			return cause
		}
		return err
	}
	return nil
}

// exec runs a command, whose processes have ended when it returns without an error,
// unless the command left some behind.
func (r *hookRunner) exec(ctx context.Context, containerID string, command []string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit+hookGrace)
	defer cancel()
	answer, err := r.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: containerID, Cmd: command, Timeout: int64(limit / time.Second)})
	switch {
	case status.Code(err) == codes.DeadlineExceeded:
		return fmt.Errorf("it did not end within %s and was killed", limit)
	case err != nil:
		return fmt.Errorf("it could not be run: %s", printable(status.Convert(err).Message(), maxHookOutput))
	case answer.ExitCode != 0:
		return fmt.Errorf("it ended with %d%s", answer.ExitCode, said(string(answer.Stderr)+string(answer.Stdout)))
	}
	return nil
}

// said is a hook's output in a message.
func said(output string) string {
	if output = printable(output, maxHookOutput); output == "" {
		return " and said nothing"
	}
	return ": " + output
}

// printable makes one line of what an application put out: its end, without what
// would do something to a terminal.
func printable(s string, most int) string {
	s = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(s, "?"), func(c rune) bool { return c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 }), " ")
	return cut(strings.TrimSpace(s), most)
}

// awaitRunning waits until the container runtime calls a container running, and
// returns the PID of its first process.
func (r *hookRunner) awaitRunning(ctx context.Context, containerID string) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, runningPatience, errNotRunning)
	defer cancel()
	for {
		answer, err := r.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: containerID, Verbose: true})
		switch {
		case status.Code(err) == codes.NotFound:
			return 0, errNotRunning
		case err != nil:
			return 0, fmt.Errorf("ask the container runtime for container %s: %w", containerID, err)
		}
		switch answer.GetStatus().GetState() {
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			var info struct {
				PID int `json:"pid"`
			}
			if err := json.Unmarshal([]byte(answer.GetInfo()["info"]), &info); err != nil || info.PID <= 0 {
				return 0, fmt.Errorf("container %s: the runtime's verbose status has no process ID (%v)", containerID, err)
			}
			return info.PID, nil
		case runtimeapi.ContainerState_CONTAINER_EXITED:
			return 0, errNotRunning
		}
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(runningInterval):
		}
	}
}

// addresses are those of a sandbox; a Pod in the node's network has none of its own.
func (r *hookRunner) addresses(ctx context.Context, sandboxID string) ([]string, error) {
	answer, err := r.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandboxID})
	if err != nil {
		return nil, fmt.Errorf("ask the container runtime for the Pod's addresses: %w", err)
	}
	return addressesOf(answer.GetStatus()), nil
}

func addressesOf(s *runtimeapi.PodSandboxStatus) (ips []string) {
	if ip := s.GetNetwork().GetIp(); ip != "" {
		ips = append(ips, ip)
	}
	for _, extra := range s.GetNetwork().GetAdditionalIps() {
		ips = append(ips, extra.GetIp())
	}
	return ips
}

// requestIn asks a server of a Pod, from inside its network namespace: no policy of
// the network is in the way, and a server can keep to the loopback address. The Pod's
// own address comes first. Nothing else is ever asked: redirects are not followed.
//
// A sandbox with a network stack of its own, as gVisor's, has taken the addresses out of
// its namespace: it is asked from the node's, as the kubelet asks for its probes. onNode is
// a process there.
func requestIn(ctx context.Context, pid int, onNode func() (int, error), ips []string, get *hooks.HTTPGet) error {
	pod, err := networkOf(pid)
	if errors.Is(err, os.ErrNotExist) {
		return errNotRunning
	} else if err != nil {
		return fmt.Errorf("open the Pod's network: %w", err)
	}
	defer pod.Close()
	from, own := pod, false
	for _, ip := range append(ips, "127.0.0.1", "::1") {
		if own && net.ParseIP(ip).IsLoopback() {
			break
		}
		address := net.JoinHostPort(ip, strconv.Itoa(int(get.Port)))
		err := ask(ctx, from, address, get.Path)
		if errors.Is(err, syscall.ENETUNREACH) && !own && !net.ParseIP(ip).IsLoopback() {
			pid, err := onNode()
			if err != nil {
				return err
			}
			node, err := networkOf(pid)
			if err != nil {
				return fmt.Errorf("open the node's network: %w", err)
			}
			defer node.Close()
			from, own = node, true
			err = ask(ctx, from, address, get.Path)
			if !errors.Is(err, syscall.ECONNREFUSED) {
				return err
			}
			continue
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return err
		}
	}
	if own {
		return fmt.Errorf("nothing in the Pod listens on port %d of its address; its network stack is its sandbox's own, where a server at the loopback address cannot be reached", get.Port)
	}
	return fmt.Errorf("nothing in the Pod listens on port %d", get.Port)
}

func networkOf(pid int) (*os.File, error) { return os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net") }

func ask(ctx context.Context, ns *os.File, address, path string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", componentName)
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dialIn(ctx, ns, address) },
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(answer.Body, maxHookAnswer)) // what there is of it
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("it answered %s%s", printable(answer.Status, 64), said(string(text)))
	}
	return nil
}

// dialIn connects in a network namespace.
func dialIn(ctx context.Context, ns *os.File, address string) (conn net.Conn, err error) {
	err = inNetwork(ns, func() (err error) {
		// The address is a literal one: the socket is made right here.
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

// inNetwork runs fn on a thread of its own inside a network namespace.
func inNetwork(ns *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}
