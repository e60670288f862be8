// Package build makes the programs and images that a cluster consists of, once for each
// version of what they are made from, in a cache that all checkouts of a user share.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/devcluster/internal/image"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

// Pinned are the versions that are built unless others are asked for. They are pinned with
// all that they depend on, by the modules under build/, whose go.mod must agree.
var Pinned = plan.Versions{Kubernetes: "v1.37.0", Containerd: "v2.4.2", Runc: "v1.5.2"}

// GVisor is the version of gVisor, likewise.
const GVisor = "v0.0.0-20260905035102-160fafc42237"

// Builder makes things from the sources of a checkout.
type Builder struct {
	// Root is the checkout, Cache the per-user cache directory.
	Root, Cache string
	// Say tells the user what takes long.
	Say func(format string, args ...any)
}

// Binaries are the paths of built things on this machine.
type Binaries struct {
	// Kube is every program of Kubernetes, and etcd, by the name it is called.
	Kube string
	// Runtime is the directory of containerd, containerd-shim-runc-v2, ctr and runc.
	Runtime string
	// CRIU is a directory as hack/criu.sh makes it.
	CRIU string
	// Images are archives to load into every node.
	Images []string
	// Prlimit is the library for machines that withhold CAP_SYS_RESOURCE.
	Prlimit string
	// GVisor is the directory of runsc, containerd-shim-runsc-v1 and, for machines that
	// withhold CAP_SYS_RESOURCE, shim-launch; empty where it is not wanted.
	GVisor string
	// Crun is a directory as hack/crun.sh makes it; empty where it is not wanted.
	Crun string
}

// Read reads what devcluster build -o json has printed.
func Read(file string) (Binaries, error) {
	var b Binaries
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		return b, fmt.Errorf("reading where what was built is: %w", err)
	}
	return b, nil
}

// All builds what of a kind of cluster is not in the cache. For other versions than the
// pinned ones go.mod is made on the way, with what their own names, checked by Go's
// checksum database.
func (b Builder) All(ctx context.Context, kind plan.Kind) (Binaries, error) {
	var out Binaries
	var err error
	if out.Runtime, err = b.runtime(ctx, kind.Versions); err != nil {
		return out, err
	}
	if out.CRIU, err = b.debian(ctx, "criu", filepath.Join(b.Root, "internal", "engine", "criu", "launcher", "launcher.c")); err != nil {
		return out, err
	}
	if out.Images, err = b.images(ctx); err != nil {
		return out, err
	}
	if out.Prlimit, err = b.prlimit(ctx); err != nil {
		return out, err
	}
	if kind.Kubernetes {
		dir, err := b.kube(ctx, kind.Versions.Kubernetes)
		if err != nil {
			return out, err
		}
		out.Kube = filepath.Join(dir, "kube")
	}
	if kind.Crun {
		if out.Crun, err = b.debian(ctx, "crun"); err != nil {
			return out, err
		}
	}
	if kind.GVisor {
		if out.GVisor, err = b.gvisor(ctx); err != nil {
			return out, err
		}
	}
	return out, nil
}

func (b Builder) source(parts ...string) string {
	return filepath.Join(append([]string{b.Root, "test", "devcluster", "build"}, parts...)...)
}

// gvisor builds runsc and its shim. runsc starts itself again in other namespaces, which
// only a static program can; without a version it takes images of any.
func (b Builder) gvisor(ctx context.Context) (string, error) {
	const p = "gvisor.dev/gvisor"
	ldflags := "-s -w -X " + p + "/runsc/version.version=" + GVisor
	return b.once(ctx, "gvisor", "gVisor "+GVisor, "2 minutes on 2 cores", keyOf{
		files: []string{b.source("gvisor", "go.mod"), b.source("gvisor", "go.sum"), b.source("gvisor", "shim-launch", "main.go")},
		words: []string{ldflags},
	}, func(dir string) error {
		for name, pkg := range map[string]string{"runsc": p + "/runsc", "containerd-shim-runsc-v1": p + "/shim", "shim-launch": "./shim-launch"} {
			if err := b.goBuild(ctx, b.source("gvisor"), "0", "", ldflags, filepath.Join(dir, name), pkg); err != nil {
				return err
			}
		}
		return nil
	})
}

// debian gets a program of another Debian release by its script in hack, which compiles
// sources of ours for it.
func (b Builder) debian(ctx context.Context, program string, sources ...string) (string, error) {
	script := filepath.Join(b.Root, "hack", program+".sh")
	dir, err := b.once(ctx, program, program, "", keyOf{
		files: append([]string{script, filepath.Join(b.Root, "hack", "foreign.sh"), filepath.Join(b.Root, "hack", "apt.sh")}, sources...), words: []string{os.Getenv("STASIS_CRIU_SUITE")},
	}, func(dir string) error {
		cmd := exec.CommandContext(ctx, script, filepath.Join(dir, program))
		cmd.Env = append(os.Environ(), "STASIS_CACHE="+b.Cache)
		return run(cmd, "getting "+program)
	})
	return filepath.Join(dir, program), err
}

