// Package ociruntime is what the container runtime calls instead of runc for the
// handler "stasis": it hands every command to the real OCI runtime, except that
// it restores a container instead of creating it when its Pod restores.
//
// It is started several times for each container, so it reads as little as it
// can before it steps aside with exec, and imports nothing of Kubernetes.
package ociruntime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/layer"
	"podstasis.dev/stasis/internal/nodeapi"
)

// Names under which the one program plays its other parts, chosen by argv[0].
const (
	// FreezeHookName is what CRIU calls at each stage of a restore.
	FreezeHookName = "stasis-freeze-hook"
	// CompletedName is what a completed init container runs: it exits 0.
	CompletedName = "stasis-completed"
)

// Config is read from etc/runtime.json beside the program's bin directory.
type Config struct {
	// Runtime is the real OCI runtime: a path, or a name found in PATH.
	Runtime string `json:"runtime"`
	// Socket is where the agent listens; empty means nodeapi.SocketPath.
	Socket string `json:"socket,omitempty"`
}

// ReadConfig reads the configuration that belongs to a program installed as
// PREFIX/bin/stasis-runtime. Without one the real runtime is runc.
func ReadConfig(executable string) (Config, error) {
	c := Config{Runtime: "runc", Socket: nodeapi.SocketPath}
	file := filepath.Join(filepath.Dir(filepath.Dir(executable)), "etc", "runtime.json")
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return c, err
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	if c.Runtime == "" {
		return c, fmt.Errorf("%s names no runtime", file)
	}
	return c, nil
}

// Main does what the command line says. When it has no error to return and the
// real runtime was to be called, it does not return at all.
func Main(ctx context.Context, executable string, args []string) error {
	switch filepath.Base(args[0]) {
	case FreezeHookName:
		return criu.FreezeHook(os.Getenv)
	case CompletedName:
		return nil
	case criu.GuardName:
		if len(args) != 2 {
			return fmt.Errorf("%s is started by the Stasis agent, with its run directory", criu.GuardName)
		}
		return criu.RunGuard(ctx, args[1], os.Stdin, os.Stdout, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	}
	in := parse(args[1:])
	err := run(ctx, executable, in, args[1:])
	if err != nil {
		logError(in.log, err)
	}
	return err
}

func run(ctx context.Context, executable string, in invocation, args []string) error {
	config, err := ReadConfig(executable)
	if err != nil {
		return err
	}
	if config.Runtime, err = exec.LookPath(config.Runtime); err != nil {
		return fmt.Errorf("find the real OCI runtime: %w", err)
	}
	c := call{Config: config, executable: executable, invocation: in, args: args}
	switch in.command {
	case "create":
		return c.create(ctx)
	case "start":
		return c.start(ctx)
	case "delete":
		return c.delete(ctx)
	}
	return c.stepAside()
}

// call is one invocation with what it takes to carry it out.
type call struct {
	Config
	invocation
	executable string
	args       []string
}

// stepAside becomes the real runtime.
func (c call) stepAside() error {
	err := syscall.Exec(c.Runtime, append([]string{c.Runtime}, c.args...), os.Environ())
	return fmt.Errorf("run %s: %w", c.Runtime, err)
}

// passOn runs the real runtime with the arguments as they came.
func (c call) passOn(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, c.Runtime, c.args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", filepath.Base(c.Runtime), c.command, err)
	}
	return nil
}

func (c call) ask(ctx context.Context, request nodeapi.Request) (nodeapi.Response, error) {
	response, err := nodeapi.Call(ctx, c.Socket, request)
	if err != nil {
		return response, err
	}
	if response.Error != nil {
		return response, response.Error
	}
	return response, nil
}

// report tells the agent how far a restore has come. The container's fate does
// not depend on it: an agent that is away learns it from the container runtime.
func (c call) report(ctx context.Context, r nodeapi.Report) {
	if _, err := c.ask(ctx, nodeapi.Request{Report: &r}); err != nil {
		logError(c.log, fmt.Errorf("report to the Stasis agent: %w", err))
	}
}

