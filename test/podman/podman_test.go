// Package podman tests stasis-runtime as what conmon starts: the program that stands between
// Podman or CRI-O and their OCI runtime. CRI-O needs a machine of its own and is not tested;
// Podman starts the same conmon.
//
//	make test-podman
package podman

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	image = "localhost/busybox:1"
	name  = "subject"
)

// podman runs containers by Debian's podman with one OCI runtime. All of its state is in a
// directory of the test's.
type podman struct {
	*testing.T
	dir, runtime string
}

// outcome is what a command of podman's printed, and how it ended.
type outcome struct {
	Out, Err string
	Code     int
}

func (p *podman) do(args ...string) outcome {
	p.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "podman", append([]string{
		"--root", filepath.Join(p.dir, "root"), "--runroot", filepath.Join(p.dir, "run"), "--tmpdir", filepath.Join(p.dir, "tmp"),
		"--storage-driver", "vfs", "--events-backend", "file", "--cgroup-manager", "cgroupfs", "--runtime", p.runtime,
	}, args...)...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err := cmd.Run()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) || ctx.Err() != nil {
		p.Fatalf("podman %s: %v: %s (is it there? apt-get install --no-install-recommends podman)", strings.Join(args, " "), err, complaint.String())
	}
	return outcome{out.String(), complaint.String(), cmd.ProcessState.ExitCode()}
}

// run is podman run of a shell script. By default podman asks for limits that root may not
// have on a machine without CAP_SYS_RESOURCE.
func (p *podman) run(flags []string, script string) outcome {
	p.Helper()
	return p.do(append(append([]string{"run", "--name", name, "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"}, flags...),
		image, "/bin/sh", "-c", script)...)
}

func newPodman(t *testing.T, runtime string) *podman {
	t.Helper()
	// Podman takes no path of more than 50 bytes for the one, and mounts the other upon itself.
	dir, err := os.MkdirTemp("/var/tmp", "podman-")
	must(t, err)
	p := &podman{t, dir, runtime}
	t.Cleanup(func() {
		p.do("rm", "--all", "--force", "--time", "0")
		if out, err := exec.Command("sh", "-c", `grep -o " `+p.dir+`[^ ]*" /proc/self/mountinfo | sort -ru | xargs -r umount -l`).CombinedOutput(); err != nil {
			t.Errorf("unmounting what podman has left: %v: %s", err, out)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		// Its control groups stay, empty. Whoever else runs podman here has them in use.
		for _, group := range []string{"libpod_parent/conmon", "libpod_parent"} {
			dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + group)
			for _, dir := range dirs {
				_ = os.Remove(dir)
			}
		}
	})
	if got := p.do("load", "--input", built(t).busybox()); got.Code != 0 {
		t.Fatalf("podman load: %+v", got)
	}
	return p
}

// programs are what the development cluster is made of.
type programs struct {
	Runtime string
	Images  []string
}

func (b programs) busybox() string {
	for _, file := range b.Images {
		if filepath.Base(file) == "busybox.tar" {
			return file
		}
	}
	return ""
}

func built(t *testing.T) (b programs) {
	t.Helper()
	out, err := exec.Command("../../bin/devcluster", "build", "-o", "json").Output()
	if err != nil {
		t.Fatalf("devcluster build: %v: run make test-podman", err)
	}
	if err := json.Unmarshal(out, &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// installed makes a directory as the agent installs it on a node, for the given runc; the
// agent itself is away.
func installed(t *testing.T, runc string) (runtime string) {
	t.Helper()
	dir := t.TempDir()
	for _, program := range []string{"stasis-runtime", "stasis-restore"} {
		data, err := os.ReadFile("../../dist/bin/" + program)
		if err != nil {
			t.Fatalf("%v: run make test-podman", err)
		}
		must(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "bin", program), data, 0o755))
	}
	must(t, os.MkdirAll(filepath.Join(dir, "etc"), 0o755))
	config, err := json.Marshal(map[string]string{"runtime": runc, "socket": filepath.Join(dir, "run/agent.sock")})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "etc/runtime.json"), config, 0o644))
	return filepath.Join(dir, "bin/stasis-runtime")
}

