// Package thisnode finds out what platform this program runs on.
package thisnode

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/platform"
)

// maxCPUInfo bounds what is read of /proc/cpuinfo: some 2 KiB a CPU.
const maxCPUInfo = 32 << 20

// Platform asks the kernel and the CPU.
func Platform() (checkpoint.Platform, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return checkpoint.Platform{}, fmt.Errorf("uname: %w", err)
	}
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return checkpoint.Platform{}, fmt.Errorf("find out what the CPU can do: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxCPUInfo))
	if err != nil {
		return checkpoint.Platform{}, fmt.Errorf("find out what the CPU can do: %w", err)
	}
	cpu := checkpoint.CPU{Features: platform.Features(string(text), runtime.GOARCH)}
	cpu.XSaveFeatures, cpu.XSaveBytes = xsave()
	groups, err := Cgroups()
	if err != nil {
		return checkpoint.Platform{}, err
	}
	return checkpoint.Platform{
		OS: runtime.GOOS, Architecture: runtime.GOARCH, Kernel: unix.ByteSliceToString(u.Release[:]), CPU: &cpu, Cgroups: groups,
	}, nil
}

// Cgroups is the version of the control groups that containers have here, "v1" or "v2".
func Cgroups() (string, error) {
	groups, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find out what control groups there are: %w", err)
	}
	return cgroups(string(groups)), nil
}

// cgroups is the version of the control groups of a process, by its /proc/PID/cgroup
// (cgroups(7)): those of version 2 have the number 0. Where there are both, controllers are in
// hierarchies of version 1.
func cgroups(groups string) string {
	for line := range strings.Lines(groups) {
		if !strings.HasPrefix(line, "0:") {
			return "v1"
		}
	}
	return "v2"
}
