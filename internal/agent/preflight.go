package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeinstall"
	"podstasis.dev/stasis/internal/platform"
)

// finding is what one check found.
type finding struct {
	name string
	// says is what was found, or what is wrong and what to do about it.
	says string
	err  bool
	// fatal: nothing can be checkpointed or restored on this node.
	fatal bool
}

func (f finding) String() string {
	verdict := "ok  "
	if f.err {
		verdict = "FAIL"
	}
	return verdict + " " + f.name + ": " + f.says
}

// oldestKernel has CAP_CHECKPOINT_RESTORE, which CRIU's restore of PIDs needs.
var oldestKernel = platform.Version{5, 9}

// hostRunner runs programs where the container runtime's are.
type hostRunner interface {
	Do(fn func() error) error
	Run(ctx context.Context, c hostns.Command) (hostns.Output, error)
	SearchPath() string
}

// engineIdentifier is what preflight asks of the engine.
type engineIdentifier interface {
	Identify(ctx context.Context) (checkpoint.Program, error)
}

// preflight checks what this node has to have, most basic first.
func preflight(ctx context.Context, h hostRunner, e engineIdentifier) []finding {
	findings := []finding{checkRoot(os.Geteuid()), checkKernel()}
	findings = append(findings, onHost(h, "overlayfs", checkOverlay), onHost(h, "freezer", checkFreezer))
	engine := finding{name: "criu"}
	if program, err := e.Identify(ctx); err != nil {
		engine.err, engine.fatal, engine.says = true, true, err.Error()
		return append(findings, engine)
	} else {
		engine.says = program.Version
	}
	findings = append(findings, engine, checkCRIU(ctx, h))
	return findings
}

func checkRoot(euid int) finding {
	if euid != 0 {
		return finding{name: "root", err: true, fatal: true, says: fmt.Sprintf("runs as user %d; run it as root", euid)}
	}
	return finding{name: "root", says: "runs as root"}
}

func checkKernel() finding {
	f := finding{name: "kernel"}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return finding{name: "kernel", err: true, says: "its version cannot be told: " + err.Error()}
	}
	release := unix.ByteSliceToString(uts.Release[:])
	f.says = release
	if v, err := platform.ParseVersion(release); err == nil && v.Older(oldestKernel) { // one that is none is taken for new enough
		f.err, f.fatal = true, true
		f.says = fmt.Sprintf("%s is too old: Linux %v or later is needed", release, oldestKernel)
	}
	return f
}

func onHost(h hostRunner, name string, check func() (string, error)) finding {
	f := finding{name: name}
	err := h.Do(func() (err error) {
		f.says, err = check()
		return err
	})
	if err != nil {
		f.err, f.fatal, f.says = true, true, err.Error()
	}
	return f
}

func checkOverlay() (string, error) {
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return "", err
	}
	if !strings.Contains(string(known), "\toverlay\n") {
		return "", errors.New("the kernel does not know it: load it (modprobe overlay); containers' writable layers are captured from it")
	}
	return "known to the kernel", nil
}

func checkFreezer() (string, error) {
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		_, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(after)
		if !ok || len(fields) < 3 {
			continue
		}
		if fields[0] == "cgroup" && strings.Contains(","+fields[2]+",", ",freezer,") {
			return "cgroup v1", nil
		}
		if fields[0] == "cgroup2" {
			where := strings.Fields(line)[4]
			if controllers, err := os.ReadFile(where + "/cgroup.controllers"); err == nil && len(strings.TrimSpace(string(controllers))) > 0 {
				return "cgroup v2", nil
			}
		}
	}
	return "", errors.New("no cgroup hierarchy can freeze: mount the v1 freezer, or boot with the unified hierarchy")
}

func checkCRIU(ctx context.Context, h hostRunner) finding {
	out, err := h.Run(ctx, hostns.Command{Name: "criu", Args: []string{"check"}})
	if err != nil {
		return finding{name: "criu check", err: true, says: cut(strings.Join(strings.Fields(err.Error()), " "), 1000) + "; the kernel lacks something that CRIU needs (criu check -v4 says what)"}
	}
	said := strings.TrimSpace(out.Stdout + out.Stderr)
	if lines := strings.Split(said, "\n"); len(lines) > 0 {
		said = lines[len(lines)-1]
	}
	return finding{name: "criu check", says: said}
}

// checkRuntime checks the container runtime, and opens its mount namespace where
// the other checks are made.
func checkRuntime(ctx context.Context, conn grpc.ClientConnInterface, endpoint string) ([]finding, *hostns.Host) {
	f := finding{name: "container runtime"}
	client := runtimeapi.NewRuntimeServiceClient(conn)
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	version, err := client.Version(asking, &runtimeapi.VersionRequest{})
	if err != nil {
		f.err, f.fatal = true, true
		f.says = fmt.Sprintf("does not answer on %s (%v); start it, or name its socket with --runtime-endpoint", endpoint, err)
		return []finding{f}, nil
	}
	f.says = version.RuntimeName + " " + version.RuntimeVersion
	if err := nodeinstall.CheckVersion(version); err != nil {
		f.err, f.fatal, f.says = true, true, err.Error()
	}
	handler := finding{name: "handler"}
	status, err := client.Status(asking, &runtimeapi.StatusRequest{Verbose: true})
	known := false
	if err == nil {
		known, err = nodeinstall.HandlerKnown(status)
	}
	switch {
	case err != nil:
		handler.err, handler.says = true, err.Error()
	case known:
		handler.says = nodeinstall.HandlerName + " is configured"
	default:
		handler.err = true
		handler.says = "the container runtime does not know " + nodeinstall.HandlerName + "; run stasis-agent install"
	}
	host, err := hostns.FromSocket(endpoint)
	if err != nil {
		return []finding{f, handler, {name: "mount namespace", err: true, fatal: true, says: err.Error()}}, nil
	}
	return []finding{f, handler}, host
}