// TestAContainerThatConmonStartsRunsAsUnderRunc does the same under both runtimes and wants
// the same to come of it.
func TestAContainerThatConmonStartsRunsAsUnderRunc(t *testing.T) {
	runc := filepath.Join(built(t).Runtime, "runc")
	plain, ours := newPodman(t, runc), newPodman(t, installed(t, runc))
	const stays = `trap 'echo bye; exit 3' TERM; echo up; while :; do usleep 50000; done`
	remove := func(p *podman) outcome { return p.do("rm", "--force", "--time", "0", name) }
	for _, step := range []struct {
		what string
		do   func(p *podman) outcome
		want outcome
	}{
		{"output and exit code", func(p *podman) outcome { return p.run(nil, `echo out; echo err >&2; exit 7`) }, outcome{"out\n", "err\n", 7}},
		{"what it has printed", func(p *podman) outcome { return p.do("logs", name) }, outcome{"out\n", "err\n", 0}},
		{"the end that is recorded", func(p *podman) outcome {
			return p.do("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name)
		}, outcome{"exited 7\n", "", 0}},
		{"a second start", func(p *podman) outcome { return p.do("start", "--attach", name) }, outcome{"out\n", "err\n", 7}},
		{"its removal", remove, outcome{name + "\n", "", 0}},
		{"a terminal", func(p *podman) outcome { return p.run([]string{"--tty", "--rm"}, `tty; exit 4`) }, outcome{"/dev/pts/0\r\n", "", 4}},
		{"a program that is not there", func(p *podman) outcome {
			got := p.do("run", "--rm", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", image, "/not/there")
			return outcome{got.Out, fmt.Sprint(strings.Contains(got.Err, "/not/there")), got.Code}
		}, outcome{"", "true", 127}},
		{"a start in the background", func(p *podman) outcome { got := p.run([]string{"--detach"}, stays); got.Out = ""; return got }, outcome{"", "", 0}},
		{"an exec", func(p *podman) outcome { return p.do("exec", name, "/bin/sh", "-c", "echo in; echo no >&2; exit 5") }, outcome{"in\n", "no\n", 5}},
		{"an exec with another user", func(p *podman) outcome { return p.do("exec", "--user", "7", name, "/bin/sh", "-c", "id -u") }, outcome{"7\n", "", 0}},
		{"statistics", func(p *podman) outcome { return p.do("stats", "--no-stream", "--format", "{{.Name}}", name) }, outcome{name + "\n", "", 0}},
		{"a pause", func(p *podman) outcome { return p.do("pause", name) }, outcome{name + "\n", "", 0}},
		{"its state then", func(p *podman) outcome { return p.do("inspect", "--format", "{{.State.Status}}", name) }, outcome{"paused\n", "", 0}},
		{"its end", func(p *podman) outcome { return p.do("unpause", name) }, outcome{name + "\n", "", 0}},
		{"a signal", func(p *podman) outcome { return p.do("kill", "--signal", "TERM", name) }, outcome{name + "\n", "", 0}},
		{"the exit code after it", func(p *podman) outcome { return p.do("wait", name) }, outcome{"3\n", "", 0}},
		{"what it has said", func(p *podman) outcome { return p.do("logs", name) }, outcome{"up\nbye\n", "", 0}},
		{"its removal too", remove, outcome{name + "\n", "", 0}},
	} {
		theirs, here := step.do(plain), step.do(ours)
		if theirs != step.want {
			t.Errorf("%s: under runc %+v, want %+v", step.what, theirs, step.want)
		}
		if here != step.want {
			t.Errorf("%s: under stasis-runtime %+v, want %+v", step.what, here, step.want)
		}
	}
}

// A restore is the agent's to prepare: where nothing of it is known the container does not
// start at all, and who started it is told so. What would reach CRIU past Stasis is taken
// from a container that starts.
func TestAContainerThatAsksConmonForARestoreThatNobodyPreparedIsRefused(t *testing.T) {
	runc := filepath.Join(built(t).Runtime, "runc")
	p := newPodman(t, installed(t, runc))
	got := p.run([]string{"--annotation", "checkpoint.podstasis.dev/restore-ticket=none", "--annotation", "io.kubernetes.cri.container-type=sandbox",
		"--annotation", "io.kubernetes.cri.sandbox-id=none"}, `echo ran`)
	if got.Code == 0 || got.Out != "" || !strings.Contains(got.Err, "stasis") {
		t.Errorf("it ended with %+v", got)
	}
	p.do("rm", "--force", name)
	if got := p.run([]string{"--annotation", "org.criu.config=/etc/passwd"}, `echo ran`); got != (outcome{"ran\n", "", 0}) {
		t.Errorf("one with an engine's annotation: %+v", got)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
