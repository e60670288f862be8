package freeze

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"podstasis.dev/stasis/test/bench/app"
)

// podman runs containers by Debian's podman, with all of its state on a file system in
// memory, and the same runc and CRIU as the others.
type podman struct {
	runc, criu string
	archive    string // the image
	dir        string // on a file system in memory
	count      int
	loaded     bool
}

type podmanSubject struct {
	podman *podman
	names  []string
	found  []app.Process
}

const podmanImage = "localhost/stasis-ballast:dev"

func (p *podman) do(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "podman", append([]string{
		"--root", filepath.Join(p.dir, "root"), "--runroot", filepath.Join(p.dir, "run"), "--tmpdir", filepath.Join(p.dir, "tmp"),
		"--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--runtime", p.runc,
	}, args...)...)
	cmd.Env = withCRIU(p.criu)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("podman %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

func (p *podman) start(ctx context.Context, s Shape) (subject, error) {
	if !p.loaded {
		if _, err := p.do(ctx, "load", "--input", p.archive); err != nil {
			return nil, err
		}
		p.loaded = true
	}
	from := &podmanSubject{podman: p}
	for range s.Containers {
		p.count++
		name := "bench-" + strconv.Itoa(p.count)
		// By default podman asks for limits that root may not have on a machine
		// without CAP_SYS_RESOURCE.
		if _, err := p.do(ctx, "run", "--detach", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096",
			"--name", name, podmanImage, strconv.Itoa(s.MiB)); err != nil {
			return nil, errors.Join(err, from.end(context.WithoutCancel(ctx)))
		}
		from.names = append(from.names, name)
	}
	return from, from.find(ctx)
}

func (s *podmanSubject) find(ctx context.Context) error {
	s.found = nil
	for _, name := range s.names {
		out, err := s.podman.do(ctx, "inspect", "--format", "{{.State.Pid}}", name)
		if err != nil {
			return err
		}
		pid, err := strconv.Atoi(out)
		if err != nil || pid == 0 {
			return fmt.Errorf("podman inspect %s: its process is %q", name, out)
		}
		s.found = append(s.found, app.Process{PID: pid})
	}
	return nil
}

func (s *podmanSubject) processes() []app.Process { return s.found }

// end stops the containers. They are removed with the checkpoint, which podman keeps
// inside of them.
func (s *podmanSubject) end(ctx context.Context) error {
	if len(s.names) == 0 {
		return nil
	}
	_, err := s.podman.do(ctx, append([]string{"stop", "--time", "0"}, s.names...)...)
	return err
}

type podmanTaken struct {
	from *podmanSubject
	size int64
}

func (t *podmanTaken) bytes() int64            { return t.size }
func (t *podmanTaken) reported() time.Duration { return 0 }

func (t *podmanTaken) remove(ctx context.Context) error {
	_, err := t.from.podman.do(ctx, append([]string{"rm", "--force", "--time", "0"}, t.from.names...)...)
	return err
}

// checkpoint leaves the images in podman's own directory, without an archive: the
// quickest that it can.
func (p *podman) checkpoint(ctx context.Context, from subject) (taken, error) {
	t := &podmanTaken{from: from.(*podmanSubject)}
	if _, err := p.do(ctx, append([]string{"container", "checkpoint", "--leave-running"}, t.from.names...)...); err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(filepath.Join(p.dir, "root/overlay-containers/*/userdata/checkpoint"))
	if err == nil && len(dirs) < len(t.from.names) {
		err = fmt.Errorf("podman left %d checkpoints for %s", len(dirs), strings.Join(t.from.names, ", "))
	}
	for _, dir := range dirs {
		size, sizeErr := bytesBelow(dir)
		t.size, err = t.size+size, errors.Join(err, sizeErr)
	}
	return t, err
}

func (p *podman) restore(ctx context.Context, from taken) (restored, error) {
	t := from.(*podmanTaken)
	got := restored{subject: t.from, asked: time.Now()}
	got.created = got.asked
	if _, err := p.do(ctx, append([]string{"container", "restore"}, t.from.names...)...); err != nil {
		return restored{}, err
	}
	return got, t.from.find(ctx)
}

// close removes what podman leaves mounted.
func (p *podman) close(ctx context.Context) error {
	if !p.loaded {
		return nil
	}
	_, err := p.do(ctx, "rm", "--all", "--force", "--time", "0")
	_, resetErr := p.do(ctx, "rmi", "--all", "--force")
	// Its cgroups stay, empty. Whoever else runs podman here has them in use.
	for _, name := range []string{"conmon", ""} {
		dirs, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup/*/libpod_parent", name))
		for _, dir := range dirs {
			_ = os.Remove(dir)
		}
	}
	return errors.Join(err, resetErr, unmountBelow(p.dir))
}

// unmountBelow takes away the mounts below a directory.
func unmountBelow(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			errs = append(errs, unmount(fields[4]))
		}
	}
	return errors.Join(errs...)
}
