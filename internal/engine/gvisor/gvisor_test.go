package gvisor

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/engine"
)

func TestOnlyARunscThatTellsItsVersionIsOne(t *testing.T) {
	if v, err := parseVersion("runsc version release-20260901.0\nspec: 1.2.1\n"); err != nil || v != "release-20260901.0" {
		t.Errorf("%q, %v", v, err)
	}
	for _, out := range []string{"", "runsc version VERSION_MISSING\n", "runsc version \n", "runc version 1.5.2\n"} {
		if v, err := parseVersion(out); err == nil {
			t.Errorf("%q is version %q", out, v)
		}
	}
}

func TestTheSettingsOfTheShimSayWhichRunscItCallsAndHow(t *testing.T) {
	var r runsc
	err := r.apply([]byte("binary_name = \"/opt/runsc\"\nroot = \"/run/r\"\n[runsc_config]\n  network = \"host\"\n  overlay2 = \"none\"\n"))
	if err != nil || r.Binary != "/opt/runsc" || r.Root != "/run/r" || r.network != "host" || r.overlay != "none" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestATerminalAndTheNodesNetworkAreProblems(t *testing.T) {
	own := &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}}
	for _, tc := range []struct {
		spec *specs.Spec
		want string
	}{
		{&specs.Spec{Process: &specs.Process{}, Linux: own}, ""},
		{&specs.Spec{Process: &specs.Process{Terminal: true}, Linux: own}, "terminal"},
		{&specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}, "the node's network"},
	} {
		got := strings.Join(problemsOf(engine.Container{Name: "c", Spec: tc.spec}), "; ")
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%+v: %q", tc.spec, got)
		}
	}
}

func TestTheTableOfProcessesIsRead(t *testing.T) {
	got, err := parseProcesses("UID       PID       PPID      PGID      C         TTY       STIME     TIME      CMD\n0         1         0         1         0         ?         14:04     20ms      sh\n0         12        1         1         0         ?         Nov27     0s        my program\n")
	if want := []process{{1, 0, "sh"}, {12, 1, "my program"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "PID PPID\n", "PID PPID CMD\n1 0\n", "PID PPID CMD\nx 0 sh\n"} {
		if got, err := parseProcesses(bad); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
}

func TestWhatAnExecSessionStartedIsToldFromAContainersOwn(t *testing.T) {
	own := []process{{PID: 7, PPID: 3, Cmd: "child"}, {PID: 3, Cmd: "init"}}
	if got := strayAmong(own); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	if got := strayAmong(append(own, process{PID: 9, Cmd: "sleep"}, process{PID: 10, PPID: 9, Cmd: "its child"})); len(got) != 1 || got[0].Cmd != "sleep" {
		t.Errorf("%+v", got)
	}
	if got := strayAmong(nil); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestVolumesThatTheSandboxKeepsItselfAreNotCaptured(t *testing.T) {
	const dirs = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/"
	found := volumesOf([]engine.Container{{ID: "1", Name: "a", Spec: &specs.Spec{Mounts: []specs.Mount{
		{Destination: "/data", Type: "bind", Source: dirs + "data"},
		{Destination: "/dev/shm", Type: "bind", Source: "/run/sandboxes/s/shm"},
		{Destination: "/kept", Type: "tmpfs", Source: dirs + "kept"},
	}}}, {ID: "2", Name: "b", Spec: &specs.Spec{Mounts: []specs.Mount{{Destination: "/d", Type: "bind", Source: dirs + "data"}}}}})
	if len(found) != 1 || found[0].name != "emptydir-data" || len(found[0].mounts) != 2 {
		t.Errorf("%+v", found)
	}
}

func TestThePaceIsLearnt(t *testing.T) {
	var p pace
	if got := p.expect(1 << 30); got != defaultBase+time.Second {
		t.Errorf("an unknown node: %v for 1 GiB", got)
	}
	for range 3 {
		p.learn(1<<20, 400*time.Millisecond)
		p.learn(200<<20, 1400*time.Millisecond)
	}
	if got := p.expect(100 << 20); got != 900*time.Millisecond {
		t.Errorf("%v for 100 MiB", got)
	}
}

// state is a file of runsc's, of a sandbox and a container.
func state(t *testing.T, values map[string]string) []byte {
	t.Helper()
	metadata, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	head := binary.BigEndian.AppendUint64([]byte(stateMagic), uint64(len(metadata)))
	return slices.Concat(head, metadata, []byte("the state"))
}

const savedSpecs = `{
	"__no_name_0":{"ociVersion":"1.2.1","annotations":{"io.kubernetes.cri.container-type":"sandbox","dev.gvisor.spec.cgroup-parent":"/pods/pod-old","dev.gvisor.flag.x":"y"}},
	"a":{"process":{"args":["x"]},"annotations":{"io.kubernetes.cri.container-type":"container"}}}`

func TestTheSavedSpecsGetTheNewPodsCgroupAndAllElseStays(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "sandbox"), filepath.Join(dir, "adapted")
	if err := os.Mkdir(from, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"checkpoint.img": state(t, map[string]string{"runsc_version": "1", "container_specs": savedSpecs}), "pages.img": []byte("pages")} {
		if err := os.WriteFile(filepath.Join(from, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // what an earlier try has left is replaced
		if err := Adapt(dir, map[string]string{"dev.gvisor.spec.cgroup-parent": "/pods/pod-new", "dev.gvisor.other": "1"}, to); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(to, "checkpoint.img"))
	if err != nil {
		t.Fatal(err)
	}
	r := bytes.NewReader(data)
	metadata, err := readMetadata(r)
	if err != nil {
		t.Fatal(err)
	}
	if rest := data[len(data)-r.Len():]; string(rest) != "the state" {
		t.Errorf("the state is %q", rest)
	}
	var values map[string]string
	if err := json.Unmarshal(metadata, &values); err != nil || values["runsc_version"] != "1" {
		t.Errorf("metadata %v, %v", values, err)
	}
	var got, want map[string]any
	if err := json.Unmarshal([]byte(values["container_specs"]), &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(strings.ReplaceAll(savedSpecs, "pod-old", "pod-new")), &want); err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(want)
	if !bytes.Equal(a, b) {
		t.Errorf("the specs are %s, want %s", a, b)
	}
	if pages, err := os.ReadFile(filepath.Join(to, "pages.img")); err != nil || string(pages) != "pages" {
		t.Errorf("%q, %v", pages, err)
	}
}

func TestWhatIsNoStateOfGVisorIsRefused(t *testing.T) {
	huge := binary.BigEndian.AppendUint64([]byte(stateMagic), maxMetadata+1)
	for name, data := range map[string][]byte{
		"nothing": nil, "another file": []byte("something else, long enough"), "metadata without end": huge,
		"metadata cut off": state(t, map[string]string{"a": "b"})[:18],
	} {
		if _, err := readMetadata(bytes.NewReader(data)); err == nil {
			t.Errorf("%s was read", name)
		}
	}
	for _, metadata := range []string{"", "[]", "{}", `{"container_specs":"x"}`, `{"container_specs":"{\"a\":{\"annotations\":1}}"}`} {
		if got, err := withAnnotations([]byte(metadata), nil); err == nil {
			t.Errorf("%s became %s", metadata, got)
		}
	}
}

func FuzzReadingAStateOfGVisor(f *testing.F) {
	f.Add([]byte(stateMagic + "\x00\x00\x00\x00\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if metadata, err := readMetadata(bytes.NewReader(data)); err == nil {
			withAnnotations(metadata, map[string]string{"dev.gvisor.spec.cgroup-parent": "/x"})
		}
	})
}
