package criu

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/layer"
)

// thawTimeout bounds the thaw, which does not end with the operation's context:
// it is what makes up for that context's end.
const thawTimeout = 30 * time.Second

// Layout of a checkpoint directory; docs/format.md describes it.
const (
	containersDir = "containers"
	imagesDir     = "criu"
	rootfsArchive = "rootfs.tar"
	specFile      = "config.json"
	volumesDir    = "volumes"
)

// target is a container on its way into a checkpoint, with what was found out
// about it before the freeze.
type target struct {
	engine.Container
	upperDir string // of the root overlay, on the host
	dir      string // below the checkpoint directory
	workDir  string // for CRIU's log
}

// Checkpoint implements engine.Engine.
func (e *Engine) Checkpoint(ctx context.Context, s engine.Sandbox, dir string, options map[string]string) (*checkpoint.Manifest, error) {
	if err := e.CheckOptions(options); err != nil {
		return nil, err
	}
	clock := phases{last: time.Now()}
	m, targets, volumes, err := e.prepare(ctx, s, dir)
	if err != nil {
		return nil, err
	}
	defer e.removeWork(s.ID)
	clock.end("prepare")

	if err := e.capture(ctx, s.ID, dir, targets, volumes, m, &clock); err != nil {
		return nil, err
	}
	m.Phases = clock.done
	return m, nil
}

// prepare does everything that can be done while the Pod runs.
func (e *Engine) prepare(ctx context.Context, s engine.Sandbox, dir string) (*checkpoint.Manifest, []target, []volume, error) {
	program, err := e.Identify(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	here, err := platform()
	if err != nil {
		return nil, nil, nil, err
	}
	ociRuntime, err := e.identifyRuntime(ctx, s.Containers[0].Runtime)
	if err != nil {
		return nil, nil, nil, err
	}
	m := &checkpoint.Manifest{
		Engine: program, Runtime: ociRuntime, Platform: here,
		Sandbox: checkpoint.Sandbox{ID: s.ID, Namespace: s.Namespace, Name: s.Name, UID: s.UID, IPs: s.IPs},
	}
	var targets []target
	for _, c := range s.Containers {
		if err := inspect(c); err != nil {
			return nil, nil, nil, err
		}
		upper, err := overlayUpper(c.PID)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("container %s: %w", c.Name, err)
		}
		t := target{
			Container: c, upperDir: upper,
			dir:     filepath.Join(dir, containersDir, c.Name),
			workDir: filepath.Join(e.workDir, s.ID, c.Name),
		}
		targets = append(targets, t)
		m.Containers = append(m.Containers, describe(c))
	}
	volumes := volumesOf(s.Containers)
	for _, v := range volumes {
		m.Volumes = append(m.Volumes, checkpoint.Volume{Name: v.name, Archive: v.archive(), Mounts: v.mounts})
	}
	err = e.host.Do(func() error {
		for _, t := range targets {
			if err := errors.Join(os.MkdirAll(filepath.Join(t.dir, imagesDir), 0o700), os.MkdirAll(t.workDir, 0o700)); err != nil {
				return err
			}
			if err := writeSpec(filepath.Join(t.dir, specFile), t.Spec); err != nil {
				return err
			}
		}
		if len(volumes) == 0 {
			return nil
		}
		return os.Mkdir(filepath.Join(dir, volumesDir), 0o700)
	})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("lay out the checkpoint directory: %w", err)
	}
	return m, targets, volumes, nil
}

