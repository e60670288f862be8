package criu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"

	"github.com/google/go-cmp/cmp"
)

func bind(source, destination string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination}
}

func mountsOf(id, name string, m ...specs.Mount) engine.Container {
	return engine.Container{ID: id, Name: name, Spec: &specs.Spec{Mounts: m}}
}

func mkdir(t *testing.T, name string) string {
	t.Helper()
	if err := os.MkdirAll(name, 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestVolumesThatBelongToThePodAreFoundOnceEach(t *testing.T) {
	pod := t.TempDir()
	empty := mkdir(t, pod+"/volumes/kubernetes.io~empty-dir/cache")
	configured := mkdir(t, pod+"/volumes/kubernetes.io~configmap/configured")
	mkdir(t, pod+"/volumes/kubernetes.io~empty-dir/parts")
	shm := "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s/shm"
	ofImage := func(id, name string) string {
		return "/var/lib/containerd/io.containerd.grpc.v1.cri/containers/" + id + "/volumes/" + name
	}
	found, err := volumesOf([]engine.Container{
		mountsOf("ida", "a", bind(empty, "/cache"), bind(shm, "/dev/shm"), bind("/data", "/data"), bind(ofImage("ida", "x"), "/v"), bind(ofImage("ida", "y"), "/w"),
			bind(mkdir(t, pod+"/volume-subpaths/parts/a/0"), "/part")),
		mountsOf("idb", "b", bind(empty, "/c"), bind(shm, "/dev/shm"), bind(configured, "/x"), specs.Mount{Type: "tmpfs", Destination: "/dev/shm"},
			bind(mkdir(t, pod+"/volume-subpaths/parts/b/3"), "/other"), bind(mkdir(t, pod+"/volume-subpaths/configured/b/4"), "/file"),
			bind(ofImage("idb", "x"), "/v"), bind(ofImage("ida", "x"), "/of-another-container")),
		mountsOf("idc", "c", bind("/dev/shm", "/dev/shm")), // of the node, with hostIPC
	})
	if err != nil {
		t.Fatal(err)
	}
	mount := func(container, at string) checkpoint.VolumeMount {
		return checkpoint.VolumeMount{Container: container, Destination: at}
	}
	want := []volume{
		{"emptydir-cache", empty, []checkpoint.VolumeMount{mount("a", "/cache"), mount("b", "/c")}},
		{"dev-shm", shm, []checkpoint.VolumeMount{mount("a", "/dev/shm"), mount("b", "/dev/shm")}},
		{"image-a-1", ofImage("ida", "x"), []checkpoint.VolumeMount{mount("a", "/v")}},
		{"image-a-2", ofImage("ida", "y"), []checkpoint.VolumeMount{mount("a", "/w")}},
		{"emptydir-parts", filepath.Join(pod, "volumes/kubernetes.io~empty-dir/parts"), []checkpoint.VolumeMount{mount("a", "/part"), mount("b", "/other")}},
		{"image-b-1", ofImage("idb", "x"), []checkpoint.VolumeMount{mount("b", "/v")}},
	}
	if diff := cmp.Diff(want, found, cmp.AllowUnexported(volume{})); diff != "" {
		t.Errorf("(-want +found)\n%s", diff)
	}
}

func TestASubPathThatIsAFileOfAnEmptyDirIsRefusedBeforeTheFreeze(t *testing.T) {
	pod := t.TempDir()
	mkdir(t, pod+"/volumes/kubernetes.io~empty-dir/parts")
	part := mkdir(t, pod+"/volume-subpaths/parts/a") + "/0"
	if err := os.WriteFile(part, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := volumesOf([]engine.Container{mountsOf("ida", "a", bind(part, "/etc/part"))})
	if !errors.Is(err, engine.ErrUnsupported) || !strings.Contains(err.Error(), "container a, volume at /etc/part") {
		t.Errorf("got %v", err)
	}
}
