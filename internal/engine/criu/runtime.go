package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/platform"
)

// errNoContainer says that the OCI runtime does not know the container.
var errNoContainer = errors.New("no such container")

// runtime calls the OCI runtime's command line on the host.
func (e *Engine) runtime(ctx context.Context, r engine.Runtime, args ...string) (hostns.Output, error) {
	return e.call(ctx, hostns.Command{Name: r.Binary, Args: args}, r)
}

// runtimeCapturing does so for a command that starts CRIU to capture something of
// a sandbox: outside of the agent's cgroups, whose end it survives, and marked so
// that it is found then. CRIU mounts cgroup hierarchies for moments; what a killed one
// leaves mounted is not the host's. When ctx ends it ends in good order.
func (e *Engine) runtimeCapturing(ctx context.Context, sandboxID string, r engine.Runtime, args ...string) (hostns.Output, error) {
	return e.runtimeCapturingWith(ctx, nil, sandboxID, r, args...)
}

// runtimeCapturingWith adds to the environment, which CRIU inherits.
func (e *Engine) runtimeCapturingWith(ctx context.Context, env []string, sandboxID string, r engine.Runtime, args ...string) (hostns.Output, error) {
	return e.call(ctx, hostns.Command{
		Name: r.Binary, Args: args,
		Env: append([]string{captureEnv + "=" + sandboxID}, env...),
		Interrupt: func() time.Duration {
			// Who cannot be asked is killed when the time is up.
			if err := interruptCapture(sandboxID); err != nil {
				e.log.Error("CRIU could not be asked to give up", "sandbox", sandboxID, "err", err)
			}
			return interruptPatience
		},
		Apart:   true,
		Outside: true,
	}, r)
}

func (e *Engine) call(ctx context.Context, c hostns.Command, r engine.Runtime) (hostns.Output, error) {
	what := c.Args[0]
	if r.Root != "" {
		c.Args = append([]string{"--root", r.Root}, c.Args...)
	}
	out, err := e.host.Run(ctx, c)
	if err != nil {
		return out, fmt.Errorf("%s: %w", what, err)
	}
	return out, nil
}

// state asks the OCI runtime for a container's status ("running", "paused", …).
func (e *Engine) state(ctx context.Context, c frozenContainer) (string, error) {
	out, err := e.runtime(ctx, c.Runtime, "state", c.ID)
	if err != nil {
		if strings.Contains(out.Stderr, "does not exist") {
			return "", errNoContainer
		}
		return "", err
	}
	var s struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil {
		return "", fmt.Errorf("read the state of container %s: %w", c.ID, err)
	}
	return s.Status, nil
}

// identifyRuntime reads the first line of "runc --version" or "crun --version".
func (e *Engine) identifyRuntime(ctx context.Context, r engine.Runtime) (checkpoint.Program, error) {
	out, err := e.host.Run(ctx, hostns.Command{Name: r.Binary, Args: []string{"--version"}})
	if err != nil {
		return checkpoint.Program{}, fmt.Errorf("ask the OCI runtime for its version: %w", err)
	}
	line, _, _ := strings.Cut(out.Stdout, "\n")
	name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	return checkpoint.Program{Name: name, Version: strings.TrimSpace(strings.TrimPrefix(rest, "version"))}, nil
}

// tellsOfInFlight says whether a runtime tells CRIU of itself whether connections that
// nobody has accepted are left out, whatever CRIU's own configuration says: runc does since
// it has a flag for it, 1.3.
func tellsOfInFlight(runtime checkpoint.Program) bool {
	version, err := platform.ParseVersion(runtime.Version)
	// One without a version is of a day before its release.
	return runtime.Name == "runc" && (err != nil || !version.Older(platform.Version{1, 3}))
}

func writeSpec(file string, spec *specs.Spec) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o600)
}
