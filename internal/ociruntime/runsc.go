package ociruntime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine/gvisor/pausing"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/layer"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/published"
)

// This file stands in for gVisor's runsc, for the handler "stasis-gvisor". A sandbox of
// gVisor is restored as a whole, and containerd knows nothing of that: it creates the
// sandbox and starts it, then creates and starts one container after the other.
//
//   - create is runsc's own, after files have been put where the restored containers will
//     look for them.
//   - start of the sandbox becomes runsc's restore, which takes the whole image.
//   - start of a container is runsc's own: the sandbox knows that it is being restored, and
//     takes the container's new files and mounts for those of the one that it has saved
//     under that name. With the last container everything runs.
//   - What would ask a sandbox that is being restored for anything is kept from it.
//   - An init container that had completed is none of the sandbox's at all. The kubelet runs
//     it before the others, when nothing can run there: it is answered for right here, as one
//     that ends with 0 as soon as it is started.

const (
	// gvisorEngine is the engine's name, as the manifests of its checkpoints have it.
	gvisorEngine = "gvisor"
	// markersDir is where markers are, below runsc's state directory: runsc has files there
	// and no directory for each container.
	markersDir = "stasis"
)

// runscMarker is the part of a marker that only sandboxes of gVisor have.
type runscMarker struct {
	// Of a sandbox: what it is restored from (nil: it is started as any other), whether it
	// has been, its process and its network's addresses. Once it runs the addresses are in
	// its own network stack and nowhere else.
	Restore   *nodeapi.SandboxRestore `json:"restore,omitempty"`
	Restored  bool                    `json:"restored,omitempty"`
	PID       int                     `json:"pid,omitempty"`
	PIDStart  string                  `json:"pidStart,omitempty"`
	Addresses []netip.Addr            `json:"addresses,omitempty"`
	// Completed, of a container: it is an init container that had completed.
	Completed bool `json:"completed,omitempty"`
}

// restoring says whether a sandbox's marker is of one of which not every container has been
// started.
func (m *marker) restoring() bool {
	if m == nil || m.Runsc == nil || m.Runsc.Restore == nil {
		return false
	}
	return slices.ContainsFunc(m.Runsc.Restore.Containers, func(name string) bool { return m.Arrived[name] == "" })
}

// runscCall is one invocation in runsc's place. The call's root is where markers are.
type runscCall struct{ call }

func runRunsc(ctx context.Context, executable string, in invocation, args []string) error {
	config, err := readConfig(executable, "runsc.json", "")
	if err != nil {
		return err
	}
	if config.Runtime, err = exec.LookPath(config.Runtime); err != nil {
		return fmt.Errorf("find the real OCI runtime: %w", err)
	}
	c := runscCall{call{Config: config, executable: executable, invocation: in, args: args}}
	c.Root = filepath.Join(in.Root, markersDir)
	switch in.Command {
	case "create":
		return c.create(ctx)
	case "start", "state", "wait", "kill", "delete":
		m, err := c.marked(c.ID)
		if err != nil {
			return err
		}
		if m != nil && m.Runsc != nil && m.Runsc.Completed {
			return c.completed(*m)
		}
	}
	switch in.Command {
	case "start":
		return c.start(ctx)
	case "events":
		return c.events()
	case "kill":
		return c.kill(ctx)
	case "delete":
		return c.delete(ctx)
	}
	return c.stepAside()
}

func (c runscCall) create(ctx context.Context) error {
	b, err := readBundle(c.Bundle)
	if err != nil {
		return err
	}
	if !b.wantsRestore() {
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

func (c runscCall) createSandbox(ctx context.Context, b *bundle, sandbox nodeapi.Sandbox) (err error) {
	m := marker{Sandbox: sandbox, Runsc: &runscMarker{}}
	if m.Runsc.Addresses, err = b.addresses(); err != nil {
		return err
	}
	response, err := c.ask(ctx, nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{
		Sandbox: sandbox, Engine: gvisorEngine, EngineAnnotations: b.annotationsBelow("dev.gvisor."),
	}})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			c.report(ctx, nodeapi.Report{Sandbox: sandbox, Stage: nodeapi.StageDeleted})
		}
	}()
	switch response.Action {
	case nodeapi.ActionOrdinary:
	case nodeapi.ActionRestore:
		if response.Whole == nil || response.Whole.ImageDir == "" || len(response.Whole.Containers) == 0 {
			return errors.New("the agent answered to restore, and not what")
		}
		m.Runsc.Restore = response.Whole
	default:
		return fmt.Errorf("the agent answered with the unknown action %q", response.Action)
	}
	if err := c.passOn(ctx); err != nil {
		return err
	}
	if m.Runsc.PID, m.Runsc.PIDStart, err = c.process(); err == nil {
		err = c.newMark(c.ID, m)
	}
	if err != nil {
		return errors.Join(err, c.passOnAs(ctx, "delete", "--force", c.ID))
	}
	return nil
}

