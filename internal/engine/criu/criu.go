// Package criu captures and recreates the processes of runc and crun containers
// with CRIU, through the OCI runtime's own pause, checkpoint, resume and restore.
package criu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/platform"
	"podstasis.dev/stasis/internal/platform/thisnode"
)

// Name is the engine's name in manifests and objects.
const Name = "criu"

// minimum is the oldest CRIU that is known to work on current kernels: 3.17
// fails on their vDSO.
var minimum = platform.Version{4, 1}

// Config is what the engine needs to know of its node.
type Config struct {
	// Host is where runc, CRIU and the containers' files are.
	Host *hostns.Host
	// RunDir is a directory on memory, such as /run/stasis, of the host: the
	// journal of frozen sandboxes and CRIU's logs are kept below it.
	RunDir string
	Log    *slog.Logger
	// COWHelper is the program that captures memory copy-on-write (cow.HelperName), on the
	// host; empty if there is none.
	COWHelper string
	// MaxStaging bounds how many bytes captures that are under way keep on RunDir until
	// their Pod runs again; 0: none.
	MaxStaging int64
	// Stage, if set, is told how far the checkpoint of a sandbox is. It is called
	// while the Pod stands still and must not wait.
	Stage func(sandboxID string, stage engine.Stage)
	// CheckConnections is asked, after a thaw, whether the TCP connections within the
	// Pod were captured at one moment (ErrTorn). It gets the directories of images of
	// the containers, by name, and runs in the host's mount namespace.
	CheckConnections func(ctx context.Context, imageDirs map[string]string) error
}

// ErrTorn says that the two ends of a connection within the Pod were not captured at
// one moment: the checkpoint is taken once more.
var ErrTorn = errors.New("a connection within the Pod went on while it was being captured")

// Engine captures and restores with CRIU.
type Engine struct {
	host    *hostns.Host
	journal journal
	runDir  string
	workDir string
	pace    pace
	cowPace pace // of captures whose memory is not in the freeze window

	cowHelper string
	// wroteMemory says that CRIU has written memory although it was not to.
	wroteMemory atomic.Bool
	staging     staging
	lister      lister
	log         *slog.Logger
	stage       func(sandboxID string, stage engine.Stage)

	checkConnections func(ctx context.Context, imageDirs map[string]string) error
}

var _ engine.Engine = (*Engine)(nil)

// New makes the engine. It touches nothing yet.
func New(c Config) *Engine {
	return &Engine{
		host:    c.Host,
		journal: journal{host: c.Host, dir: c.RunDir + "/frozen"},
		runDir:  c.RunDir,
		workDir: c.RunDir + "/work",
		staging: staging{most: c.MaxStaging},
		log:     c.Log,
		stage:   c.Stage,

		cowHelper: c.COWHelper,

		checkConnections: c.CheckConnections,
	}
}

// Name implements engine.Engine.
func (e *Engine) Name() string { return Name }

// Captures implements engine.Engine: runtimes that call CRIU themselves, which are all
// that share runc's command line.
func (e *Engine) Captures(r engine.Runtime) bool {
	return r.Type == "" || strings.HasPrefix(r.Type, "io.containerd.runc.")
}

// Identify asks CRIU for its version.
func (e *Engine) Identify(ctx context.Context) (checkpoint.Program, error) {
	out, err := e.host.Run(ctx, hostns.Command{Name: "criu", Args: []string{"--version"}})
	if err != nil {
		return checkpoint.Program{}, fmt.Errorf("CRIU does not run on this node (looked in %s); the agent's DaemonSet installs it at /opt/stasis/criu: %w", e.host.SearchPath(), err)
	}
	version, v, err := parseVersion(out.Stdout)
	if err != nil {
		return checkpoint.Program{}, err
	}
	if v.Older(minimum) {
		return checkpoint.Program{}, fmt.Errorf("CRIU %s is too old: %v or later is needed; remove it from PATH so that Stasis' own is used", version, minimum)
	}
	return checkpoint.Program{Name: Name, Version: version}, nil
}

