package ociruntime

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNothingIsWrittenToAVolumeThatIsNotThePodsOwn(t *testing.T) {
	pod := t.TempDir()
	root := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/parts")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	ofImage := "/var/lib/containerd/io.containerd.grpc.v1.cri/containers/id/volumes/x"
	mounts, err := json.Marshal([]mount{
		{Destination: "/scratch", Type: "bind", Source: root},
		{Destination: "/part", Type: "bind", Source: pod + "/volume-subpaths/parts/a/0"},
		{Destination: "/image", Type: "bind", Source: ofImage},
		{Destination: "/host", Type: "bind", Source: "/etc"},
		{Destination: "/config", Type: "bind", Source: pod + "/volumes/kubernetes.io~configmap/c"},
		{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm"},
		{Destination: "/tmpfs", Type: "tmpfs", Source: "tmpfs"},
	})
	if err != nil {
		t.Fatal(err)
	}
	b := &bundle{raw: map[string]json.RawMessage{"mounts": mounts}}
	for destination, want := range map[string]string{"/scratch": root, "/part": root, "/image": ofImage} {
		if got, err := b.volume("id", destination); got.Root != want || err != nil {
			t.Errorf("%s: %+v, %v, want %q", destination, got, err, want)
		}
	}
	for destination, want := range map[string]string{
		"/host": "does not belong to the new Pod", "/config": "does not belong to the new Pod", "/dev/shm": "does not belong to the new Pod",
		"/tmpfs": "mounts none there", "/nothing": "mounts none there",
	} {
		if got, err := b.volume("id", destination); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v, want an error that says %q", destination, got, err, want)
		}
	}
}

func TestAReadOnlyRootHasADirectoryToTurnOnForAsLongAsItIsRestored(t *testing.T) {
	root := t.TempDir()
	remove, err := turningPoint(root)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(root + "/tmp"); err != nil || !info.IsDir() {
		t.Errorf("there is none: %v", err)
	}
	remove()
	if _, err := os.Stat(root + "/tmp"); err == nil {
		t.Error("it stays")
	}
	if err := os.Mkdir(root+"/tmp", 0o755); err != nil {
		t.Fatal(err)
	}
	if remove, err = turningPoint(root); err != nil {
		t.Fatal(err)
	}
	remove()
	if _, err := os.Stat(root + "/tmp"); err != nil {
		t.Error("the image's own is gone")
	}
}