// process is the sandbox's, by the file that runsc has written, with when it began.
func (c runscCall) process() (pid int, start string, err error) {
	text, err := os.ReadFile(c.PIDFile)
	if err == nil {
		pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
	}
	if err == nil {
		start, err = startOf(pid)
	}
	if err != nil {
		return 0, "", fmt.Errorf("find the sandbox's process: %w", err)
	}
	return pid, start, nil
}

// startOf is when a process began, in the kernel's ticks (proc_pid_stat(5)).
func startOf(pid int) (string, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields[19], nil
}

func (c runscCall) newMark(id string, m marker) error {
	if err := os.MkdirAll(filepath.Join(c.Root, id), 0o700); err != nil {
		return fmt.Errorf("mark the restored container: %w", err)
	}
	return c.mark(id, m)
}

func (c runscCall) createContainer(ctx context.Context, b *bundle, sandbox nodeapi.Sandbox) error {
	name := b.annotations[annotationContainer]
	// One after the other in a sandbox, as of runc's.
	lock, err := c.lock(sandbox.ID)
	if err != nil {
		return fmt.Errorf("find the sandbox of container %s: %w", name, err)
	}
	defer lock.Close()
	of, err := c.marked(sandbox.ID)
	if err != nil {
		return err
	}
	if of == nil || of.Runsc == nil {
		return fmt.Errorf("the sandbox of container %s was not made by %s", name, nodeapi.RunscName)
	}
	privileges, err := b.privileges()
	if err != nil {
		return err
	}
	response, err := c.ask(ctx, nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{
		Sandbox: sandbox, ContainerID: c.ID, Container: name, Privileges: privileges, Addresses: of.Runsc.Addresses,
	}})
	if err != nil {
		return err
	}
	switch response.Action {
	case nodeapi.ActionOrdinary:
		return c.stepAside()
	case nodeapi.ActionCompleted:
		return c.createCompleted(sandbox, name, of.Runsc.PID)
	case nodeapi.ActionRestore:
		if response.Container == nil {
			return errors.New("the agent answered to restore, and not what")
		}
	default:
		return fmt.Errorf("the agent answered with the action %q, which gVisor has not", response.Action)
	}
	began := time.Now()
	m := marker{Sandbox: sandbox, Container: name, WorkDir: response.Container.WorkDir, Runsc: &runscMarker{}}
	err = c.bringFiles(ctx, b, *response.Container)
	if err == nil {
		err = c.passOn(ctx)
	}
	if err != nil {
		err = fmt.Errorf("restore container %s: %w", name, err)
		c.report(ctx, nodeapi.Report{Sandbox: sandbox, Container: name, Stage: nodeapi.StageFailed, Message: err.Error()})
		return err
	}
	if err := errors.Join(c.newMark(c.ID, m), c.note(c.ID, m, nodeapi.StageCreated)); err != nil {
		return errors.Join(err, c.passOnAs(ctx, "delete", "--force", c.ID)) // nobody could let it go
	}
	c.report(ctx, nodeapi.Report{Sandbox: sandbox, Container: name, Stage: nodeapi.StageCreated, Milliseconds: time.Since(began).Milliseconds()})
	return nil
}

// createCompleted makes an init container that had completed. Its process is the sandbox's,
// as that of every container of gVisor.
func (c runscCall) createCompleted(sandbox nodeapi.Sandbox, name string, pid int) error {
	m := marker{Sandbox: sandbox, Container: name, Runsc: &runscMarker{Completed: true, PID: pid}}
	if err := c.newMark(c.ID, m); err != nil {
		return err
	}
	if err := os.WriteFile(c.PIDFile, []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return errors.Join(fmt.Errorf("tell the process of container %s: %w", name, err), os.RemoveAll(filepath.Join(c.Root, c.ID)))
	}
	return nil
}

