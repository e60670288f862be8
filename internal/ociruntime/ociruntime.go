// Package ociruntime is what the container runtime calls instead of runc for the
// handler "stasis": it hands every command to the real OCI runtime, except that
// it restores a container instead of creating it when its Pod restores.
//
// Before it comes stasis-runtime (aside): what is for the real runtime as it is gets
// there without this package. It imports nothing of Kubernetes.
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

	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/engine/criu/cow"
	"podstasis.dev/stasis/internal/layer"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/published"
)

// CompletedName is the name under which this program is what a completed init container
// runs: it exits 0.
const CompletedName = "stasis-completed"

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
	return readConfig(executable, "runtime.json", "runc")
}

// readConfig reads a file of that kind; runtime is the default, without which the file has
// to be there.
func readConfig(executable, name, runtime string) (Config, error) {
	c := Config{Runtime: runtime, Socket: nodeapi.SocketPath}
	file := filepath.Join(filepath.Dir(filepath.Dir(executable)), "etc", name)
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		if runtime == "" {
			return c, fmt.Errorf("%w: stasis-agent install writes it on nodes whose containerd has a handler for gVisor", err)
		}
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
	case CompletedName:
		return nil
	case criu.FreezeHookName:
		criu.KeepFromResuming(os.Getenv)
	case criu.GuardName:
		if len(args) != 2 {
			return fmt.Errorf("%s is started by the Stasis agent, with its run directory", criu.GuardName)
		}
		return criu.RunGuard(ctx, args[1], os.Stdin, os.Stdout, slog.New(slog.NewTextHandler(os.Stderr, nil)), thawGVisor)
	case cow.HelperName:
		return cow.Serve(os.Stdin, os.Stdout, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	}
	switch {
	case len(args) == 2 && args[1] == criu.MemoryKeeper:
		return keepMemory(ctx, executable)
	case len(args) == 3 && args[1] == criu.PIDReserver:
		return criu.ReservePIDs(args[2])
	case len(args) == 6 && args[1] == criu.MemoryServer:
		return criu.ServeMemory(args[2], args[3], args[4], args[5], slog.New(slog.NewTextHandler(os.Stderr, nil)))
	}
	in := parse(args[1:])
	run := run
	if filepath.Base(args[0]) == nodeapi.RunscName {
		run = runRunsc
	}
	err := run(ctx, executable, in, args[1:])
	if err != nil {
		logError(in.Log, err)
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
	switch in.Command {
	case "create":
		return c.create(ctx)
	case "start":
		return c.start(ctx)
	case "kill":
		return c.kill(ctx)
	case "delete":
		return c.delete(ctx)
	case nodeapi.LookCommand:
		return c.look(ctx)
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
		return fmt.Errorf("%s %s: %w", filepath.Base(c.Runtime), c.Command, err)
	}
	return nil
}

// passOnAs runs the real runtime with another command.
func (c call) passOnAs(ctx context.Context, command ...string) error {
	out, err := exec.CommandContext(ctx, c.Runtime, slices.Concat(c.Global, command)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(c.Runtime), command[0], err, out)
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

// reportPatience bounds the wait for an agent that hears and does not answer.
const reportPatience = 2 * time.Second

// report tells the agent how far a restore has come. Nothing depends on it: an
// agent that is away finds the container's nodeapi.Progress, and learns from the
// container runtime which sandboxes are gone.
func (c call) report(ctx context.Context, r nodeapi.Report) {
	ctx, cancel := context.WithTimeout(ctx, reportPatience)
	defer cancel()
	if _, err := c.ask(ctx, nodeapi.Request{Report: &r}); err != nil {
		logError(c.Log, fmt.Errorf("report to the Stasis agent: %w", err))
	}
}

func (c call) create(ctx context.Context) error {
	b, err := readBundle(c.Bundle)
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
	return c.mark(c.ID, marker{Sandbox: sandbox, Together: response.Together})
}

func (c call) createContainer(ctx context.Context, b *bundle, sandbox nodeapi.Sandbox) error {
	name := b.annotations[annotationContainer]
	// One after the other in a sandbox: whoever asks knows that every container
	// before it is either there, which the agent finds, or came to nothing.
	lock, err := c.lock(sandbox.ID)
	if err != nil {
		return fmt.Errorf("find the sandbox of container %s: %w", name, err)
	}
	defer lock.Close()
	// Who had the lock before may have been killed over a restore.
	if err := criu.EndRestores(filepath.Dir(c.Socket), sandbox.ID); err != nil {
		return err
	}
	privileges, err := b.privileges()
	if err != nil {
		return err
	}
	addresses, err := b.addresses()
	if err != nil {
		return err
	}
	response, err := c.ask(ctx, nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{
		Sandbox: sandbox, ContainerID: c.ID, Container: name, Privileges: privileges, Addresses: addresses, AsksChecked: true,
	}})
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
		if err := c.endAbandoned(ctx, sandbox.ID, name); err != nil {
			return err
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
	if response.Container.Unchecked {
		if _, err := c.ask(ctx, nodeapi.Request{Checked: &nodeapi.Checked{Sandbox: sandbox, Container: name}}); err != nil {
			return errors.Join(fmt.Errorf("restore container %s: %w", name, err), c.passOnAs(ctx, "delete", "--force", c.ID))
		}
	}
	m := marker{Sandbox: sandbox, Container: name, WorkDir: response.Container.WorkDir}
	if err := errors.Join(c.mark(c.ID, m), c.note(c.ID, m, nodeapi.StageCreated)); err != nil {
		// Nobody could let it go.
		return errors.Join(err, c.passOnAs(ctx, "delete", "--force", c.ID))
	}
	c.report(ctx, nodeapi.Report{Sandbox: sandbox, Container: name, Stage: nodeapi.StageCreated, Milliseconds: time.Since(began).Milliseconds()})
	return nil
}

// restore brings files first, then processes.
func (c call) restore(ctx context.Context, b *bundle, from nodeapi.ContainerRestore) error {
	rootfs, readonly, err := b.rootfs()
	if err != nil {
		return err
	}
	if from.RootfsArchive != "" {
		if err := applyArchive(ctx, from.RootfsArchive, rootfs); err != nil {
			return fmt.Errorf("writable layer: %w", err)
		}
	}
	if err := writeIdentity(rootfs, from.Identity); err != nil {
		return fmt.Errorf("write the new identity to /%s: %w", nodeapi.IdentityPath, err)
	}
	for _, v := range from.Volumes {
		owned, err := b.volume(c.ID, v.Destination)
		if err != nil {
			return err
		}
		if owned.OfImage {
			// What the source had deleted of the image's files is not in its archive.
			if err := layer.Empty(owned.Root); err != nil {
				return fmt.Errorf("volume at %s: %w", v.Destination, err)
			}
		}
		if err := applyArchive(ctx, v.Archive, owned.Root); err != nil {
			return fmt.Errorf("volume at %s: %w", v.Destination, err)
		}
	}
	for _, p := range from.Published {
		source, err := b.mountSource(p.Destination)
		if err != nil {
			return err
		}
		if err := published.Link(source, p.Directory); err != nil {
			return fmt.Errorf("volume at %s: %w", p.Destination, err)
		}
	}
	namespaces, err := b.namespaces()
	if err != nil {
		return err
	}
	options, config := filepath.Join(c.Bundle, "stasis-criu.conf"), criu.RestoreConfig{Hook: from.FreezeHook, Lazily: from.Lazy}
	if config.Masked, err = b.masked(from.ImageDir); err != nil {
		return err
	}
	if config.Cgroups, err = b.cgroups(); err != nil {
		return err
	}
	if err := criu.WriteRestoreConfig(options, config); err != nil {
		return err
	}
	b.useCRIUConfig(options)
	if err := b.write(); err != nil {
		return err
	}
	if readonly {
		remove, err := turningPoint(rootfs)
		if err != nil {
			return err
		}
		defer remove()
	}
	err = criu.Restore(ctx, criu.RestoreRequest{
		Memory:  c.memory(b, from),
		Runtime: c.Runtime, Root: c.Root, Global: c.Others, Sandbox: b.annotations[annotationSandboxID], ID: c.ID, Bundle: c.Bundle,
		PIDFile: c.PIDFile, ConsoleSocket: c.Console,
		ImageDir: from.ImageDir, WorkDir: from.WorkDir, RunDir: filepath.Dir(c.Socket),
		Path:         from.Path,
		UTSNamespace: namespaces["uts"], NetNamespace: namespaces["network"], IPCNamespace: namespaces["ipc"],
		PIDNamespace: namespaces["pid"], LastPID: from.LastPID,
		HoldDuring: from.HoldDuring, HoldAfter: from.HoldAfter, SysVIPC: from.SysVIPC,
	})
	if err == nil && (from.Lazy || len(config.Cgroups) > 0) {
		// To a checkpoint lazily means to serve pages itself, and mounts have other names.
		config.Lazily, config.Cgroups = false, nil
		if err = criu.WriteRestoreConfig(options, config); err != nil {
			err = errors.Join(err, c.passOnAs(ctx, "delete", "--force", c.ID))
		}
	}
	return err
}

// turningPoint gives a root file system that is to be read-only the directory /tmp,
// unless it has one, and returns what removes it again. CRIU, which changes to the new
// root by pivot_root(2), needs a directory in it; without /tmp it would make one, which
// it cannot when the root is read-only already.
func turningPoint(rootfs string) (remove func(), err error) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil, err
	}
	const name = "tmp"
	if err := root.Mkdir(name, 0o700); err != nil {
		root.Close()
		if errors.Is(err, fs.ErrExist) {
			return func() {}, nil
		}
		return nil, fmt.Errorf("make a directory for CRIU in the read-only root: %w", err)
	}
	return func() {
		root.Remove(name) // it is empty; of one that stays, the container sees an empty directory
		root.Close()
	}, nil
}

func applyArchive(ctx context.Context, archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	return layer.Apply(ctx, f, dir)
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