// parseVersion reads what "criu --version" prints, and what counts of that.
func parseVersion(out string) (text string, v platform.Version, err error) {
	for line := range strings.Lines(out) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "Version: "); ok {
			if v, err = platform.ParseVersion(text); err != nil {
				return "", v, fmt.Errorf("criu --version: %w", err)
			}
			return text, v, nil
		}
	}
	return "", v, fmt.Errorf("criu --version printed no version: %q", out)
}

// Options implements engine.Engine.
func (e *Engine) Options() []engine.Option {
	return []engine.Option{engine.FreezeBudgetOption, {
		Name: OptionCapture, Values: []string{CapturePlain, CaptureCOW},
		Default: CaptureCOW + " where that is safe and shortens the freeze",
		Help:    "how memory is captured",
	}}
}

// Describe says what this node is to checkpoints.
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

// CheckRestore compares engine, version and platform. Of a checkpoint that does not
// say what CPU it needs, or what kernel that can be compared, the rest counts.
func (e *Engine) CheckRestore(ctx context.Context, m *checkpoint.Manifest) error {
	here, err := e.Describe(ctx)
	if err != nil {
		return err
	}
	from, complete := platform.Of(m)
	if !complete {
		from.CPU, from.Kernel = &checkpoint.CPU{}, here.Kernel
		if _, err := platform.ParseVersion(m.Engine.Version); err != nil {
			return fmt.Errorf("%w: engine version: %w", engine.ErrIncompatible, err)
		}
	}
	why := platform.Obstacles(from, here)
	// A container's cgroups are mounted in it, in version 1 other ones than in version 2.
	groups, err := thisnode.Cgroups()
	if err != nil {
		return err
	}
	if there := m.Platform.Cgroups; (there == "v1" || there == "v2") && there != groups {
		why = append(why, fmt.Sprintf("has control groups of %s and the checkpoint is of a node with %s: restore it on such a one", groups, there))
	}
	if len(why) > 0 {
		return fmt.Errorf("%w: this node %s", engine.ErrIncompatible, strings.Join(why, "; it "))
	}
	return nil
}

// ThawLeftovers thaws what the journal still names, and removes what captures and
// restores that were killed have left. It comes before the first capture.
func (e *Engine) ThawLeftovers(ctx context.Context) error {
	entries, err := e.journal.entries()
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		errs = append(errs, e.thawLeftover(ctx, entry))
	}
	if err := e.cleanCOW(); err != nil {
		e.log.WarnContext(ctx, "what killed captures left among the children of processes could not be collected", "error", err)
	}
	if err := e.host.Do(func() error { return os.RemoveAll(e.workDir) }); err != nil {
		e.log.WarnContext(ctx, "the engine's log files of killed captures could not be removed", "error", err)
	}
	if err := e.journal.host.Do(func() error {
		return errors.Join(removeTemporary(e.journal.dir), removeDeafHooks(filepath.Dir(e.journal.dir), time.Now()), removeMountPoints("/tmp", time.Now()))
	}); err != nil {
		e.log.WarnContext(ctx, "what killed restores left could not be removed", "error", err)
	}
	return errors.Join(errs...)
}

// thawLeftover undoes a freeze that an earlier agent journalled. Agent and guard
// may both try: only one does at a time, and never what is not that freeze.
func (e *Engine) thawLeftover(ctx context.Context, entry frozen) error {
	unlock, err := e.journal.lock()
	if err != nil {
		return err
	}
	defer unlock()
	current, err := e.journal.read(entry.SandboxID)
	if err != nil {
		return err
	}
	if current == nil || current.Freeze != entry.Freeze {
		return nil // undone meanwhile; what is there now is another freeze
	}
	e.log.WarnContext(ctx, "thawing a sandbox that an earlier run left frozen", "sandbox", entry.SandboxID)
	return errors.Join(endCapture(ctx, entry.SandboxID), e.thaw(ctx, entry))
}