// completed answers for an init container that had completed.
func (c runscCall) completed(m marker) error {
	switch c.Command {
	case "start":
		m.Started = true
		return c.mark(c.ID, m)
	case "state":
		status := "created"
		if m.Started {
			status = "stopped"
		}
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"ociVersion": specs.Version, "id": c.ID, "pid": m.Runsc.PID, "status": status, "bundle": c.Bundle})
	case "wait":
		if !m.Started {
			return fmt.Errorf("init container %s has not been started", m.Container)
		}
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"id": c.ID, "exitStatus": 0})
	case "delete":
		if err := os.RemoveAll(filepath.Join(c.Root, c.ID)); err != nil {
			return fmt.Errorf("forget the init container: %w", err)
		}
	}
	return nil // of kill: nothing of it runs
}

// bringFiles puts files of the host where the restored container looks for them.
func (c runscCall) bringFiles(ctx context.Context, b *bundle, from nodeapi.ContainerRestore) error {
	rootfs, _, err := b.rootfs()
	if err != nil {
		return err
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
		if err := published.Copy(source, p.Directory); err != nil {
			return fmt.Errorf("volume at %s: %w", p.Destination, err)
		}
	}
	return nil
}

// start restores a sandbox, or starts a container in one that is being restored.
func (c runscCall) start(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if m == nil || m.Container == "" && m.Runsc.Restore == nil {
		return c.stepAside()
	}
	lock, err := c.lock(m.Sandbox.ID)
	if err != nil {
		return fmt.Errorf("find the sandbox of the restored container: %w", err)
	}
	defer lock.Close()
	if m, err = c.marked(c.ID); err != nil {
		return err
	}
	switch {
	case m == nil:
		return errors.New("the restored container is gone")
	case m.Container != "" && !m.Started:
		return c.startContainer(ctx, *m)
	case m.Container == "" && !m.Runsc.Restored:
		return c.restoreSandbox(ctx, *m)
	}
	return c.stepAside()
}

// restoreSandbox hands the image to the sandbox. It goes on when its containers are started.
func (c runscCall) restoreSandbox(ctx context.Context, m marker) error {
	args := append(slices.Clone(c.Global), "restore", "--detach")
	if m.Runsc.Restore.Background { // all of it has been checked
		args = append(args, "--background")
	}
	cmd := exec.CommandContext(ctx, c.Runtime, append(args, "--image-path", m.Runsc.Restore.ImageDir, c.ID)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if err == nil {
		m.Runsc.Restored = true
		return c.mark(c.ID, m)
	}
	err = c.failed(m, fmt.Errorf("restore the sandbox: %s restore: %w", filepath.Base(c.Runtime), err))
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Stage: nodeapi.StageFailed, Message: err.Error()})
	return err
}

func (c runscCall) startContainer(ctx context.Context, m marker) error {
	sandbox, err := c.marked(m.Sandbox.ID)
	if err != nil {
		return err
	}
	if sandbox == nil || sandbox.Runsc == nil || !sandbox.Runsc.Restored {
		return errors.New("the sandbox of the restored container is not being restored")
	}
	if err := c.note(c.ID, m, nodeapi.StageStarting); err != nil {
		return err
	}
	if err := c.passOn(ctx); err != nil {
		err = c.failed(*sandbox, fmt.Errorf("restore container %s: %w", m.Container, err))
		c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Container: m.Container, Stage: nodeapi.StageFailed, Message: err.Error()})
		return errors.Join(err, c.note(c.ID, m, nodeapi.StageCreated))
	}
	m.Started = true
	if sandbox.Arrived == nil {
		sandbox.Arrived = map[string]string{}
	}
	sandbox.Arrived[m.Container] = c.ID
	if err := errors.Join(c.note(c.ID, m, nodeapi.StageStarted), c.mark(c.ID, m), c.mark(m.Sandbox.ID, *sandbox)); err != nil {
		return err
	}
	c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Container: m.Container, Stage: nodeapi.StageStarted})
	return nil
}

// failed ends a sandbox whose restore has failed: what is left of it answers nobody, and
// whoever stops the Pod would wait for it. The error gets what runsc has said.
func (c runscCall) failed(sandbox marker, err error) error {
	if said := lastError(c.Log); said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	return errors.Join(err, c.end(sandbox))
}

