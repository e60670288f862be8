package ociruntime

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"podstasis.dev/stasis/internal/nodeapi"
)

func someone() nodeapi.Identity {
	return nodeapi.Identity{
		PodName: "again", PodNamespace: "ns", PodUID: "u", PodIP: "10.0.0.7", PodIPs: []string{"10.0.0.7"}, NodeName: "n", Container: "a",
		CheckpointName: "one", CheckpointUID: "v", RestoredAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Source: nodeapi.IdentitySource{PodName: "web", PodUID: "w"},
	}
}

func TestARestoredContainerFindsItsIdentityAndNotThatOfAnEarlierRestore(t *testing.T) {
	rootfs := t.TempDir()
	earlier := someone()
	earlier.PodName = strings.Repeat("x", 200)
	for _, id := range []nodeapi.Identity{earlier, someone()} {
		if err := writeIdentity(rootfs, id); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(rootfs, "etc/stasis/identity.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got nodeapi.Identity
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(someone(), got); diff != "" {
		t.Error(diff)
	}
	info, err := os.Stat(file)
	if err != nil || info.Size() != nodeapi.IdentitySize || info.Mode().Perm() != 0o444 {
		t.Errorf("%v, %v", info, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("beside it: %v, %v", entries, err)
	}
}

func TestAnIdentityIsWrittenNowhereOutsideTheContainer(t *testing.T) {
	for name, setUp := range map[string]func(rootfs, outside string) error{
		"the directory leads out": func(rootfs, outside string) error { return os.Symlink(outside, filepath.Join(rootfs, "etc/stasis")) },
		"the directory above it does": func(rootfs, outside string) error {
			os.Remove(filepath.Join(rootfs, "etc"))
			return os.Symlink(outside, filepath.Join(rootfs, "etc"))
		},
		"the file leads out": func(rootfs, outside string) error {
			os.Mkdir(filepath.Join(rootfs, "etc/stasis"), 0o755)
			return os.Symlink(outside+"/file", filepath.Join(rootfs, "etc/stasis/identity.json"))
		},
		"the file on its way there does": func(rootfs, outside string) error {
			os.Mkdir(filepath.Join(rootfs, "etc/stasis"), 0o755)
			return os.Symlink(outside+"/file", filepath.Join(rootfs, "etc/stasis/identity.json.new"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			rootfs, outside := t.TempDir(), t.TempDir()
			if err := os.Mkdir(filepath.Join(rootfs, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(outside+"/file", []byte("the node's"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := setUp(rootfs, outside); err != nil {
				t.Fatal(err)
			}
			err := writeIdentity(rootfs, someone())
			entries, readErr := os.ReadDir(outside)
			if readErr != nil || len(entries) != 1 {
				t.Errorf("outside are %v, %v (%v)", entries, readErr, err)
			}
			if data, readErr := os.ReadFile(outside + "/file"); string(data) != "the node's" {
				t.Errorf("the file outside holds %q, %v", data, readErr)
			}
			if info, statErr := os.Lstat(filepath.Join(rootfs, "etc/stasis/identity.json")); err == nil && (statErr != nil || !info.Mode().IsRegular()) {
				t.Errorf("it was written, and is %v, %v", info, statErr)
			}
		})
	}
}

func TestAnIdentityIsAlwaysOfOneLength(t *testing.T) {
	long := someone()
	long.Source.PodName = strings.Repeat("x", 5000)
	data, err := encodeIdentity(long)
	if err != nil || len(data) != nodeapi.IdentitySize || bytes.Contains(data, []byte("source")) || !bytes.Contains(data, []byte(`"podName": "again"`)) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	long.PodName = strings.Repeat("x", 5000)
	if _, err := encodeIdentity(long); err == nil {
		t.Error("one that is too long was encoded")
	}
}