func (c call) create(ctx context.Context) error {
	b, err := readBundle(c.bundle)
	if err != nil {
		return err
	}
	changed := b.dropEngineAnnotations()
	if !b.wantsRestore() {
		if changed {
			if err := b.write(); err != nil {
				return err
			}
		}
		return c.stepAside()
	}
	sandbox, err := b.sandbox()
	if err != nil {
		return err
	}
	switch kind := b.annotations[annotationType]; kind {
	case "sandbox":
		return c.createSandbox(ctx, b, sandbox)
	case "container":
		return c.createContainer(ctx, b, sandbox)
	default:
		return fmt.Errorf("the OCI spec's annotation %s is %q, neither sandbox nor container", annotationType, kind)
	}
}

// createSandbox asks whether the Pod may be restored. The sandbox itself (the
// pause container) is created as any other.
func (c call) createSandbox(ctx context.Context, b *bundle, sandbox nodeapi.Sandbox) error {
	response, err := c.ask(ctx, nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: sandbox}})
	if err != nil {
		return err
	}
	if response.Action != nodeapi.ActionRestore && response.Action != nodeapi.ActionOrdinary {
		return fmt.Errorf("the agent answered with the unknown action %q", response.Action)
	}
	if err := b.write(); err != nil {
		return err
	}
	if err := c.passOn(ctx); err != nil {
		c.report(ctx, nodeapi.Report{Sandbox: sandbox, Stage: nodeapi.StageDeleted})
		return err
	}
	return c.mark(c.id, marker{Sandbox: sandbox, Together: response.Together})
}

func (c call) createContainer(ctx context.Context, b *bundle, sandbox nodeapi.Sandbox) error {
	name := b.annotations[annotationContainer]
	response, err := c.ask(ctx, nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{Sandbox: sandbox, ContainerID: c.id, Container: name}})
	if err != nil {
		return err
	}
	switch response.Action {
	case nodeapi.ActionOrdinary:
		if err := b.write(); err != nil {
			return err
		}
		return c.stepAside()
	case nodeapi.ActionCompleted:
		if err := b.replaceByCompleted(c.executable); err != nil {
			return err
		}
		if err := b.write(); err != nil {
			return err
		}
		return c.stepAside()
	case nodeapi.ActionRestore:
		if response.Container == nil {
			return errors.New("the agent answered to restore, and not what")
		}
	default:
		return fmt.Errorf("the agent answered with the unknown action %q", response.Action)
	}
	began := time.Now()
	if err := c.restore(ctx, b, *response.Container); err != nil {
		err = fmt.Errorf("restore container %s: %w", name, err)
		c.report(ctx, nodeapi.Report{Sandbox: sandbox, Container: name, Stage: nodeapi.StageFailed, Message: err.Error()})
		return err
	}
	if err := c.mark(c.id, marker{Sandbox: sandbox, Container: name}); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: sandbox, Container: name, Stage: nodeapi.StageCreated, Milliseconds: time.Since(began).Milliseconds()})
	return nil
}

// restore brings files first, then processes.
func (c call) restore(ctx context.Context, b *bundle, from nodeapi.ContainerRestore) error {
	rootfs, err := b.rootfs()
	if err != nil {
		return err
	}
	if from.RootfsArchive != "" {
		if err := applyArchive(ctx, from.RootfsArchive, rootfs); err != nil {
			return fmt.Errorf("writable layer: %w", err)
		}
	}
	for _, v := range from.Volumes {
		source, err := b.mountSource(v.Destination)
		if err != nil {
			return err
		}
		if err := applyArchive(ctx, v.Archive, source); err != nil {
			return fmt.Errorf("volume at %s: %w", v.Destination, err)
		}
	}
	uts, err := b.utsNamespace()
	if err != nil {
		return err
	}
	options := filepath.Join(c.bundle, "stasis-criu.conf")
	if err := criu.WriteRestoreConfig(options, from.FreezeHook); err != nil {
		return err
	}
	b.useCRIUConfig(options)
	if err := b.write(); err != nil {
		return err
	}
	return criu.Restore(ctx, criu.RestoreRequest{
		Runtime: c.Runtime, Root: c.root, Global: c.others, ID: c.id, Bundle: c.bundle,
		PIDFile: c.pidFile, ConsoleSocket: c.console,
		ImageDir: from.ImageDir, WorkDir: from.WorkDir, RunDir: filepath.Dir(c.Socket),
		Path: from.Path, UTSNamespace: uts,
	})
}

func applyArchive(ctx context.Context, archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	return layer.Apply(ctx, f, dir)
}

