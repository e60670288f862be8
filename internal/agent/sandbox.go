package agent

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels that the kubelet puts on sandboxes and containers.
const labelPodUID = "io.kubernetes.pod.uid"

// sandboxLister is what finding a Pod's sandbox needs of the container
// runtime's CRI.
type sandboxLister interface {
	ListPodSandbox(ctx context.Context, in *runtimeapi.ListPodSandboxRequest, opts ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error)
	ListContainers(ctx context.Context, in *runtimeapi.ListContainersRequest, opts ...grpc.CallOption) (*runtimeapi.ListContainersResponse, error)
}

// findSandbox finds the Pod's sandbox and the IDs of the selected containers in
// the container runtime, and makes sure that they are those which the Pod's
// status tells of. Errors that are not a *refusal are the runtime's.
func findSandbox(ctx context.Context, runtime sandboxLister, src *source) (sandboxID string, containerIDs []string, err error) {
	name := src.pod.Namespace + "/" + src.pod.Name
	sandboxes, err := runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{labelPodUID: string(src.pod.UID)},
	}})
	if err != nil {
		return "", nil, fmt.Errorf("list the sandboxes of Pod %s: %w", name, err)
	}
	var newest *runtimeapi.PodSandbox
	for _, s := range sandboxes.GetItems() {
		if newest == nil || s.CreatedAt > newest.CreatedAt {
			newest = s
		}
	}
	if newest == nil {
		return "", nil, refuse("Pod %s has no running sandbox in the container runtime", name)
	}
	list, err := runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		PodSandboxId: newest.Id,
		State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return "", nil, fmt.Errorf("list the containers of Pod %s: %w", name, err)
	}
	running := map[string][]string{}
	for _, c := range list.GetContainers() {
		if c.GetPodSandboxId() == newest.Id {
			running[c.GetMetadata().GetName()] = append(running[c.GetMetadata().GetName()], c.Id)
		}
	}
	for _, c := range src.containers {
		ids := running[c]
		switch len(ids) {
		case 0:
			return "", nil, refuse("Container %s of Pod %s is not running in the container runtime (the Pod's status is behind: it may just have ended)", c, name)
		case 1:
		default:
			return "", nil, refuse("Container %s of Pod %s runs more than once in the container runtime: %s", c, name, strings.Join(ids, ", "))
		}
		if told := containerID(statusOf(src.pod, c).ContainerID); told != "" && told != ids[0] {
			return "", nil, refuse("Container %s of Pod %s is being replaced: its Pod's status tells of %s, the container runtime runs %s; try again", c, name, told, ids[0])
		}
		containerIDs = append(containerIDs, ids[0])
	}
	return newest.Id, containerIDs, nil
}