// lastError is the last error in runsc's JSON log.
func lastError(log string) string {
	data, err := os.ReadFile(log)
	if err != nil {
		return ""
	}
	found := ""
	for line := range strings.Lines(string(data)) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &entry) == nil && (entry.Level == "error" || entry.Level == "fatal" || entry.Level == "warning") {
			found = entry.Msg
		}
	}
	return found
}

// end kills a sandbox's process.
func (c runscCall) end(sandbox marker) error {
	pid := sandbox.Runsc.PID
	if start, err := startOf(pid); pid <= 1 || err != nil || start != sandbox.Runsc.PIDStart {
		return nil // it has ended
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end the sandbox: %w", err)
	}
	return nil
}

// events asks a sandbox for its use of resources, which one that is being restored does not
// survive.
func (c runscCall) events() error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if m != nil {
		if m, err = c.marked(m.Sandbox.ID); err != nil {
			return err
		}
		if m.restoring() {
			return errors.New("the Pod is being restored: what it uses is not known before all of its containers have been started")
		}
	}
	return c.stepAside()
}

// kill of what is being restored ends the sandbox: it would not hear of it.
func (c runscCall) kill(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil || m == nil {
		return c.stepAside()
	}
	c.lastLookRunsc(ctx, *m)
	if sandbox, err := c.marked(m.Sandbox.ID); err == nil && sandbox.restoring() {
		if err := c.end(*sandbox); err != nil {
			return err
		}
	}
	return c.stepAside()
}

// delete lets the agent forget a sandbox that is gone.
func (c runscCall) delete(ctx context.Context) error {
	m, err := c.marked(c.ID)
	if err != nil {
		return err
	}
	if m == nil {
		return c.stepAside()
	}
	c.lastLookRunsc(ctx, *m)
	if err := c.passOn(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(c.Root, c.ID)); err != nil {
		return fmt.Errorf("forget the restored container: %w", err)
	}
	if m.Container == "" {
		c.report(ctx, nodeapi.Report{Sandbox: m.Sandbox, Stage: nodeapi.StageDeleted})
	}
	return nil
}

// lastLookRunsc settles whether a container was started before nothing can tell any more.
func (c runscCall) lastLookRunsc(ctx context.Context, m marker) {
	if !m.waiting() {
		return
	}
	if p, err := nodeapi.ReadProgress(m.WorkDir); err == nil && p.Stage != nodeapi.StageStarting {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	if err := c.settleRunsc(ctx, c.Global, m); err != nil {
		logError(c.Log, fmt.Errorf("before the end of restored container %s: %w", m.Container, err))
	}
}

// lookRunsc settles whether a container of gVisor was started whose start was interrupted.
// The root that it is asked with is that of the markers.
func (c call) lookRunsc(ctx context.Context, m marker) error {
	config, err := readConfig(c.executable, "runsc.json", "")
	if err != nil {
		return err
	}
	if c.Runtime, err = exec.LookPath(config.Runtime); err != nil {
		return fmt.Errorf("find runsc: %w", err)
	}
	lock, err := c.lock(m.Sandbox.ID) // which a start that is under way has
	if err != nil {
		return err
	}
	defer lock.Close()
	return runscCall{c}.settleRunsc(ctx, []string{"--root", filepath.Dir(c.Root)}, m)
}

func (c runscCall) settleRunsc(ctx context.Context, global []string, m marker) error {
	p, err := nodeapi.ReadProgress(m.WorkDir)
	if err != nil || p.Stage != nodeapi.StageStarting {
		return err
	}
	out, err := exec.CommandContext(ctx, c.Runtime, slices.Concat(global, []string{"state", p.ContainerID})...).Output()
	if err != nil {
		return fmt.Errorf("find out whether the container was let go: %s state: %w", filepath.Base(c.Runtime), err)
	}
	var state struct{ Status string }
	if err := json.Unmarshal(out, &state); err != nil {
		return fmt.Errorf("find out whether the container was let go: %w", err)
	}
	switch state.Status {
	case "created", "creating":
		p.Stage = nodeapi.StageCreated
	case "running", "paused", "stopped":
		p.Stage = nodeapi.StageStarted
	default:
		return fmt.Errorf("find out whether the container was let go: it is %q", state.Status)
	}
	return nodeapi.WriteProgress(m.WorkDir, p)
}

// thawGVisor is the guard's part of gVisor.
func thawGVisor(ctx context.Context, host *hostns.Host, runDir string, log *slog.Logger) error {
	return pausing.New(host, runDir, log).ThawLeftovers(ctx)
}