// start lets a restored container go, or all that go together when it is the last
// of them; other containers are the real runtime's.
func (c call) start(ctx context.Context) error {
	m, err := c.marked(c.id)
	if err != nil {
		return err
	}
	if m == nil || m.Container == "" || m.Started {
		return c.stepAside()
	}
	ids, err := c.arrive(*m)
	if err != nil {
		return err
	}
	for _, id := range ids {
		err := c.letGo(ctx, id)
		if err != nil && id == c.id {
			return fmt.Errorf("let the restored container go: %w", err)
		}
		if err != nil {
			// The other one's affair: it may have been killed while it waited.
			logError(c.log, fmt.Errorf("let the restored container %s go: %w", id, err))
		}
	}
	return nil
}

// arrive notes that a container was asked to start, and returns the IDs of those
// that are to be let go now: none while others are waited for.
func (c call) arrive(m marker) (ids []string, err error) {
	// Starts of one sandbox's containers must not miss each other.
	lock, err := os.Open(filepath.Join(c.root, m.Sandbox.ID))
	if err != nil {
		return nil, fmt.Errorf("find the sandbox of the restored container: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock the sandbox of the restored container: %w", err)
	}
	sandbox, err := c.marked(m.Sandbox.ID)
	if err != nil {
		return nil, err
	}
	if sandbox == nil || !slices.Contains(sandbox.Together, m.Container) {
		return []string{c.id}, nil
	}
	if sandbox.Arrived == nil {
		sandbox.Arrived = map[string]string{}
	}
	sandbox.Arrived[m.Container] = c.id
	if err := c.mark(m.Sandbox.ID, *sandbox); err != nil {
		return nil, err
	}
	for _, name := range sandbox.Together {
		id, arrived := sandbox.Arrived[name]
		if !arrived {
			return nil, nil
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// letGo thaws a restored container, once.
func (c call) letGo(ctx context.Context, id string) error {
	m, err := c.marked(id)
	if err != nil || m == nil || m.Started {
		return err
	}
	cmd := exec.CommandContext(ctx, c.Runtime, append(append([]string{}, c.global...), "resume", id)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s resume: %w", filepath.Base(c.Runtime), err)
	}
	m.Started = true
	if err := c.mark(id, *m); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Container: m.Container, Stage: nodeapi.StageStarted})
	return nil
}

// delete lets the agent forget a sandbox that is gone.
func (c call) delete(ctx context.Context) error {
	m, err := c.marked(c.id)
	if err != nil {
		return err
	}
	if m == nil || m.Container != "" {
		return c.stepAside()
	}
	if err := c.passOn(ctx); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Stage: nodeapi.StageDeleted})
	return nil
}

// marker is kept in the real runtime's state directory of a container that
// belongs to a restored Pod.
type marker struct {
	Sandbox   nodeapi.Sandbox `json:"sandbox"`
	Container string          `json:"container,omitempty"` // empty: the sandbox itself
	Started   bool            `json:"started,omitempty"`

	// Of a sandbox: the containers that are let go together, and the IDs of those
	// that have been asked to start, by name.
	Together []string          `json:"together,omitempty"`
	Arrived  map[string]string `json:"arrived,omitempty"`
}

const markerName = "stasis.json"

// mark writes the marker of the container or sandbox id.
func (c call) mark(id string, m marker) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := checkpoint.WriteFile(filepath.Join(c.root, id, markerName), data, 0o600); err != nil {
		return fmt.Errorf("mark the restored container: %w", err)
	}
	return nil
}

// marked reads the marker of id; nil when it was created by the real runtime.
func (c call) marked(id string) (*marker, error) {
	data, err := os.ReadFile(filepath.Join(c.root, id, markerName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var m marker
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("read the mark of a restored container: %w", err)
	}
	return &m, nil
}

// logError appends to the log that the container runtime reads for the reason of
// a failure, in runc's JSON form. It shows in the Pod's events.
func logError(file string, err error) {
	if file == "" {
		return
	}
	line, encodeErr := json.Marshal(map[string]string{"level": "error", "msg": err.Error(), "time": time.Now().Format(time.RFC3339)})
	if encodeErr != nil {
		return
	}
	f, openErr := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if openErr != nil {
		return
	}
	defer f.Close()
	f.Write(append(line, '\n'))
}
