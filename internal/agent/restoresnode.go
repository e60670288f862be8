package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
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
