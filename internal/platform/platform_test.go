package platform

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"podstasis.dev/stasis/internal/checkpoint"
)

func node(change ...func(*Description)) Description {
	d := Description{
		OS: "linux", Architecture: "amd64", Kernel: "6.1.0-35-amd64",
		CPU:    &checkpoint.CPU{Features: []string{"avx", "avx2", "sse"}, XSaveFeatures: 7, XSaveBytes: 832},
		Engine: checkpoint.Program{Name: "criu", Version: "4.2.1"}, FormatVersion: 1,
	}
	for _, c := range change {
		c(&d)
	}
	return d
}

func features(f ...string) func(*Description) {
	return func(d *Description) {
		cpu := *d.CPU
		cpu.Features = f
		d.CPU = &cpu
	}
}

func xsave(features int64, bytes int) func(*Description) {
	return func(d *Description) {
		cpu := *d.CPU
		cpu.XSaveFeatures, cpu.XSaveBytes = features, bytes
		d.CPU = &cpu
	}
}

func kernel(release string) func(*Description) {
	return func(d *Description) { d.Kernel = release }
}

func engine(name, version string) func(*Description) {
	return func(d *Description) { d.Engine = checkpoint.Program{Name: name, Version: version} }
}

func TestANodeCanRunACheckpointOrTheDifferenceIsNamed(t *testing.T) {
	for name, tc := range map[string]struct {
		from, on Description
		want     []string
	}{
		"the same":                          {node(), node(), nil},
		"more features":                     {node(), node(features("avx", "avx2", "avx512f", "sse")), nil},
		"in another order":                  {node(), node(features("sse", "avx2", "avx")), nil},
		"a feature less":                    {node(), node(features("avx", "sse")), []string{"lacks the CPU feature avx2"}},
		"two less":                          {node(), node(features("sse")), []string{"lacks the CPU features avx, avx2"}},
		"many less":                         {node(features(strings.Fields("a b c d e f g h i j")...)), node(), []string{"lacks the CPU features a, b, c, d, e, f, g, h and 2 more"}},
		"more room for registers":           {node(), node(xsave(0xe7, 2696)), nil},
		"components less":                   {node(xsave(0xe7, 2696)), node(), []string{"lacks the xsave components 0xe0"}},
		"another layout of the same":        {node(xsave(7, 960)), node(), []string{"has room for 832 bytes of CPU registers (xsave) and 960 are needed"}},
		"a newer kernel":                    {node(), node(kernel("6.12.1")), nil},
		"the same kernel, patched":          {node(kernel("6.1.99")), node(), nil},
		"an older minor":                    {node(kernel("6.12.0")), node(), []string{"runs kernel 6.1.0-35-amd64, older than 6.12.0"}},
		"an older major":                    {node(), node(kernel("5.15.0")), []string{"runs kernel 5.15.0, older than 6.1.0-35-amd64"}},
		"a release candidate":               {node(kernel("6.2-rc1")), node(kernel("6.1-rc9")), []string{"runs kernel 6.1-rc9, older than 6.2-rc1"}},
		"kernels that cannot be compared":   {node(), node(kernel("custom")), []string{"runs kernel custom, older than 6.1.0-35-amd64"}},
		"equal ones that cannot be":         {node(kernel("custom")), node(kernel("custom")), nil},
		"a newer engine":                    {node(), node(engine("criu", "5.0")), nil},
		"an older engine":                   {node(), node(engine("criu", "4.1")), []string{"has criu 4.1, older than 4.2.1"}},
		"an engine older by its patch":      {node(), node(engine("criu", "4.2")), nil},
		"another engine":                    {node(), node(engine("gvisor", "4.2.1")), []string{"restores with gvisor and the checkpoint is of criu"}},
		"another format":                    {node(), node(func(d *Description) { d.FormatVersion = 2 }), []string{"reads checkpoints of format 2 and this is of format 1"}},
		"another architecture says enough":  {node(), node(func(d *Description) { d.Architecture = "arm64" }, features("asimd"), kernel("5.1")), []string{"is linux/arm64 and the checkpoint is of linux/amd64"}},
		"several differences are all named": {node(), node(features("avx", "sse"), kernel("5.1")), []string{"lacks the CPU feature avx2", "runs kernel 5.1, older than 6.1.0-35-amd64"}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, Obstacles(tc.from, tc.on)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestAClassIsOfAllThatTheRulesHoldAlike(t *testing.T) {
	same := []Description{node(), node(features("sse", "avx", "avx2", "avx")), node(kernel("6.1.99")), node(engine("criu", "4.2"))}
	for _, d := range same {
		if d.Class() != node().Class() {
			t.Errorf("%+v is of another class", d)
		}
	}
	others := []Description{node(features("sse")), node(kernel("6.2.0")), node(engine("criu", "4.3")), node(engine("runsc", "4.2.1")),
		node(xsave(7, 960)), node(xsave(3, 832)), node(func(d *Description) { d.Architecture = "arm64" }), node(func(d *Description) { d.FormatVersion = 2 })}
	classes := map[string]bool{node().Class(): true}
	for _, d := range others {
		classes[d.Class()] = true
	}
	if len(classes) != len(others)+1 {
		t.Errorf("%d classes of %d different descriptions", len(classes), len(others)+1)
	}
	if len(node().Class()) != classDigits {
		t.Errorf("class %q", node().Class())
	}
}

func TestADescriptionIsReadAsItWasWritten(t *testing.T) {
	text, err := node().Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(node(), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestWhatIsNoDescriptionIsRefused(t *testing.T) {
	if _, err := Decode(""); err == nil {
		t.Error("nothing is one")
	}
	if _, err := Decode(strings.Repeat(" ", MaxBytes+1)); err == nil {
		t.Error("a long one is one")
	}
	for name, spoil := range map[string]func(*Description){
		"no CPU":               func(d *Description) { d.CPU = nil },
		"no kernel":            kernel(""),
		"a kernel of lines":    kernel("6.1\nx"),
		"a long kernel":        kernel(strings.Repeat("6", 1000)),
		"no engine":            engine("", "4.2"),
		"a feature of none":    features(""),
		"features without end": features(slices.Repeat([]string{"a"}, 10_000)...),
		"a negative size":      xsave(1, -1),
		"no format":            func(d *Description) { d.FormatVersion = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			d := node(spoil)
			if err := d.Check(); err == nil {
				t.Errorf("%+v passes", d)
			}
			if _, err := d.Encode(); err == nil {
				t.Error("it is written")
			}
		})
	}
}

func TestOfAManifestThatDoesNotTellItsCPUNothingIsKnown(t *testing.T) {
	m := &checkpoint.Manifest{FormatVersion: 1, Engine: checkpoint.Program{Name: "criu", Version: "4.2.1"},
		Platform: checkpoint.Platform{OS: "linux", Architecture: "amd64", Kernel: "6.1.0"}}
	if d, ok := Of(m); ok {
		t.Errorf("known: %+v", d)
	}
	m.Platform.CPU = &checkpoint.CPU{Features: []string{"sse"}}
	if _, ok := Of(m); !ok {
		t.Error("not known, though it tells")
	}
}

func TestFeaturesAreThoseThatAllCPUsHaveAndProgramsSee(t *testing.T) {
	const cpuinfo = "processor\t: 0\nflags\t\t: fpu sse sse2 avx2 constant_tsc md_clear vmx avx512f\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu sse sse2 avx2 constant_tsc md_clear\n"
	if diff := cmp.Diff([]string{"avx2", "fpu", "sse", "sse2"}, Features(cpuinfo, "amd64")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"asimd", "fp", "sve"}, Features("processor : 0\nFeatures\t: fp asimd sve\nCPU part : 1\n", "arm64")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestWhatANodeIsSaidToLackItLacks(t *testing.T) {
	whole := node()
	less := whole.Without([]string{"avx2"})
	if diff := cmp.Diff([]string{"lacks the CPU feature avx2"}, Obstacles(whole, less)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(whole.CPU.Features) != 3 {
		t.Error("the description that it was made from has changed")
	}
}

func FuzzDecode(f *testing.F) {
	text, _ := node().Encode()
	f.Add(text)
	f.Add(`{"os":"linux","cpu":{"features":[""]}}`)
	f.Fuzz(func(t *testing.T, s string) {
		d, err := Decode(s)
		if err != nil {
			return
		}
		if len(Obstacles(d, d)) > 0 {
			t.Errorf("a node cannot run what ran on it: %v", Obstacles(d, d))
		}
		d.Class()
	})
}
