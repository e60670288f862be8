// Package gvisor captures the sandboxes of gVisor's runsc. A sandbox is one user-space
// kernel with all containers of the Pod in it: runsc saves and restores it whole.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/gvisor/pausing"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/platform"
	"podstasis.dev/stasis/internal/platform/thisnode"
)

// Name is the engine's name in manifests and objects.
const Name = "gvisor"

const (
	// shimType is containerd's name of runsc's kind of runtime.
	shimType = "io.containerd.runsc.v1"
	// defaultRoot is where the shim has runsc keep its state when its settings name none;
	// the CRI's namespace is below it.
	defaultRoot = "/run/containerd/runsc"
	// criNamespace is containerd's namespace for containers of the CRI.
	criNamespace = "k8s.io"
	// maxSettings bounds the shim's file of settings.
	maxSettings = 1 << 20
)

// Config is what the engine needs to know of its node.
type Config struct {
	// Host is where runsc and the containers' files are.
	Host *hostns.Host
	// RunDir is a directory on memory, such as /run/stasis, of the host.
	RunDir string
	// Runsc is the program that restores; the version of checkpoints must be its.
	Runsc string
	Log   *slog.Logger
	// Stage, if set, is told how far the checkpoint of a sandbox is. It is called
	// while the Pod stands still and must not wait.
	Stage func(sandboxID string, stage engine.Stage)
}

// Engine captures with runsc.
type Engine struct {
	Config
	pauses *pausing.Pauses
	pace   pace
}

var _ engine.Engine = (*Engine)(nil)

// New makes the engine. It touches nothing yet.
func New(c Config) *Engine {
	return &Engine{Config: c, pauses: pausing.New(c.Host, c.RunDir, c.Log)}
}

// Name implements engine.Engine.
func (e *Engine) Name() string { return Name }

// Captures implements engine.Engine.
func (e *Engine) Captures(r engine.Runtime) bool { return r.Type == shimType }

// Identify asks runsc for its version.
func (e *Engine) Identify(ctx context.Context) (checkpoint.Program, error) {
	return e.identify(ctx, e.Runsc)
}

func (e *Engine) identify(ctx context.Context, runsc string) (checkpoint.Program, error) {
	out, err := e.Host.Run(ctx, hostns.Command{Name: runsc, Args: []string{"--version"}})
	if err != nil {
		return checkpoint.Program{}, fmt.Errorf("gVisor does not run on this node: %w", err)
	}
	version, err := parseVersion(out.Stdout)
	return checkpoint.Program{Name: Name, Version: version}, err
}

// parseVersion reads what "runsc --version" prints. One that was built without a version
// says so of every build: nobody could tell whether two are the same.
func parseVersion(out string) (string, error) {
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "runsc version "); ok {
			if v == "" || v == "VERSION_MISSING" || len(strings.Fields(v)) != 1 {
				break
			}
			return v, nil
		}
	}
	return "", fmt.Errorf("runsc --version told no version (%.100q): use a release of gVisor", out)
}

// Options implements engine.Engine: this one has none of its own.
func (e *Engine) Options() []engine.Option { return []engine.Option{engine.FreezeBudgetOption} }

// Describe says what this node is to gVisor's checkpoints. The kernel is gVisor's own.
func (e *Engine) Describe(ctx context.Context) (platform.Description, error) {
	here, err := thisnode.Platform()
	if err != nil {
		return platform.Description{}, err
	}
	program, err := e.Identify(ctx)
	if err != nil {
		return platform.Description{}, err
	}
	return platform.Description{
		OS: here.OS, Architecture: here.Architecture, Kernel: here.Kernel, CPU: here.CPU, Engine: program, FormatVersion: checkpoint.FormatVersion,
	}, nil
}

// CheckRestore compares version and CPU (package platform).
func (e *Engine) CheckRestore(ctx context.Context, m *checkpoint.Manifest) error {
	here, err := e.Describe(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", engine.ErrIncompatible, err)
	}
	from, complete := platform.Of(m)
	if !complete {
		return fmt.Errorf("%w: it does not say what it was made on", engine.ErrIncompatible)
	}
	if why := platform.Obstacles(from, here); len(why) > 0 {
		return fmt.Errorf("%w: this node %s", engine.ErrIncompatible, strings.Join(why, "; it "))
	}
	return nil
}

// ThawLeftovers implements engine.Engine.
func (e *Engine) ThawLeftovers(ctx context.Context) error { return e.pauses.ThawLeftovers(ctx) }

// runsc is a sandbox's, with the settings of it that bear on checkpoints.
type runsc struct {
	pausing.Runsc
	network, overlay string
}

// runscOf finds a sandbox's runsc by what the container runtime tells of it.
func (e *Engine) runscOf(r engine.Runtime) (runsc, error) {
	found := runsc{Runsc: pausing.Runsc{Binary: "runsc", Root: defaultRoot}}
	if r.Binary != "" {
		found.Binary = r.Binary
	}
	if r.Root != "" {
		found.Root = r.Root
	}
	if r.ConfigPath != "" {
		data, err := e.readSettings(r.ConfigPath)
		if err != nil {
			return runsc{}, fmt.Errorf("read the settings of gVisor's shim: %w", err)
		}
		if err := found.apply(data); err != nil {
			return runsc{}, fmt.Errorf("read the settings of gVisor's shim: %s: %w", r.ConfigPath, err)
		}
	}
	found.Root = filepath.Join(found.Root, criNamespace)
	return found, nil
}

func (e *Engine) readSettings(path string) (data []byte, err error) {
	err = e.Host.Do(func() error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if info.Size() > maxSettings {
			return fmt.Errorf("%s has %d bytes", path, info.Size())
		}
		data, err = os.ReadFile(path)
		return err
	})
	return data, err
}

// apply reads the shim's settings.
func (r *runsc) apply(data []byte) error {
	var settings struct {
		BinaryName  string            `toml:"binary_name"`
		Root        string            `toml:"root"`
		RunscConfig map[string]string `toml:"runsc_config"`
	}
	if err := toml.Unmarshal(data, &settings); err != nil {
		return err
	}
	if settings.BinaryName != "" {
		r.Binary = settings.BinaryName
	}
	if settings.Root != "" {
		r.Root = settings.Root
	}
	r.network, r.overlay = settings.RunscConfig["network"], settings.RunscConfig["overlay2"]
	if settings.RunscConfig["overlay"] == "false" && r.overlay == "" {
		r.overlay = "none"
	}
	return nil
}

// containersOf are the IDs of all containers that runsc has in a sandbox, the sandbox's
// own among them.
func (e *Engine) containersOf(r runsc, sandboxID string) (ids []string, err error) {
	suffix := "_sandbox:" + sandboxID + ".state"
	err = e.Host.Do(func() error {
		entries, err := os.ReadDir(r.Root)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		for _, entry := range entries {
			if id, ok := strings.CutSuffix(entry.Name(), suffix); ok {
				ids = append(ids, id)
			}
		}
		return err
	})
	if err == nil && !slices.Contains(ids, sandboxID) {
		err = fmt.Errorf("runsc has no sandbox %s in %s", sandboxID, r.Root)
	}
	return ids, err
}
