// Package cluster brings a cluster up, takes it down, and works on a running one.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/devcluster/internal/cgroup"
	"podstasis.dev/stasis/test/devcluster/internal/cri"
	"podstasis.dev/stasis/test/devcluster/internal/kube"
	"podstasis.dev/stasis/test/devcluster/internal/node"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

// Hidden commands by which the running program is started again; see package cli.
const (
	SuperviseCommand = "internal-supervise"
	ExecCommand      = "internal-exec"
)

// Running is a cluster that was brought up.
type Running struct {
	plan.Cluster
}

// Open returns the cluster whose state is in dir, an absolute path.
func Open(dir string) (Running, error) {
	c, err := plan.Load(dir)
	return Running{c}, err
}

// lockState keeps other commands that change the cluster out until the returned function is called.
func lockState(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	// The directory itself is locked, so that no lock file is left behind.
	file, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("locking the state directory: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another devcluster up or down works on %s: wait for it", dir)
		}
		return nil, fmt.Errorf("locking the state directory: %w", err)
	}
	return func() { file.Close() }, nil
}

func (r Running) client(place string) supervise.Client {
	return supervise.Client{Socket: r.Socket(place)}
}

// place checks the name of a node or of the control plane.
func (r Running) place(name string) error {
	if slices.Contains(r.Places(), name) {
		return nil
	}
	return fmt.Errorf("no node %q; there are: %s", name, strings.Join(r.Places(), ", "))
}

// Kill ends a component by SIGKILL.
func (r Running) Kill(ctx context.Context, place, component string, down bool) error {
	if err := r.place(place); err != nil {
		return err
	}
	return named(place, r.client(place).Kill(ctx, component, down))
}

// Start starts a component that is down.
func (r Running) Start(ctx context.Context, place, component string) error {
	if err := r.place(place); err != nil {
		return err
	}
	return named(place, r.client(place).StartKnown(ctx, component))
}

// Stop ends a component in good order; it stays down.
func (r Running) Stop(ctx context.Context, place, component string) error {
	if err := r.place(place); err != nil {
		return err
	}
	return named(place, r.client(place).Stop(ctx, component, 30*time.Second))
}

func named(place string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, supervise.ErrNotRunning) {
		return fmt.Errorf("%s: %w: devcluster up starts it again", place, err)
	}
	return fmt.Errorf("%s: %w", place, err)
}

// PlaceStatus is the state of one place's components, or why it is not known.
type PlaceStatus struct {
	Place      string             `json:"place"`
	Address    string             `json:"address"`
	Components []supervise.Status `json:"components,omitempty"`
	Error      string             `json:"error,omitempty"`
	// RuntimeSocket is the container runtime's socket as the machine sees it.
	RuntimeSocket string `json:"runtimeSocket,omitempty"`
}

// Status asks all supervisors.
func (r Running) Status(ctx context.Context) []PlaceStatus {
	var out []PlaceStatus
	for _, place := range r.Places() {
		status := PlaceStatus{Place: place, Address: r.APIServer().String()}
		if i, ok := plan.NodeNumber(place); ok {
			status.Address = r.NodeAddress(i).String()
		}
		components, err := r.client(place).Status(ctx)
		if err != nil {
			status.Error = named(place, err).Error()
		}
		status.Components = components
		for _, c := range components {
			if c.Name == "containerd" && c.PID != 0 {
				status.RuntimeSocket = cri.Socket(c.PID, kube.ContainerdSocket)
			}
		}
		out = append(out, status)
	}
	return out
}

// Exec replaces this process by a command in the place. It only returns an error.
func (r Running) Exec(place string, command []string) error {
	if err := r.place(place); err != nil {
		return err
	}
	groups, err := cgroup.Find()
	if err != nil {
		return err
	}
	// What is left of the command when the cluster goes down goes with it.
	if err := groups.Join(r.SystemCgroup(place), 0); err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	if err := node.Enter(r.NamespaceDir(), place); err != nil {
		return err
	}
	for _, setting := range kube.Environment {
		name, value, _ := strings.Cut(setting, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	program, err := exec.LookPath(command[0])
	if err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	if err := unix.Exec(program, command, os.Environ()); err != nil {
		return fmt.Errorf("%s: starting %s: %w", place, program, err)
	}
	return nil
}

// Load imports an image archive (OCI layout or docker save) into nodes, all when none are named.
func (r Running) Load(ctx context.Context, archive string, nodes []string) error {
	if len(nodes) == 0 {
		nodes = r.NodeNames()
	}
	for _, name := range nodes {
		if err := r.place(name); err != nil {
			return err
		}
		if err := r.loadInto(ctx, name, archive); err != nil {
			return err
		}
	}
	return nil
}

func (r Running) loadInto(ctx context.Context, name, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("loading an image: %w", err)
	}
	defer file.Close()
	output, err := r.command(ctx, name, file, "ctr", "-n", "k8s.io", "images", "import", "--local", "-")
	if err != nil {
		return fmt.Errorf("%s: loading %s: %w: %s", name, archive, err, lastLines(output, 3))
	}
	return nil
}

// command runs a command in the place and returns what it printed.
func (r Running) command(ctx context.Context, place string, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{ExecCommand, "--state", r.Dir, place, "--"}, args...)...)
	cmd.Stdin = stdin
	output, err := cmd.CombinedOutput()
	return string(output), err
}

// Supervise is the body of the process that keeps a place's programs running.
func (r Running) Supervise(ctx context.Context, place string, supervisor func() (*supervise.Supervisor, error)) error {
	groups, err := cgroup.Find()
	if err != nil {
		return err
	}
	if err := groups.Join(r.SystemCgroup(place), 0); err != nil {
		return err
	}
	s, err := supervisor()
	if err != nil {
		return err
	}
	return s.Serve(ctx, r.Socket(place))
}

// Tail returns the last lines of a component's log.
func (r Running) Tail(place, component string, lines int) string {
	const most = 64 << 10
	file, err := os.Open(r.LogFile(place, component))
	if err != nil {
		return ""
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.Size() > most {
		if _, err := file.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(io.LimitReader(file, most))
	if err != nil {
		return ""
	}
	return lastLines(string(text), lines)
}

func lastLines(text string, n int) string {
	lines := bytes.Split(bytes.TrimSpace([]byte(text)), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-n):], []byte("\n")))
}

// Logs returns the names of the logs that there are, as "place component".
func Logs(dir string) []string {
	files, _ := filepath.Glob(filepath.Join(dir, "log", "*.log"))
	var names []string
	for _, file := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(file), ".log"))
	}
	return names
}
