package criservice

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

// undoTimeout bounds the removal of a sandbox whose restore failed.
const undoTimeout = 60 * time.Second

// RestorePod implements runtime.v1.RuntimeService/RestorePod (C1). It asks the
// runtime for a sandbox and for containers as any caller would; a ticket in the
// sandbox's annotations makes stasis-runtime restore them when they are started.
//
// Where the container runtime implements it, too, checkpoints that are not of Stasis'
// format are its own to restore (C2).
func (s *Service) RestorePod(ctx context.Context, in *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	if native, err := s.passedOn(ctx); err != nil {
		return nil, rpcError(ctx, err)
	} else if native {
		ours, err := s.written(in.CheckpointPath)
		if err != nil {
			return nil, rpcError(ctx, fmt.Errorf("checkpoint_path: %w", err))
		}
		if !ours {
			answer, err := s.runtime.RestorePod(ctx, in)
			if !s.lost(err) {
				return answer, err
			}
		}
	}
	m, handler, err := s.checkRestoreRequest(ctx, in)
	if err != nil {
		return nil, rpcError(ctx, err)
	}
	s.log.InfoContext(ctx, "restoring a Pod", "checkpoint", in.CheckpointPath, "source", m.Sandbox.Name, "containers", len(m.Containers))
	response, err := s.restore(ctx, in, handler)
	if err != nil {
		return nil, rpcError(ctx, err)
	}
	return response, nil
}

func (s *Service) restore(ctx context.Context, in *runtimeapi.RestorePodRequest, handler string) (response *runtimeapi.RestorePodResponse, err error) {
	mode, err := memoryMode(in.Options)
	if err != nil {
		return nil, err
	}
	ticket := s.tickets.Issue(in.CheckpointPath, mode)
	defer s.tickets.Revoke(ticket)
	config := proto.Clone(in.Config).(*runtimeapi.PodSandboxConfig)
	if config.Annotations == nil {
		config.Annotations = map[string]string{}
	}
	config.Annotations[nodeapi.AnnotationPrefix+"restore-ticket"] = ticket

	sandbox, err := s.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return nil, fmt.Errorf("make the sandbox: %w", err)
	}
	response = &runtimeapi.RestorePodResponse{PodSandboxId: sandbox.PodSandboxId}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo(ctx, sandbox.PodSandboxId))
		}
	}()
	for _, c := range in.ContainerConfigs {
		created, err := s.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
			PodSandboxId: sandbox.PodSandboxId, Config: c, SandboxConfig: config,
		})
		if err != nil {
			return nil, fmt.Errorf("make container %s: %w", c.Metadata.Name, err)
		}
		response.RestoredContainers = append(response.RestoredContainers, &runtimeapi.RestoredContainer{
			Name: c.Metadata.Name, ContainerId: created.ContainerId,
		})
	}
	return response, nil
}

// undo removes what a failed call made, also when the call's own time is up.
func (s *Service) undo(ctx context.Context, sandboxID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	_, stopErr := s.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandboxID})
	_, err := s.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandboxID})
	if err != nil {
		return fmt.Errorf("remove the sandbox of the failed restore: %w", errors.Join(stopErr, err))
	}
	return nil
}

