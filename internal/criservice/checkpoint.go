package criservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
)

// defaultRuncRoot is where containerd's runc shim keeps state when its handler
// names no root; the CRI's namespace is below it.
const defaultRuncRoot = "/run/containerd/runc"

// criNamespace is containerd's namespace for containers of the CRI.
const criNamespace = "k8s.io"

// CheckpointPod implements runtime.v1.RuntimeService/CheckpointPod (C1), or has the
// container runtime do it where that does (C2).
func (s *Service) CheckpointPod(ctx context.Context, in *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	if native, err := s.passedOn(ctx); err != nil {
		return nil, rpcError(ctx, err)
	} else if native {
		answer, err := s.runtime.CheckpointPod(ctx, in)
		if !s.lost(err) {
			return answer, err
		}
	}
	if err := s.checkRequest(ctx, in); err != nil {
		return nil, rpcError(ctx, err)
	}
	sandbox, by, err := s.Captured(ctx, in.PodSandboxId, in.ContainerIds)
	if err == nil {
		err = engine.CheckOptions(by, in.Options)
	}
	if err != nil {
		return nil, rpcError(ctx, err)
	}
	release, ok := s.claim(sandbox.ID)
	if !ok {
		return nil, status.Errorf(codes.Aborted, "another operation on sandbox %s is under way", sandbox.ID)
	}
	defer release()
	if err := s.write(ctx, by, sandbox, in); err != nil {
		cleanErr := s.host.Do(func() error { return clear(in.OutputPath) })
		if cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("remove partial files from %s: %w", in.OutputPath, cleanErr))
		}
		return nil, rpcError(ctx, err)
	}
	return &runtimeapi.CheckpointPodResponse{}, nil
}

// write captures into the output directory and seals it.
func (s *Service) write(ctx context.Context, by engine.Engine, sandbox engine.Sandbox, in *runtimeapi.CheckpointPodRequest) error {
	release, err := s.admit(ctx, by, sandbox, in)
	if err != nil {
		return err
	}
	defer release()
	m, err := by.Checkpoint(ctx, sandbox, in.OutputPath, in.Options)
	if err != nil {
		return err
	}
	s.log.InfoContext(ctx, "captured a Pod", "sandbox", sandbox.ID, "namespace", sandbox.Namespace, "pod", sandbox.Name, "frozen", m.FreezeDuration)
	err = s.host.Do(func() error {
		_, err := checkpoint.Seal(ctx, in.OutputPath, m)
		return err
	})
	if err == nil {
		err = context.Cause(ctx) // whoever asked has been told that it failed
	}
	return err
}

// Examined is what CheckpointPod would meet.
type Examined struct {
	engine.Examination
	engine.Estimate
	// Engine is the one that captures the sandbox, Options are those that it knows.
	Engine  string
	Options []engine.Option
}

// Examine says what CheckpointPod with the same arguments would meet, and freezes
// nothing. What it would be refused for is among the problems. The CRI has no such call.
func (s *Service) Examine(ctx context.Context, in *runtimeapi.CheckpointPodRequest) (Examined, error) {
	var x Examined
	sandbox, by, err := s.Captured(ctx, in.PodSandboxId, in.ContainerIds)
	if err != nil {
		return x, err
	}
	x.Engine, x.Options = by.Name(), by.Options()
	if x.Examination, err = by.Examine(ctx, sandbox); err != nil {
		return x, err
	}
	if err := engine.CheckOptions(by, in.Options); err != nil {
		x.Problems = append(x.Problems, err.Error())
		return x, nil
	}
	if x.Estimate, err = by.Estimate(ctx, sandbox, in.Options); err != nil {
		return x, err
	}
	release, err := s.fits(x.Estimate, in)
	switch {
	case errors.Is(err, engine.ErrFreezeBudget), errors.Is(err, engine.ErrOption), errors.Is(err, ErrNoRoom):
		x.Problems = append(x.Problems, err.Error())
	case err != nil:
		return x, err
	default:
		release()
	}
	return x, nil
}

// Look says what is in containers that bears on a checkpoint of them.
func (s *Service) Look(ctx context.Context, sandboxID string, containerIDs []string) (engine.Examination, error) {
	sandbox, by, err := s.Captured(ctx, sandboxID, containerIDs)
	if err != nil {
		return engine.Examination{}, err
	}
	return by.Examine(ctx, sandbox)
}

// admit refuses, before anything is frozen, a checkpoint that would keep the Pod
// frozen for longer than its budget (P14), or for which there is no room (P32).
func (s *Service) admit(ctx context.Context, by engine.Engine, sandbox engine.Sandbox, in *runtimeapi.CheckpointPodRequest) (release func(), err error) {
	expected, err := by.Estimate(ctx, sandbox, in.Options)
	if err != nil {
		return nil, err
	}
	return s.fits(expected, in)
}

// fits is admit for what is expected.
func (s *Service) fits(expected engine.Estimate, in *runtimeapi.CheckpointPodRequest) (release func(), err error) {
	budget, err := engine.FreezeBudget(in.Options)
	if err != nil {
		return nil, err
	}
	if budget > 0 && expected.Freeze > budget {
		return nil, fmt.Errorf("%w: nothing was frozen: with %d MiB to capture the Pod is expected to stand still for %s, its budget is %s",
			engine.ErrFreezeBudget, expected.Bytes>>20, expected.Freeze, budget)
	}
	if s.room == nil {
		return func() {}, nil
	}
	err = s.host.Do(func() error {
		release, err = s.room.Reserve(in.OutputPath, expected.Bytes)
		return err
	})
	return release, err
}