// capture is the freeze window: freeze all, capture all, thaw all.
func (e *Engine) capture(ctx context.Context, sandboxID, dir string, targets []target, volumes []volume, m *checkpoint.Manifest, clock *phases) (err error) {
	entry := frozen{SandboxID: sandboxID, Freeze: rand.Text()}
	err = e.host.Do(func() error {
		for _, t := range targets {
			entry.Containers = append(entry.Containers, frozenContainer{ID: t.ID, Runtime: t.Runtime})
			quotas, err := quotasOf(t.PID)
			if err != nil {
				return err
			}
			for _, q := range quotas {
				if !slices.Contains(entry.Quotas, q) {
					entry.Quotas = append(entry.Quotas, q)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read CPU limits: %w", err)
	}
	if err := e.journal.write(entry); err != nil {
		return err
	}
	began := time.Now()
	defer func() {
		thawCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawTimeout)
		defer cancel()
		if err != nil {
			err = errors.Join(err, endCapture(thawCtx, sandboxID))
		}
		err = errors.Join(err, e.thaw(thawCtx, entry))
		m.FreezeDuration = time.Since(began)
		clock.end("thaw")
	}()

	if err := e.freeze(ctx, entry, targets); err != nil {
		return err
	}
	m.CutTime = time.Now().UTC()
	clock.end("freeze")
	if err := e.captureFrozen(ctx, sandboxID, dir, targets, volumes); err != nil {
		return err
	}
	clock.end("capture")
	return nil
}

// freeze stops every container by its own cgroup. Not by the Pod's: CRIU looks
// at the container's freezer only.
func (e *Engine) freeze(ctx context.Context, entry frozen, targets []target) error {
	err := e.host.Do(func() error {
		var errs []error
		for _, q := range entry.Quotas {
			errs = append(errs, q.lift())
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("lift CPU limits for the freeze window: %w", err)
	}
	return each(targets, func(t target) error {
		if _, err := e.runtimeCapturing(ctx, entry.SandboxID, t.Runtime, "pause", t.ID); err != nil {
			return fmt.Errorf("freeze container %s: %w", t.Name, err)
		}
		return nil
	})
}

// captureFrozen captures all containers and volumes at the same time.
func (e *Engine) captureFrozen(ctx context.Context, sandboxID, dir string, targets []target, volumes []volume) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var jobs []func() error
	for _, t := range targets {
		jobs = append(jobs,
			func() error { return e.dump(ctx, sandboxID, t) },
			func() error {
				return e.archive(ctx, t.upperDir, filepath.Join(t.dir, rootfsArchive))
			})
	}
	for _, v := range volumes {
		jobs = append(jobs, func() error {
			return e.archive(ctx, v.source, filepath.Join(dir, filepath.FromSlash(v.archive())))
		})
	}
	return each(jobs, func(job func() error) error {
		err := job()
		if err != nil {
			cancel(fmt.Errorf("given up because another part failed: %w", err))
		}
		return err
	})
}

// dump lets CRIU write a frozen container's processes.
func (e *Engine) dump(ctx context.Context, sandboxID string, t target) error {
	// Connections that nobody has accepted yet (a probe's that came while the
	// container was frozen) are left out: CRIU cannot capture them, and their other
	// ends are connected to the source, which goes on. runc knows the flag since 1.3.
	out, err := e.runtimeCapturing(ctx, sandboxID, t.Runtime, "checkpoint",
		"--leave-running", "--tcp-established", "--tcp-skip-in-flight", "--file-locks",
		"--image-path", filepath.Join(t.dir, imagesDir),
		"--work-path", t.workDir,
		t.ID)
	if err == nil {
		return nil
	}
	var reason string
	e.host.Do(func() error {
		reason = lastErrors(filepath.Join(t.workDir, "dump.log"))
		return nil
	})
	if ctx.Err() != nil || reason == "" {
		return fmt.Errorf("capture the processes of container %s: %w", t.Name, err)
	}
	// The runtime's own message quotes the same log at length.
	e.log.WarnContext(ctx, "CRIU failed", "container", t.ID, "runtime", out.Stderr)
	return fmt.Errorf("capture the processes of container %s: CRIU failed: %s", t.Name, reason)
}

// archive writes a directory of the host as a tar into a file of the host.
func (e *Engine) archive(ctx context.Context, from, to string) error {
	return e.host.Do(func() error {
		f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return errors.Join(layer.Write(ctx, f, from), f.Close())
	})
}

// thaw undoes a freeze, as far as it was done, and closes its journal entry. An
// entry that could not be undone stays, for the next start of the agent.
func (e *Engine) thaw(ctx context.Context, entry frozen) error {
	err := each(entry.Containers, func(c frozenContainer) error {
		return e.resume(ctx, c)
	})
	quotaErr := e.host.Do(func() error {
		var errs []error
		for _, q := range entry.Quotas {
			errs = append(errs, q.putBack())
		}
		return errors.Join(errs...)
	})
	if err := errors.Join(err, quotaErr); err != nil {
		return fmt.Errorf("thaw sandbox %s: %w", entry.SandboxID, err)
	}
	return e.journal.remove(entry.SandboxID)
}

// resume lets a container run, if it is there and paused.
func (e *Engine) resume(ctx context.Context, c frozenContainer) error {
	_, err := e.runtime(ctx, c.Runtime, "resume", c.ID)
	if err == nil {
		return nil
	}
	// The runtime refuses to resume what is not paused, or not there. Both are
	// what is wanted; ask which it is rather than read its error message.
	state, stateErr := e.state(ctx, c)
	if stateErr == nil && state != "paused" || errors.Is(stateErr, errNoContainer) {
		return nil
	}
	return fmt.Errorf("resume container %s: %w", c.ID, err)
}

func (e *Engine) removeWork(sandboxID string) {
	err := e.host.Do(func() error { return os.RemoveAll(filepath.Join(e.workDir, sandboxID)) })
	if err != nil {
		e.log.Warn("cannot remove the engine's log files", "sandbox", sandboxID, "err", err)
	}
}

// overlayUpper returns the writable layer of a process' root file system.
func overlayUpper(pid int) (string, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/mountinfo")
	if err != nil {
		return "", fmt.Errorf("read its mounts: %w", err)
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return "", fmt.Errorf("read its mounts: %w", err)
	}
	var root *mountinfo.Info
	for _, m := range mounts {
		if m.Mountpoint == "/" {
			root = m // the last one is on top
		}
	}
	switch {
	case root == nil:
		return "", errors.New("it has no root mount")
	case root.FSType != "overlay":
		return "", fmt.Errorf("%w: its root file system is %s; only containerd's overlayfs snapshotter is supported", engine.ErrUnsupported, root.FSType)
	}
	for option := range strings.SplitSeq(root.VFSOptions, ",") {
		if upper, ok := strings.CutPrefix(option, "upperdir="); ok {
			return upper, nil
		}
	}
	return "", fmt.Errorf("%w: its root overlay has no writable layer", engine.ErrUnsupported)
}

// volume is a directory that containers of the Pod share and that belongs to it.
type volume struct {
	name, source string
	mounts       []checkpoint.VolumeMount
}

func (v volume) archive() string { return volumesDir + "/" + v.name + ".tar" }

// volumesOf finds the emptyDir volumes and the sandbox's /dev/shm among the
// containers' mounts. What else is mounted belongs to the restored Pod.
func volumesOf(containers []engine.Container) []volume {
	var volumes []volume
	for _, c := range containers {
		for _, m := range c.Spec.Mounts {
			name := volumeName(m)
			if name == "" {
				continue
			}
			i := slices.IndexFunc(volumes, func(v volume) bool { return v.source == m.Source })
			if i < 0 {
				i = len(volumes)
				volumes = append(volumes, volume{name: name, source: m.Source})
			}
			volumes[i].mounts = append(volumes[i].mounts, checkpoint.VolumeMount{Container: c.Name, Destination: m.Destination})
		}
	}
	return volumes
}

// volumeName names a mount's volume; empty if it is none that belongs to the Pod.
// The kubelet keeps emptyDirs in DIR/pods/UID/volumes/kubernetes.io~empty-dir/NAME.
func volumeName(m specs.Mount) string {
	if m.Type != "bind" {
		return ""
	}
	if filepath.Base(filepath.Dir(m.Source)) == "kubernetes.io~empty-dir" {
		return "emptydir-" + filepath.Base(m.Source)
	}
	if m.Destination == "/dev/shm" {
		return "dev-shm"
	}
	return ""
}

func describe(c engine.Container) checkpoint.Container {
	d := checkpoint.Container{
		Name: c.Name, ID: c.ID, Image: c.Image, ImageID: c.ImageID,
		Rootfs: containersDir + "/" + c.Name + "/" + rootfsArchive,
	}
	if p := c.Spec.Process; p != nil {
		d.Process = checkpoint.Process{Args: p.Args, Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Terminal: p.Terminal}
	}
	return d
}

// each runs fn for all items at once and joins their errors.
func each[T any](items []T, fn func(T) error) error {
	errs := make([]error, len(items))
	var wg sync.WaitGroup
	for i, item := range items {
		wg.Go(func() { errs[i] = fn(item) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// phases measures one phase after the other.
type phases struct {
	last time.Time
	done []checkpoint.Phase
}

func (p *phases) end(name string) {
	now := time.Now()
	p.done = append(p.done, checkpoint.Phase{Name: name, Duration: now.Sub(p.last)})
	p.last = now
}

// lastErrors returns the last few error lines of a CRIU log, without their time
// stamps and without those that mean nothing; empty when there are none.
func lastErrors(log string) string {
	data, err := os.ReadFile(log)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(data)) {
		i := strings.Index(line, "Error (")
		if i < 0 || strings.Contains(line, "Can't setup RLIMIT_NOFILE for self") || strings.Contains(line, "Dumping FAILED") {
			continue
		}
		lines = append(lines, strings.TrimSpace(line[i:]))
	}
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}
