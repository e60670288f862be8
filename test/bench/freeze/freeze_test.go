package freeze

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/test/document"
)

const second = time.Second

func measured() *Report {
	r := &Report{}
	add := func(key string, s Shape, freeze time.Duration, restores ...RestoreResult) {
		r.Results = append(r.Results, &Result{Contender: "by " + key, Key: key, Shape: s, Freeze: []time.Duration{freeze, freeze, 9 * freeze}, Restores: restores})
	}
	restore := func(key string, asked time.Duration) RestoreResult {
		d := []time.Duration{asked}
		return RestoreResult{Name: "restored by " + key, Key: key, Asked: d, First: d, All: d, Whole: d}
	}
	add("criu", least, second, restore("criu", second))
	add("plain", least, 2*second, restore("eager", 3*second))
	add("criu", gib1, 2*second)
	add("plain", gib1, 3*second, restore("eager", 4*second))
	add("kubelet", gib1, 30*second)
	add("criu", gib4, 8*second, restore("criu", 5*second))
	add("plain", gib4, 9*second, restore("eager", 11*second))
	return r
}

func figure(r *Report, name string) (float64, bool) {
	for _, f := range r.Figures() {
		if f.Name == name {
			return f.Value, true
		}
	}
	return 0, false
}

func TestFiguresCompareMediansOfOneRun(t *testing.T) {
	r := measured()
	for name, want := range map[string]float64{
		"freeze_plain_1gib_ms":            3000,
		"freeze_vs_criu_1gib":             1.5,
		"freeze_vs_kubelet_1gib":          0.1,
		"freeze_growth_ms_per_gib":        2000,
		"eager_vs_criu_restore_bandwidth": 0.5, // 4 s more against 8 s more
		"eager_first_instruction_1gib_ms": 4000,
	} {
		if got, found := figure(r, name); !found || got != want {
			t.Errorf("%s is %g (%t), want %g", name, got, found, want)
		}
	}
	if _, found := figure(r, "freeze_plain_vs_criu_2_containers"); found {
		t.Error("there is a figure of what was not measured")
	}
}

func TestACopyOnWriteCaptureIsWhatIsComparedWhereThereIsOne(t *testing.T) {
	r := measured()
	r.Results = append(r.Results, &Result{Key: "cow", Shape: gib1, Freeze: []time.Duration{second / 2}})
	if got, _ := figure(r, "freeze_vs_criu_1gib"); got != 0.25 {
		t.Errorf("got %g", got)
	}
}

func TestRestoresAreComparedWhateverCapturedThem(t *testing.T) {
	r := measured()
	lazy := func(whole time.Duration) []RestoreResult {
		return []RestoreResult{{Key: "lazy", Asked: []time.Duration{second}, First: []time.Duration{second / 5}, Whole: []time.Duration{whole}}}
	}
	r.Results = append(r.Results,
		&Result{Key: "cow", Shape: least, Freeze: []time.Duration{second}, Restores: lazy(second)},
		&Result{Key: "cow", Shape: gib1, Freeze: []time.Duration{second}, Restores: lazy(5 * second)},
		&Result{Key: "cow", Shape: Shape{1, 8192}, Freeze: []time.Duration{second}, Restores: lazy(9 * second)})
	for name, want := range map[string]float64{
		"eager_vs_criu_restore_bandwidth":         0.5,
		"lazy_first_instruction_1gib_ms":          200,
		"lazy_first_instruction_largest_vs_64mib": 1,
		"lazy_all_vs_eager_1gib":                  1.25,
	} {
		if got, found := figure(r, name); !found || got != want {
			t.Errorf("%s is %g (%t), want %g", name, got, found, want)
		}
	}
}

