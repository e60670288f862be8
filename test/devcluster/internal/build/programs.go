package build

import (
	"bufio"
	"bytes"
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

// kubeModule makes the module of build/kube for another version of Kubernetes. Its parts
// k8s.io/… are modules of their own, that it replaces by directories which the module of
// the whole does not have: they are replaced by their releases here, and etcd is the one
// that it names.
func (b Builder) kubeModule(ctx context.Context, version, dir string) error {
	program, err := os.ReadFile(b.source("kube", "main.go"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program, 0o644); err != nil {
		return err
	}
	whole := "k8s.io/kubernetes@" + version
	text, err := exec.CommandContext(ctx, "go", "mod", "download", "-json", whole).Output()
	if err != nil {
		return fmt.Errorf("getting %s: %w\n%s", whole, err, text)
	}
	var module struct{ GoMod string }
	if err := json.Unmarshal(text, &module); err != nil {
		return fmt.Errorf("getting %s: %w", whole, err)
	}
	theirs, err := os.ReadFile(module.GoMod)
	if err != nil {
		return err
	}
	edit := []string{"mod", "edit", "-require=" + whole}
	part := "v0" + strings.TrimPrefix(version, "v1")
	for lines := bufio.NewScanner(bytes.NewReader(theirs)); lines.Scan(); {
		words := strings.Fields(strings.TrimPrefix(strings.TrimSpace(lines.Text()), "replace "))
		if len(words) == 3 && words[1] == "=>" && strings.HasPrefix(words[2], "./staging/") {
			edit = append(edit, "-replace="+words[0]+"="+words[0]+"@"+part)
		}
	}
	for _, args := range [][]string{{"mod", "init", "podstasis.dev/stasis/test/devcluster/build/kube"}, edit, {"mod", "tidy"}} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
		if err := run(cmd, "making a module of "+whole); err != nil {
			return err
		}
	}
	return nil
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
		for _, program := range []struct {
			name, cgo, tags, ldflags, pkg, version string
			pinned                                 bool
		}{
			{"containerd", "0", tags, ldflags, p + "/cmd/containerd", v.Containerd, v.Containerd == Pinned.Containerd},
			{"containerd-shim-runc-v2", "0", tags + " no_grpc", ldflags, p + "/cmd/containerd-shim-runc-v2", v.Containerd, v.Containerd == Pinned.Containerd},
			{"ctr", "0", tags, ldflags, p + "/cmd/ctr", v.Containerd, v.Containerd == Pinned.Containerd},
			{"runc", "1", "seccomp urfave_cli_no_docs", runcFlags, "github.com/opencontainers/runc", v.Runc, v.Runc == Pinned.Runc},
		} {
			build := func() error {
				return b.goBuild(ctx, b.source("containerd"), program.cgo, program.tags, program.ldflags, filepath.Join(dir, program.name), program.pkg)
			}
			if !program.pinned {
				build = func() error {
					return b.goInstall(ctx, program.cgo, program.tags, program.ldflags, dir, program.pkg+"@"+program.version)
				}
			}
			if err := build(); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b Builder) goBuild(ctx context.Context, module, cgo, tags, ldflags, out, pkg string) error {
	cmd := goCommand(ctx, cgo, "build", "-trimpath", "-buildvcs=false", "-tags", tags, "-ldflags", ldflags, "-o", out, pkg)
	cmd.Dir = module
	return run(cmd, "building "+filepath.Base(out))
}

// goInstall builds a program as its own module has it into dir.
func (b Builder) goInstall(ctx context.Context, cgo, tags, ldflags, dir, pkg string) error {
	cmd := goCommand(ctx, cgo, "install", "-trimpath", "-tags", tags, "-ldflags", ldflags, pkg)
	cmd.Dir, cmd.Env = dir, append(cmd.Env, "GOBIN="+dir)
	return run(cmd, "building "+pkg)
}

func goCommand(ctx context.Context, cgo string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOFLAGS=", "GOWORK=off", "GOOS=linux")
	return cmd
}