func (s *Service) checkRequest(ctx context.Context, in *runtimeapi.CheckpointPodRequest) error {
	if err := needDeadline(ctx); err != nil {
		return err
	}
	if in.PodSandboxId == "" {
		return invalid("pod_sandbox_id is empty")
	}
	if len(in.ContainerIds) == 0 {
		return invalid("container_ids is empty: name the running containers to checkpoint")
	}
	seen := map[string]bool{}
	for _, id := range in.ContainerIds {
		if id == "" || seen[id] {
			return invalid("container_ids holds an empty or repeated ID %q", id)
		}
		seen[id] = true
	}
	return s.emptyDirectory(in.OutputPath)
}

// Captured is a sandbox with the named containers, and the engine that captures it.
func (s *Service) Captured(ctx context.Context, id string, containerIDs []string) (engine.Sandbox, engine.Engine, error) {
	sandbox, err := s.sandbox(ctx, id, containerIDs)
	if err != nil {
		return sandbox, nil, err
	}
	if len(sandbox.Containers) == 0 {
		return sandbox, nil, invalid("no containers of sandbox %s are named", id)
	}
	by, err := s.engines.Capturing(sandbox.Containers[0].Runtime)
	return sandbox, by, err
}

// sandbox joins what the runtime knows of a sandbox and of the named containers.
func (s *Service) sandbox(ctx context.Context, id string, containerIDs []string) (engine.Sandbox, error) {
	answer, err := s.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return engine.Sandbox{}, fmt.Errorf("sandbox %s: %w", id, err)
	}
	st := answer.GetStatus()
	if st.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return engine.Sandbox{}, status.Errorf(codes.FailedPrecondition, "sandbox %s is not running", id)
	}
	sandbox := engine.Sandbox{
		ID: st.GetId(), Namespace: st.GetMetadata().GetNamespace(), Name: st.GetMetadata().GetName(), UID: st.GetMetadata().GetUid(),
	}
	if ip := st.GetNetwork().GetIp(); ip != "" {
		sandbox.IPs = append(sandbox.IPs, ip)
	}
	for _, extra := range st.GetNetwork().GetAdditionalIps() {
		sandbox.IPs = append(sandbox.IPs, extra.GetIp())
	}
	for _, containerID := range containerIDs {
		c, err := s.container(ctx, sandbox.ID, containerID)
		if err != nil {
			return engine.Sandbox{}, err
		}
		sandbox.Containers = append(sandbox.Containers, c)
	}
	return sandbox, nil
}

// verboseInfo is the part that is used here of what containerd and CRI-O say of
// a container under the key "info" of a verbose ContainerStatus.
type verboseInfo struct {
	SandboxID      string      `json:"sandboxID"`
	PID            int         `json:"pid"`
	RuntimeSpec    *specs.Spec `json:"runtimeSpec"`
	RuntimeType    string      `json:"runtimeType"`
	RuntimeOptions struct {
		BinaryName string `json:"binary_name"`
		Root       string `json:"root"`
		ConfigPath string `json:"config_path"`
	} `json:"runtimeOptions"`
}

// runtime is a container's OCI runtime, as its engine is to find it.
func (i verboseInfo) runtime() engine.Runtime {
	r := engine.Runtime{
		Type: i.RuntimeType, Binary: i.RuntimeOptions.BinaryName, Root: i.RuntimeOptions.Root, ConfigPath: i.RuntimeOptions.ConfigPath,
	}
	if r.Type != "" && !strings.HasPrefix(r.Type, "io.containerd.runc.") {
		return r // whose defaults its engine knows
	}
	if r.Binary == "" {
		r.Binary = "runc"
	}
	if r.Root == "" {
		r.Root = defaultRuncRoot
	}
	r.Root += "/" + criNamespace
	return r
}

func (s *Service) container(ctx context.Context, sandboxID, id string) (engine.Container, error) {
	answer, err := s.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return engine.Container{}, fmt.Errorf("container %s: %w", id, err)
	}
	st := answer.GetStatus()
	name := st.GetMetadata().GetName()
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return engine.Container{}, status.Errorf(codes.FailedPrecondition, "container %s (%s) is not running", name, id)
	}
	var info verboseInfo
	if err := json.Unmarshal([]byte(answer.GetInfo()["info"]), &info); err != nil {
		return engine.Container{}, fmt.Errorf("container %s: the runtime's verbose status cannot be read: %w", name, err)
	}
	if info.PID <= 0 || info.RuntimeSpec == nil {
		return engine.Container{}, fmt.Errorf("container %s: the runtime's verbose status has no process ID or OCI spec", name)
	}
	if info.SandboxID != sandboxID {
		return engine.Container{}, status.Errorf(codes.InvalidArgument, "container %s (%s) belongs to sandbox %s, not to %s", name, id, info.SandboxID, sandboxID)
	}
	c := engine.Container{
		ID: st.GetId(), Name: name, Image: st.GetImage().GetImage(), ImageID: st.GetImageRef(),
		Created: time.Unix(0, st.GetCreatedAt()).UTC(),
		PID:     info.PID, Spec: info.RuntimeSpec,
		Runtime: info.runtime(),
	}
	return c, nil
}
