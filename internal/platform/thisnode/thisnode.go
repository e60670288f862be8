// Package thisnode finds out what platform this program runs on.
package thisnode

import (
	"fmt"
	"io"
	"os"
	"runtime"

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
	return checkpoint.Platform{
		OS: runtime.GOOS, Architecture: runtime.GOARCH, Kernel: unix.ByteSliceToString(u.Release[:]), CPU: &cpu,
	}, nil
}
