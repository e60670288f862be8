// Package engine is what Stasis asks of whatever captures and recreates
// processes. Its unit is the sandbox: some engines save and restore a Pod whole,
// others container by container, and both fit.
package engine

import (
	"context"
	"errors"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
)

var (
	// ErrOption says that an option is not known to the engine, or has a value
	// that it does not take.
	ErrOption = errors.New("unsupported checkpoint option")
	// ErrUnsupported says that the sandbox holds something the engine cannot
	// capture, found before anything was frozen.
	ErrUnsupported = errors.New("the Pod cannot be checkpointed")
	// ErrIncompatible says that a checkpoint cannot be restored by this engine on
	// this node.
	ErrIncompatible = errors.New("the checkpoint cannot be restored here")
	// ErrFreezeBudget says that the Pod would stand still for longer than its
	// freeze budget allows, or that it nearly had and was thawed.
	ErrFreezeBudget = errors.New("freeze budget")
)

// Estimate is what a checkpoint is expected to cost, found out while the Pod runs.
type Estimate struct {
	Bytes  int64         // on disk
	Freeze time.Duration // that the Pod stands still
	// Capture is how the memory would be captured; nil where the engine has one way only.
	Capture *checkpoint.Capture
}

// Sandbox is a running Pod sandbox and those of its containers that are to be
// captured.
type Sandbox struct {
	ID, Namespace, Name, UID string
	IPs                      []string
	Containers               []Container
}

// Container is one running container.
type Container struct {
	ID, Name       string
	Image, ImageID string
	Created        time.Time
	PID            int // of its init process, in the agent's PID namespace
	Runtime        Runtime
	Spec           *specs.Spec
}

// Runtime is an OCI runtime as the container runtime calls it.
type Runtime struct {
	// Type is the container runtime's name of the kind, such as io.containerd.NAME.v2;
	// empty where it has none.
	Type   string `json:"type,omitempty"`
	Binary string `json:"binary"` // path or name
	Root   string `json:"root"`   // its state directory (--root)
	// ConfigPath is the file of settings that the container runtime hands to its kind;
	// empty if there is none. Where a setting there names binary or root, those are empty.
	ConfigPath string `json:"configPath,omitempty"`
}

// Engine captures sandboxes and says what it can restore. Its restoring half
// works inside the OCI runtime that the container runtime calls, and is reached
// through package nodeapi.
type Engine interface {
	// Name is the engine's, in manifests and objects.
	Name() string

	// Captures says whether sandboxes of an OCI runtime are this engine's to capture.
	Captures(r Runtime) bool

	// Identify names the engine and gives its version; an error says what is
	// missing on this node and what to do.
	Identify(ctx context.Context) (checkpoint.Program, error)

	// Options are those that it knows, FreezeBudgetOption among them. CheckOptions says
	// whether others are given.
	Options() []Option

	// Estimate looks at how much there is to capture, and says how long that takes
	// by what earlier checkpoints took. The options bear on that.
	Estimate(ctx context.Context, sandbox Sandbox, options map[string]string) (Estimate, error)

	// Examine looks for what a checkpoint would be refused for, and for what would not
	// come back, without freezing anything.
	Examine(ctx context.Context, sandbox Sandbox) (Examination, error)

	// Checkpoint captures the sandbox's containers at one moment into dir, an
	// empty directory of the container runtime's mount namespace. All of them
	// are paused before the first is captured, stay paused until the last is,
	// and run again when it returns, whatever it returns and also when ctx ended.
	// They run again, too, when OptionFreezeBudget is used up (ErrFreezeBudget).
	// On error dir may hold partial files: the caller removes them. The
	// manifest's Files are the caller's to fill.
	Checkpoint(ctx context.Context, sandbox Sandbox, dir string, options map[string]string) (*checkpoint.Manifest, error)

	// CheckRestore says whether a checkpoint can be restored here
	// (ErrIncompatible, with both sides named).
	CheckRestore(ctx context.Context, m *checkpoint.Manifest) error

	// ThawLeftovers lets go of everything that an earlier process of the agent
	// froze and did not thaw. It returns what it could not thaw as an error.
	ThawLeftovers(ctx context.Context) error
}