func (b Builder) prlimit(ctx context.Context) (string, error) {
	const name = "devcluster-prlimit.so"
	source := b.source("prlimit", "prlimit.c")
	flags := []string{"-O2", "-Wall", "-D_GNU_SOURCE", "-fPIC", "-fvisibility=hidden", "-fno-stack-protector", "-fno-builtin", "-shared", "-nostdlib", "-Wl,-soname," + name}
	dir, err := b.once(ctx, "prlimit", name, "", keyOf{files: []string{source}, words: flags}, func(dir string) error {
		return run(exec.CommandContext(ctx, "gcc", append(flags, "-o", filepath.Join(dir, name), source)...), "compiling "+name)
	})
	return filepath.Join(dir, name), err
}

// busybox is where Debian's busybox-static is.
const busybox = "/bin/busybox"

func (b Builder) images(ctx context.Context) ([]string, error) {
	source := b.source("pause", "pause.c")
	dir, err := b.once(ctx, "images", "the images pause and busybox", "", keyOf{
		files: []string{source, busybox}, words: []string{"2"}, // change with what package image makes of them
	}, func(dir string) error {
		pause := filepath.Join(dir, "pause")
		if err := run(exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-o", pause, source), "compiling pause"); err != nil {
			return err
		}
		program, err := os.ReadFile(pause)
		if err != nil {
			return err
		}
		shell, err := os.ReadFile(busybox)
		if err != nil {
			return err
		}
		list, err := exec.CommandContext(ctx, busybox, "--list").Output()
		if err != nil {
			return fmt.Errorf("asking busybox for its applets: %w", err)
		}
		for name, im := range map[string]image.Image{"pause": image.Pause(program), "busybox": image.Busybox(shell, strings.Fields(string(list)))} {
			archive, err := im.Archive()
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, name+".tar"), archive, 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	return []string{filepath.Join(dir, "pause.tar"), filepath.Join(dir, "busybox.tar")}, err
}

// keyOf is what a result depends on, beside the Go version and the architecture.
type keyOf struct {
	files []string
	words []string
}

func (k keyOf) sum(goVersion string) (string, error) {
	h := sha256.New()
	for _, name := range k.files {
		text, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%d %s\n", len(text), filepath.Base(name))
		h.Write(text)
	}
	fmt.Fprintf(h, "%q %s", k.words, goVersion)
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// once returns the directory that make fills, and calls make only when no earlier call with
// the same key has succeeded. Of several processes one makes it and the others wait.
func (b Builder) once(ctx context.Context, name, title, duration string, key keyOf, make func(dir string) error) (string, error) {
	version, err := goVersion(ctx)
	if err != nil {
		return "", err
	}
	sum, err := key.sum(version)
	if err != nil {
		return "", fmt.Errorf("looking at the sources of %s: %w", title, err)
	}
	parent := filepath.Join(b.Cache, "devcluster")
	final := filepath.Join(parent, name+"-"+sum)
	if isDir(final) {
		return final, nil
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", fmt.Errorf("making the cache: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(parent, name+".lock"))
	if err != nil {
		return "", fmt.Errorf("waiting for another build of %s: %w", title, err)
	}
	defer unlock()
	if isDir(final) {
		return final, nil
	}
	if duration != "" {
		b.Say("building %s (about %s the first time, then kept in %s)", title, duration, parent)
	}
	temp, err := os.MkdirTemp(parent, name+".tmp-")
	if err != nil {
		return "", fmt.Errorf("making the cache: %w", err)
	}
	defer os.RemoveAll(temp)
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", fmt.Errorf("making the cache: %w", err)
	}
	if err := make(temp); err != nil {
		return "", err
	}
	if err := os.Rename(temp, final); err != nil {
		return "", fmt.Errorf("keeping %s: %w", title, err)
	}
	return final, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// lock holds a lock on a file until unlock; it ends with the process at the latest.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func goVersion(ctx context.Context) (string, error) {
	text, err := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOARCH").Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", errors.New("go is missing: put its bin directory in PATH, or run hack/deps.sh for what else is missing")
	}
	if err != nil {
		return "", fmt.Errorf("asking go for its version: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// packageVersion is that of an installed Debian package; empty on other systems.
func packageVersion(ctx context.Context, name string) (string, error) {
	text, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", name).Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("package %s is missing: run hack/deps.sh", name)
	}
	return string(text), nil
}

// run runs a command and puts the end of its output into the error.
func run(cmd *exec.Cmd, what string) error {
	output, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w: run hack/deps.sh", what, err)
	}
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "go: downloading") })
	if len(lines) > 15 {
		lines = lines[len(lines)-15:]
	}
	return fmt.Errorf("%s: %w\n%s", what, err, strings.Join(lines, "\n"))
}
