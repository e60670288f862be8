package freeze

import (
	"context"
	"encoding/json"
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

// runc runs containers by the OCI runtime alone, on a file system in memory. What it
// takes to checkpoint and restore there is the floor: nothing but CRIU.
type runc struct {
	program string // runc
	criu    string // the directory that CRIU is in
	ballast string // the program
	dir     string // on a file system in memory
	count   int    // of containers so far
}

type runcContainer struct {
	id, bundle string
	process    app.Process
}

type runcSubject struct {
	runc       *runc
	containers []runcContainer
}

func (r *runc) start(ctx context.Context, s Shape) (subject, error) {
	from := &runcSubject{runc: r}
	for range s.Containers {
		r.count++
		c := runcContainer{id: "bench-" + strconv.Itoa(r.count)}
		c.bundle = filepath.Join(r.dir, c.id)
		if err := r.bundle(ctx, c.bundle, strconv.Itoa(s.MiB)); err != nil {
			return nil, err
		}
		if _, err := r.do(ctx, "run", "--detach", "--bundle", c.bundle, c.id); err != nil {
			return nil, errors.Join(err, from.end(context.WithoutCancel(ctx)))
		}
		from.containers = append(from.containers, c)
	}
	return from, from.find(ctx)
}

// bundle makes a container's directory.
func (r *runc) bundle(ctx context.Context, dir, mib string) error {
	bin := filepath.Join(dir, "rootfs/bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	program, err := os.ReadFile(r.ballast)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bin, "ballast"), program, 0o755); err != nil {
		return err
	}
	if _, err := r.do(ctx, "spec", "--bundle", dir); err != nil {
		return err
	}
	return edit(filepath.Join(dir, "config.json"), func(spec map[string]any) {
		process := spec["process"].(map[string]any)
		process["terminal"] = false
		process["args"] = []string{"/bin/ballast", mib}
		spec["root"].(map[string]any)["readonly"] = false
	})
}

// edit changes a file of JSON.
func edit(name string, change func(map[string]any)) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	content := map[string]any{}
	if err := json.Unmarshal(data, &content); err != nil {
		return err
	}
	change(content)
	if data, err = json.Marshal(content); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}

func (r *runc) do(ctx context.Context, args ...string) (string, error) {
	log := filepath.Join(r.dir, "log")
	cmd := exec.CommandContext(ctx, r.program, append([]string{"--root", filepath.Join(r.dir, "state"), "--log", log}, args...)...)
	cmd.Env = withCRIU(r.criu)
	var out strings.Builder
	if args[0] == "state" { // else its output is the container's, which has none
		cmd.Stdout = &out
	}
	err := cmd.Run()
	if err != nil {
		said, _ := os.ReadFile(log)
		err = fmt.Errorf("runc %s: %w: %s", strings.Join(args, " "), err, said)
	}
	return out.String(), errors.Join(err, os.RemoveAll(log))
}

// withCRIU is an environment in which runc finds CRIU.
func withCRIU(dir string) []string {
	return append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
}

func (s *runcSubject) find(ctx context.Context) error {
	for i := range s.containers {
		c := &s.containers[i]
		out, err := s.runc.do(ctx, "state", c.id)
		if err != nil {
			return err
		}
		var state struct{ PID int }
		if err := json.Unmarshal([]byte(out), &state); err != nil {
			return fmt.Errorf("runc state %s: %w", c.id, err)
		}
		c.process.PID = state.PID
	}
	return nil
}

func (s *runcSubject) processes() []app.Process {
	var all []app.Process
	for _, c := range s.containers {
		all = append(all, c.process)
	}
	return all
}

func (s *runcSubject) end(ctx context.Context) error {
	var errs []error
	for _, c := range s.containers {
		_, err := s.runc.do(ctx, "delete", "--force", c.id)
		errs = append(errs, err, os.RemoveAll(c.bundle))
	}
	return errors.Join(errs...)
}

// runcTaken are images of several containers, in a directory each.
type runcTaken struct {
	from *runcSubject
	dir  string
	size int64
}

func (t *runcTaken) bytes() int64                 { return t.size }
func (t *runcTaken) reported() time.Duration      { return 0 }
func (t *runcTaken) remove(context.Context) error { return os.RemoveAll(t.dir) }

// checkpoint captures one container after the other, so that each has the machine to
// itself.
func (r *runc) checkpoint(ctx context.Context, from subject) (taken, error) {
	t := &runcTaken{from: from.(*runcSubject)}
	var err error
	if t.dir, err = os.MkdirTemp(r.dir, "images."); err != nil {
		return nil, err
	}
	for _, c := range t.from.containers {
		images := filepath.Join(t.dir, c.id)
		if _, err := r.do(ctx, "checkpoint", "--leave-running", "--image-path", images, "--work-path", images, c.id); err != nil {
			return nil, errors.Join(err, os.RemoveAll(t.dir))
		}
	}
	t.size, err = bytesBelow(t.dir)
	return t, err
}

func (r *runc) restore(ctx context.Context, from taken) (restored, error) {
	t := from.(*runcTaken)
	to := &runcSubject{runc: r}
	for range t.from.containers {
		r.count++
		n := runcContainer{id: "bench-" + strconv.Itoa(r.count)}
		n.bundle = filepath.Join(r.dir, n.id)
		if err := r.bundle(ctx, n.bundle, "1"); err != nil { // what it was started with is in the images
			return restored{}, err
		}
		to.containers = append(to.containers, n)
	}
	got := restored{subject: to, asked: time.Now()}
	got.created = got.asked
	for i, n := range to.containers {
		images := filepath.Join(t.dir, t.from.containers[i].id)
		if _, err := r.do(ctx, "restore", "--detach", "--bundle", n.bundle, "--image-path", images, "--work-path", n.bundle, n.id); err != nil {
			log, _ := os.ReadFile(filepath.Join(n.bundle, "restore.log"))
			return restored{}, errors.Join(fmt.Errorf("%w: %s", err, log[max(0, len(log)-1000):]), to.end(context.WithoutCancel(ctx)))
		}
	}
	return got, to.find(ctx)
}

// bytesBelow are the sizes of all files below a directory.
func bytesBelow(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += info.Size()
		}
		return err
	})
	return sum, err
}
