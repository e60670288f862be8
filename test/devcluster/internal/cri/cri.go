// Package cri talks to the container runtime of a node from outside it.
package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client is a connection to one runtime.
type Client struct {
	conn    *grpc.ClientConn
	runtime runtime.RuntimeServiceClient
}

// Socket returns the path, on the machine, of a socket at path in the mount namespace of process pid.
func Socket(pid int, path string) string { return fmt.Sprintf("/proc/%d/root%s", pid, path) }

// Dial prepares a connection to the socket; it is made with the first call.
func Dial(socket string) (*Client, error) {
	conn, err := grpc.NewClient("passthrough:///runtime", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		return nil, fmt.Errorf("connecting to the container runtime: %w", err)
	}
	return &Client{conn, runtime.NewRuntimeServiceClient(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() { c.conn.Close() }

// Ready returns nil when the runtime answers and says that it is ready, with its network.
func (c *Client) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	status, err := c.runtime.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return err
	}
	for _, condition := range status.GetStatus().GetConditions() {
		// A runtime may report conditions of its own, such as the use of something deprecated.
		required := condition.GetType() == runtime.RuntimeReady || condition.GetType() == runtime.NetworkReady
		if required && !condition.GetStatus() {
			return fmt.Errorf("%s is false: %s", condition.GetType(), condition.GetMessage())
		}
	}
	return nil
}

// StopPods stops and removes all sandboxes with their containers, without a grace time.
func (c *Client) StopPods(ctx context.Context) error {
	list, err := c.runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("listing sandboxes: %w", err)
	}
	var all sync.WaitGroup
	failed := make([]error, len(list.GetItems()))
	for i, sandbox := range list.GetItems() {
		all.Go(func() {
			if _, err := c.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sandbox.GetId()}); err != nil {
				failed[i] = fmt.Errorf("stopping the sandbox of %s: %w", sandbox.GetMetadata().GetName(), err)
				return
			}
			if _, err := c.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sandbox.GetId()}); err != nil {
				failed[i] = fmt.Errorf("removing the sandbox of %s: %w", sandbox.GetMetadata().GetName(), err)
			}
		})
	}
	all.Wait()
	return errors.Join(failed...)
}
