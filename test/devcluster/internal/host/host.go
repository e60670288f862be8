// Package host checks, before anything is made, that a machine can carry a cluster. Every
// complaint is one line that says what is missing and what to do.
package host

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/devcluster/internal/cgroup"
	"podstasis.dev/stasis/test/devcluster/internal/network"
)

// ProbeCommand is the hidden command that tries the kernel's features in namespaces of its
// own; it calls Probe, or ProbeCRIU when it is given CRIU's directory.
const ProbeCommand = "internal-probe"

// Check returns everything that stands in the way of a cluster, except CRIU (see CheckCRIU);
// builds says that its programs are built here.
func Check(ctx context.Context, builds bool) error {
	if os.Geteuid() != 0 {
		return errors.New("not root: clusters need namespaces, mounts and control groups; run this with sudo")
	}
	var problems []error
	complain := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	for _, tool := range []struct{ path, pkg string }{
		{"/usr/lib/cni/bridge", "containernetworking-plugins"},
		{"/usr/lib/cni/host-local", "containernetworking-plugins"},
		{"/usr/lib/cni/loopback", "containernetworking-plugins"},
	} {
		if _, err := os.Stat(tool.path); err != nil {
			complain("%s is missing (package %s): run hack/deps.sh", tool.path, tool.pkg)
		}
	}
	for _, tool := range []struct {
		name, pkg string
		always    bool
	}{{"nft", "nftables", true}, {"gcc", "gcc", false}, {"go", "", false}} {
		if !builds && !tool.always {
			continue
		}
		if _, err := exec.LookPath(tool.name); err != nil {
			if tool.pkg == "" {
				complain("%s is missing: put its bin directory in PATH", tool.name)
			} else {
				complain("%s is missing (package %s): run hack/deps.sh", tool.name, tool.pkg)
			}
		}
	}
	if err := staticBusybox("/bin/busybox"); err != nil {
		complain("%w: run hack/deps.sh", err)
	}
	filesystems, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		complain("reading the kernel's file systems: %w", err)
	} else if !bytes.Contains(filesystems, []byte("\toverlay\n")) {
		complain("the kernel has no overlay file system: run modprobe overlay, or use a kernel with CONFIG_OVERLAY_FS")
	}
	if _, err := cgroup.Find(); err != nil {
		problems = append(problems, err)
	}
	if len(problems) == 0 {
		if err := probe(ctx); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

func staticBusybox(path string) error {
	file, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("no static busybox (package busybox-static): %w", err)
	}
	defer file.Close()
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically, package busybox-static is needed", path)
		}
	}
	return nil
}

// probe runs Probe, or ProbeCRIU when it gets an argument, in new namespaces, which end with it.
func probe(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{ProbeCommand}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
	output, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		return errors.New("no new namespaces can be made here: in a container, run it privileged (CAP_SYS_ADMIN)")
	}
	if err != nil {
		if message := strings.TrimSpace(string(output)); message != "" {
			return errors.New(strings.TrimPrefix(message, "devcluster: "))
		}
		return fmt.Errorf("trying the kernel's features: %w", err)
	}
	return nil
}

// Probe tries what a cluster needs of the kernel. The process must be in namespaces of its own.
func Probe() error {
	if err := isolate(); err != nil {
		return err
	}
	if err := network.Probe(); err != nil {
		return err
	}
	const rules = "add table ip probe; add chain ip probe nat { type nat hook postrouting priority 0; }; add rule ip probe nat ct state new masquerade"
	output, err := exec.Command("nft", rules).CombinedOutput()
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(output)), "\n")
		return fmt.Errorf("the kernel's nftables cannot translate addresses (%s): run modprobe nf_tables nft_masq nft_ct, or use a kernel that has them", first)
	}
	return nil
}

// CheckSystemd says whether systemd runs here and can be asked for control groups.
func CheckSystemd() error {
	for _, path := range []string{"/run/systemd/system", "/run/dbus/system_bus_socket"} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("systemd does not run here, or no D-Bus (%w): control groups cannot be had from it", err)
		}
	}
	return nil
}

// CheckCRIU says whether the CRIU at prefix works on this kernel.
func CheckCRIU(ctx context.Context, prefix string) error { return probe(ctx, prefix) }

// ProbeCRIU runs CRIU's own check. The process must be in namespaces of its own: CRIU keeps
// what it finds out in /run, which would be a trace on the machine.
func ProbeCRIU(prefix string) error {
	if err := isolate(); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting a temporary /run: %w", err)
	}
	if err := network.UpLoopback(); err != nil {
		return err
	}
	output, err := exec.Command(filepath.Join(prefix, "bin", "criu"), "check").CombinedOutput()
	if err == nil {
		return nil
	}
	var reasons []string
	for line := range strings.Lines(string(output)) {
		if strings.Contains(line, "Error") {
			reasons = append(reasons, strings.TrimSpace(line))
		}
	}
	if len(reasons) == 0 {
		reasons = append(reasons, err.Error())
	}
	return fmt.Errorf("CRIU does not work on this kernel, nothing could be checkpointed: %s", strings.Join(reasons, "; "))
}

// isolate keeps mounts of this process, which is in a mount namespace of its own, from the machine.
func isolate() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts cannot be changed here: in a container, run it privileged: %w", err)
	}
	return nil
}

// Limited says whether the machine withholds CAP_SYS_RESOURCE from root.
func Limited() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("asking for the capabilities of this process: %w", err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0, nil
}
