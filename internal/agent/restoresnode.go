package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/nodeinstall"
	"podstasis.dev/stasis/internal/restoring"
)

// questionPatience bounds a question about a restore.
const questionPatience = 10 * time.Second

// restoresNode answers what of restores is known on the node alone.
type restoresNode struct {
	runtime interface {
		ListPodSandbox(ctx context.Context, in *runtimeapi.ListPodSandboxRequest, opts ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error)
		ContainerStatus(ctx context.Context, in *runtimeapi.ContainerStatusRequest, opts ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error)
	}
	host *hostns.Host
}

var _ restoring.Node = (*restoresNode)(nil)

// SandboxesUp implements restoring.Node.
func (n *restoresNode) SandboxesUp(ctx context.Context) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, questionPatience)
	defer cancel()
	list, err := n.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the container runtime for its sandboxes: %w", err)
	}
	up := map[string]bool{}
	for _, s := range list.GetItems() {
		if s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
			up[s.GetId()] = true
		}
	}
	return up, nil
}

// StartFailed implements restoring.Node.
func (n *restoresNode) StartFailed(ctx context.Context, root, containerID string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, questionPatience)
	defer cancel()
	answer, err := n.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: containerID})
	switch {
	case status.Code(err) == codes.NotFound:
		return false, nil
	case err != nil:
		return false, fmt.Errorf("ask the container runtime whether container %s was started: %w", containerID, err)
	}
	c := answer.GetStatus()
	switch c.GetState() {
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return c.GetStartedAt() == 0, nil // one that ran has a time (containerd, CRI-O)
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		return n.abandoned(root, containerID)
	}
	return false, nil
}

// abandoned says whether a container that the container runtime calls created is none
// of the OCI runtime's any more: so it leaves one whose start it was itself killed in.
func (n *restoresNode) abandoned(root, containerID string) (bool, error) {
	err := n.host.Do(func() error {
		_, err := os.Stat(filepath.Join(root, containerID))
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look for the OCI runtime's state of container %s: %w", containerID, err)
	}
	return false, fmt.Errorf("the container runtime is still at the start of container %s: it is tried again", containerID)
}

// LookAtStart implements restoring.Node.
func (n *restoresNode) LookAtStart(ctx context.Context, root, containerID string) error {
	ctx, cancel := context.WithTimeout(ctx, questionPatience)
	defer cancel()
	_, err := n.host.Run(ctx, hostns.Command{
		Name: filepath.Join(nodeinstall.HostPrefix, "bin", "stasis-runtime"),
		Args: []string{"--root", root, nodeapi.LookCommand, containerID},
	})
	if err != nil {
		return fmt.Errorf("look whether container %s was let go: %w", containerID, err)
	}
	return nil
}