// checkRestoreRequest also returns the handler that restores the checkpoint.
func (s *Service) checkRestoreRequest(ctx context.Context, in *runtimeapi.RestorePodRequest) (*checkpoint.Manifest, string, error) {
	if err := needDeadline(ctx); err != nil {
		return nil, "", err
	}
	if !filepath.IsAbs(in.CheckpointPath) || filepath.Clean(in.CheckpointPath) != in.CheckpointPath {
		return nil, "", invalid("checkpoint_path %q is not a clean absolute path", in.CheckpointPath)
	}
	if in.Config.GetMetadata() == nil {
		return nil, "", invalid("config has no metadata")
	}
	mode, err := memoryMode(in.Options)
	if err != nil {
		return nil, "", err
	}
	if len(in.ContainerConfigs) == 0 {
		return nil, "", invalid("container_configs is empty")
	}
	var m *checkpoint.Manifest
	err = s.host.Do(func() error {
		verified, err := s.memory.Verify(ctx, in.CheckpointPath, "", mode)
		if err != nil {
			return err
		}
		m = verified.Manifest
		if verified.Beside { // whoever asks is told now
			return pages.VerifyBeside(ctx, in.CheckpointPath, "", nil)
		}
		return nil
	})
	if errors.Is(err, pages.ErrNotLazy) {
		return nil, "", status.Errorf(codes.FailedPrecondition, "option %s: %v", optionMemory, err)
	} else if err != nil {
		return nil, "", err
	}
	by, err := s.engines.Named(m.Engine.Name)
	if err != nil {
		return nil, "", err
	}
	// An engine restores by one handler, which is therefore its default.
	handler := s.handlers[by.Name()]
	if in.RuntimeHandler != "" && in.RuntimeHandler != handler {
		return nil, "", invalid("runtime_handler %q cannot restore this checkpoint; %q can", in.RuntimeHandler, handler)
	}
	if err := engine.CheckOptions(by, without(in.Options, optionMemory)); err != nil {
		return nil, "", err
	}
	if err := by.CheckRestore(ctx, m); err != nil {
		return nil, "", err
	}
	return m, handler, matchContainers(m, in.ContainerConfigs)
}

// optionMemory says how memory is brought (pages.Mode).
const optionMemory = "memory"

func memoryMode(options map[string]string) (pages.Mode, error) {
	mode, err := pages.ParseMode(options[optionMemory])
	if err != nil {
		return "", invalid("option %s: %v", optionMemory, err)
	}
	return mode, nil
}

func without(options map[string]string, key string) map[string]string {
	options = maps.Clone(options)
	delete(options, key)
	return options
}

// matchContainers checks that the configurations are those of exactly the
// checkpoint's containers, and describe the processes that are in it.
func matchContainers(m *checkpoint.Manifest, configs []*runtimeapi.ContainerConfig) error {
	given := map[string]bool{}
	for _, config := range configs {
		name := config.GetMetadata().GetName()
		if name == "" || given[name] {
			return invalid("container_configs has an empty or repeated name %q", name)
		}
		given[name] = true
		i := slices.IndexFunc(m.Containers, func(c checkpoint.Container) bool { return c.Name == name })
		if i < 0 {
			return invalid("container_configs names %q, which is not in the checkpoint", name)
		}
		if err := matchProcess(m.Containers[i], config); err != nil {
			return err
		}
	}
	for _, c := range m.Containers {
		if !given[c.Name] {
			return invalid("container_configs lacks container %q of the checkpoint", c.Name)
		}
	}
	return nil
}

// matchProcess compares what a configuration expects of the process with what
// was captured, as far as it says anything.
func matchProcess(c checkpoint.Container, config *runtimeapi.ContainerConfig) error {
	differs := func(what string, captured, expected any) error {
		return status.Errorf(codes.FailedPrecondition, "container %s: %s is %v in the checkpoint and %v in container_configs", c.Name, what, captured, expected)
	}
	if image := config.GetImage().GetImage(); image != "" && image != c.Image && image != c.ImageID && config.GetImage().GetUserSpecifiedImage() != c.Image {
		return differs("image", c.Image, image)
	}
	if len(config.Command) > 0 {
		if args := append(slices.Clone(config.Command), config.Args...); !slices.Equal(args, c.Process.Args) {
			return differs("command", c.Process.Args, args)
		}
	}
	if config.WorkingDir != "" && config.WorkingDir != c.Process.Cwd {
		return differs("working directory", c.Process.Cwd, config.WorkingDir)
	}
	security := config.GetLinux().GetSecurityContext()
	if u := security.GetRunAsUser(); u != nil && u.Value != int64(c.Process.UID) {
		return differs("user", c.Process.UID, u.Value)
	}
	if g := security.GetRunAsGroup(); g != nil && g.Value != int64(c.Process.GID) {
		return differs("group", c.Process.GID, g.Value)
	}
	if config.Tty != c.Process.Terminal {
		return differs("terminal", c.Process.Terminal, config.Tty)
	}
	return nil
}
