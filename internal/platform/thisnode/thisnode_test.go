package thisnode

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/platform"
)

func TestThisMachineIsDescribedAsItIs(t *testing.T) {
	p, err := Platform()
	if err != nil {
		t.Fatal(err)
	}
	d := platform.Description{OS: p.OS, Architecture: p.Architecture, Kernel: p.Kernel, CPU: p.CPU, Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1}
	if err := d.Check(); err != nil {
		t.Fatal(err)
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if p.Kernel != strings.TrimSpace(string(release)) {
		t.Errorf("kernel %q, the kernel says %q", p.Kernel, release)
	}
	if runtime.GOARCH != "amd64" {
		return
	}
	if !slices.Contains(p.CPU.Features, "sse2") {
		t.Errorf("no sse2 among %v", p.CPU.Features)
	}
	// x87 and SSE are bits 0 and 1, and take 576 bytes with the header; AVX is bit 2.
	if slices.Contains(p.CPU.Features, "xsave") && (p.CPU.XSaveFeatures&3 != 3 || p.CPU.XSaveBytes < 576) {
		t.Errorf("xsave components %#x in %d bytes", p.CPU.XSaveFeatures, p.CPU.XSaveBytes)
	}
	if slices.Contains(p.CPU.Features, "avx") != (p.CPU.XSaveFeatures&4 != 0) {
		t.Errorf("features %v with xsave components %#x", p.CPU.Features, p.CPU.XSaveFeatures)
	}
	t.Logf("%+v %+v", p, p.CPU)
}

func TestControlGroupsAreOfVersionOneWhereAnyControllerIs(t *testing.T) {
	for groups, want := range map[string]string{
		"0::/system.slice/a.service\n":          "v2",
		"12:cpu,cpuacct:/a\n1:name=systemd:/\n": "v1",
		"0::/\n3:freezer:/a\n":                  "v1",
	} {
		if got := cgroups(groups); got != want {
			t.Errorf("%q: %s, want %s", groups, got, want)
		}
	}
}