func TestTheReportedFreezeIsComparedWhereItIsFarthestOff(t *testing.T) {
	r := &Report{Results: []*Result{{Key: "plain", Freeze: []time.Duration{second, second}, Reported: []time.Duration{second + 5*time.Millisecond, second - 9*time.Millisecond}}}}
	if got, _ := figure(r, "freeze_said_minus_measured_ms"); got != -9 {
		t.Errorf("got %g ms", got)
	}
}

// What the tables are written between is in the document, as the command has it.
func TestTheDocumentHasAPlaceForTheTables(t *testing.T) {
	const name = "../../../docs/benchmarks.md"
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "benchmarks.md")
	if err := errors.Join(os.WriteFile(file, text, 0o600), document.Update(file, command, "new\n")); err != nil {
		t.Fatal(err)
	}
}

func TestTablesHaveARowForEachThatWasMeasured(t *testing.T) {
	got := measured().Markdown()
	for _, row := range []string{"| 1 GiB | by kubelet | 30000 |  |", "| 4 GiB | restored by eager | 11000 | 11000 | 11000 | 11000 |", "| `freeze_vs_criu_1gib` | 1.500 | ≤ 0.33 |"} {
		if !strings.Contains(got, row) {
			t.Errorf("no row %q in\n%s", row, got)
		}
	}
}

func TestShapesAreReadAsTheyAreWritten(t *testing.T) {
	got, err := ParseShapes("64,2x512")
	if err != nil || len(got) != 2 || got[0] != (Shape{1, 64}) || got[1] != (Shape{2, 512}) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"x", "0", "2x", "-1x64", "64,,"} {
		if got, err := ParseShapes(bad); err == nil {
			t.Errorf("%q was read as %v", bad, got)
		}
	}
}

func TestAWindowIsTakenApartByWhatCRIULogged(t *testing.T) {
	parts, all := sectionsOf(strings.Join([]string{
		"(00.000000) Version: 4.2.1",
		"(00.003000) Dumping processes (pid: 7 comm: a)",
		"(00.004000) freezing cgroup /sys/fs/cgroup/freezer/a: 100 x 100ms attempts, timeout: 10s",
		"(00.014000) freezer.state=FROZEN",
		"(00.015000) Collecting mappings (pid: 7)",
		"  a line without a time",
		"(00.030000) Collecting fds (pid: 7)",
		"(00.031000) Dumping pages (type: 59 pid: 7)",
		"(00.131000) Dumping core (pid: 7)",
		"(00.135000) Collecting mappings (pid: 8)",
		"(00.145000) Dumping finished successfully",
	}, "\n"))
	if all != 145*time.Millisecond {
		t.Errorf("all of it took %s", all)
	}
	sum := time.Duration(0)
	got := map[string]time.Duration{}
	for _, p := range parts {
		got[p.name] = p.took
		sum += p.took
	}
	if sum != all {
		t.Errorf("the parts are %s, all is %s", sum, all)
	}
	if got[atStart] != 4*time.Millisecond || got[waits] != 10*time.Millisecond ||
		got["CRIU: list mappings (smaps)"] != 25*time.Millisecond || got["CRIU: memory"] != 100*time.Millisecond {
		t.Errorf("%v", got)
	}
}

func TestStatisticsAreReadAsCRIUWritesThem(t *testing.T) {
	message := []byte{0x0a, 12, 0x08, 0xe8, 0x07, 0x10, 0xd0, 0x0f, 0x18, 1, 0x20, 2, 0x28, 3} // 1000, 2000, 1, 2; pages scanned
	data := append([]byte{1, 2, 3, 4, 5, 6, 7, 8, byte(len(message)), 0, 0, 0}, message...)
	s, err := parseStats(data)
	if err != nil || s != (Stats{time.Millisecond, 2 * time.Millisecond, time.Microsecond, 2 * time.Microsecond}) {
		t.Errorf("got %+v, %v", s, err)
	}
	for cut := range data {
		if _, err := parseStats(data[:cut]); err == nil {
			t.Errorf("%d bytes of it were read", cut)
		}
	}
}
