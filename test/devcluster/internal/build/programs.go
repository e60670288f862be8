package build

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

func (b Builder) kube(ctx context.Context, version string) (string, error) {
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, ok := strings.Cut(rest, ".")
	if !ok {
		return "", fmt.Errorf("version %q of Kubernetes is not of the form v1.37.0", version)
	}
	ldflags := "-s -w"
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, v := range []string{"gitVersion=" + version, "gitMajor=" + major, "gitMinor=" + minor, "gitTreeState=archive", "buildDate=1970-01-01T00:00:00Z"} {
			ldflags += " -X " + p + "." + v
		}
	}
	return b.once(ctx, "kube", "Kubernetes "+version+" and etcd", "10 minutes on 2 cores", keyOf{
		files: []string{b.source("kube", "go.mod"), b.source("kube", "go.sum"), b.source("kube", "main.go")},
		words: []string{ldflags},
	}, func(dir string) error {
		out := filepath.Join(dir, "kube")
		if version == Pinned.Kubernetes {
			return b.goBuild(ctx, b.source("kube"), "0", "", ldflags, out, ".")
		}
		module, err := os.MkdirTemp("", "devcluster-kube-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(module)
		if err := b.kubeModule(ctx, version, module); err != nil {
			return err
		}
		return b.goBuild(ctx, module, "0", "", ldflags, out, ".")
	})
}

// kubeModule makes the module of build/kube for another version of Kubernetes.
func (b Builder) kubeModule(ctx context.Context, version, dir string) error {
	program, err := os.ReadFile(b.source("kube", "main.go"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program, 0o644); err != nil {
		return err
	}
	if err := b.moduleOf(ctx, dir, "k8s.io/kubernetes", version); err != nil {
		return err
	}
	return run(goIn(ctx, dir, "mod", "tidy"), "making a module of Kubernetes "+version)
}

// moduleOf makes a module in dir that requires another one as that is built by itself: what
// it excludes is excluded. The parts k8s.io/… of Kubernetes are modules of their own, that
// it replaces by directories which the module of the whole does not have: they are replaced
// by their releases.
func (b Builder) moduleOf(ctx context.Context, dir, path, version string) error {
	what := "getting " + path + "@" + version
	text, err := goIn(ctx, dir, "mod", "download", "-json", path+"@"+version).Output()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", what, err, text)
	}
	var at struct{ GoMod string }
	if err := json.Unmarshal(text, &at); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if text, err = goIn(ctx, dir, "mod", "edit", "-json", at.GoMod).Output(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	type module struct{ Path, Version string }
	var theirs struct {
		Exclude []module
		Replace []struct{ Old, New module }
	}
	if err := json.Unmarshal(text, &theirs); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	edit := []string{"mod", "edit", "-require=" + path + "@" + version}
	for _, m := range theirs.Exclude {
		edit = append(edit, "-exclude="+m.Path+"@"+m.Version)
	}
	for _, r := range theirs.Replace {
		if strings.HasPrefix(r.New.Path, "./staging/") {
			r.New = module{r.Old.Path, "v0" + strings.TrimPrefix(version, "v1")}
		}
		edit = append(edit, "-replace="+r.Old.Path+"="+r.New.Path+"@"+r.New.Version)
	}
	if err := run(goIn(ctx, dir, "mod", "init", "podstasis.dev/stasis/test/devcluster/build/other"), what); err != nil {
		return err
	}
	return run(goIn(ctx, dir, edit...), what)
}

// goIn is a call of go in a module that it may complete.
func goIn(ctx context.Context, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	return cmd
}

func (b Builder) runtime(ctx context.Context, v plan.Versions) (string, error) {
	p := "github.com/containerd/containerd"
	if !strings.HasPrefix(v.Containerd, "v1.") {
		p += "/v2"
	}
	const tags = "urfave_cli_no_docs no_btrfs no_zfs no_devmapper no_aufs osusergo netgo static_build"
	ldflags := "-s -w -X " + p + "/version.Version=" + v.Containerd + " -X " + p + "/version.Revision=module -X " + p + "/version.Package=" + p
	runcFlags := "-s -w -X main.gitCommit=" + v.Runc
	if v.Runc != Pinned.Runc {
		runcFlags += " -X main.version=" + strings.TrimPrefix(v.Runc, "v") // before 1.4 it does not know its own
	}
	seccomp, err := packageVersion(ctx, "libseccomp-dev")
	if err != nil {
		return "", err
	}
	key := keyOf{
		files: []string{b.source("containerd", "go.mod"), b.source("containerd", "go.sum")},
		words: []string{ldflags, tags, seccomp},
	}
	if v.Runc != Pinned.Runc {
		key.words = append(key.words, runcFlags)
	}
	return b.once(ctx, "runtime", "containerd "+v.Containerd+" and runc "+v.Runc, "2 minutes on 2 cores", key, func(dir string) error {
		containerd, runc := b.source("containerd"), b.source("containerd")
		for _, other := range []struct {
			module        *string
			path, version string
			pinned        bool
		}{
			{&containerd, p, v.Containerd, v.Containerd == Pinned.Containerd},
			{&runc, "github.com/opencontainers/runc", v.Runc, v.Runc == Pinned.Runc},
		} {
			if other.pinned {
				continue
			}
			temp, err := os.MkdirTemp("", "devcluster-module-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(temp)
			if err := b.moduleOf(ctx, temp, other.path, other.version); err != nil {
				return err
			}
			*other.module = temp
		}
		for _, program := range []struct{ module, name, cgo, tags, ldflags, pkg string }{
			{containerd, "containerd", "0", tags, ldflags, p + "/cmd/containerd"},
			{containerd, "containerd-shim-runc-v2", "0", tags + " no_grpc", ldflags, p + "/cmd/containerd-shim-runc-v2"},
			{containerd, "ctr", "0", tags, ldflags, p + "/cmd/ctr"},
			{runc, "runc", "1", "seccomp urfave_cli_no_docs", runcFlags, "github.com/opencontainers/runc"},
		} {
			if err := b.goBuild(ctx, program.module, program.cgo, program.tags, program.ldflags, filepath.Join(dir, program.name), program.pkg); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b Builder) goBuild(ctx context.Context, module, cgo, tags, ldflags, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", tags, "-ldflags", ldflags, "-o", out, pkg)
	cmd.Dir = module
	flags := ""
	if !strings.HasPrefix(module, b.Root+string(filepath.Separator)) {
		flags = "-mod=mod" // one of moduleOf
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOFLAGS="+flags, "GOWORK=off", "GOOS=linux")
	return run(cmd, "building "+filepath.Base(out))
}
