package platform

import (
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
)

func TestACheckpointGoesWhereItsEngineIsAmongOthers(t *testing.T) {
	node := func(kernel string, engines ...checkpoint.Program) Description {
		return Description{OS: "linux", Architecture: "amd64", Kernel: kernel, CPU: &checkpoint.CPU{}, Engine: engines[0], More: engines[1:], FormatVersion: 1}
	}
	criu, gvisor, newer := checkpoint.Program{Name: "criu", Version: "4.2"}, checkpoint.Program{Name: "gvisor", Version: "release-20260901.0"}, checkpoint.Program{Name: "gvisor", Version: "release-20261001.0"}
	for _, tc := range []struct {
		from, on Description
		want     string
	}{
		{node("6.18", criu), node("6.18", criu, gvisor), ""},
		{node("6.18", gvisor), node("6.1", criu, gvisor), ""}, // its kernel is its own
		{node("6.18", criu), node("6.1", criu, gvisor), "runs kernel 6.1, older than 6.18"},
		{node("6.18", gvisor), node("6.18", criu), "restores with criu and the checkpoint is of gvisor"},
		{node("6.18", gvisor), node("6.18", criu, newer), "has gvisor release-20261001.0 and the checkpoint is of release-20260901.0"},
	} {
		got := strings.Join(Obstacles(tc.from, tc.on), "; ")
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("from %v on %v: %q, want %q", tc.from, tc.on, got, tc.want)
		}
	}
	if a, b := node("6.18", gvisor).Class(), node("6.1", gvisor).Class(); a != b {
		t.Error("the node's kernel makes another class of what gVisor has saved")
	}
	if node("6.18", gvisor).Class() == node("6.18", newer).Class() {
		t.Error("two versions of gVisor are one class")
	}
	many := node("6.18", criu)
	for range maxEngines + 1 {
		many.More = append(many.More, gvisor)
	}
	if many.Check() == nil || node("6.18", criu, checkpoint.Program{Name: "a b", Version: "1"}).Check() == nil {
		t.Error("a description with anything in it passes")
	}
	text, err := node("6.18", criu, gvisor).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if d, err := Decode(text); err != nil || len(d.More) != 1 || d.More[0] != gvisor {
		t.Errorf("%+v, %v", d, err)
	}
}
