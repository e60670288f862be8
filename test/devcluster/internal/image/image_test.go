package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
)

// unpack reads an archive into a map and fails when a directory comes after what is in it.
func unpack(t *testing.T, archive []byte) (files map[string]string, headers map[string]*tar.Header) {
	t.Helper()
	files, headers = map[string]string{}, map[string]*tar.Header{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name], headers[h.Name] = string(text), h
	}
}

func TestAnArchiveIsACompleteLayoutWhoseDigestsHold(t *testing.T) {
	archive, err := Busybox([]byte("program"), []string{"busybox", "sh", "cat"}).Archive()
	if err != nil {
		t.Fatal(err)
	}
	files, _ := unpack(t, archive)
	blob := func(d descriptor) string {
		t.Helper()
		text, ok := files["blobs/sha256/"+strings.TrimPrefix(d.Digest, "sha256:")]
		sum := sha256.Sum256([]byte(text))
		if !ok || len(text) != d.Size || "sha256:"+hex.EncodeToString(sum[:]) != d.Digest {
			t.Fatalf("blob %+v is missing or another", d)
		}
		return text
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal([]byte(files["index.json"]), &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index: %v, %+v", err, index)
	}
	if name := index.Manifests[0].Annotations["io.containerd.image.name"]; name != "localhost/busybox:1" {
		t.Errorf("name %q", name)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	if err := json.Unmarshal([]byte(blob(index.Manifests[0])), &manifest); err != nil || len(manifest.Layers) != 1 {
		t.Fatalf("manifest: %v, %+v", err, manifest)
	}
	var config struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal([]byte(blob(manifest.Config)), &config); err != nil {
		t.Fatal(err)
	}
	if len(config.RootFS.DiffIDs) != 1 || config.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
		t.Errorf("layers %v, want %s", config.RootFS.DiffIDs, manifest.Layers[0].Digest)
	}
	content, headers := unpack(t, []byte(blob(manifest.Layers[0])))
	if content["bin/busybox"] != "program" {
		t.Error("the program is not in the layer")
	}
	if headers["bin/sh"] == nil || headers["bin/sh"].Linkname != "busybox" {
		t.Errorf("sh is %+v", headers["bin/sh"])
	}
	if h := headers["tmp/"]; h == nil || h.Mode != 0o1777 {
		t.Errorf("/tmp is %+v", h)
	}
}

func TestTheSameContentGivesTheSameBytes(t *testing.T) {
	one, err := Pause([]byte("p")).Archive()
	if err != nil {
		t.Fatal(err)
	}
	other, err := Pause([]byte("p")).Archive()
	if err != nil || !bytes.Equal(one, other) {
		t.Errorf("two archives of one image differ (%v)", err)
	}
}

func TestPathsThatLeaveTheImageAreRefused(t *testing.T) {
	for _, path := range []string{"/etc/passwd", "../x", "a/../../x", "", "."} {
		if _, err := (Image{Name: "localhost/x:1", Files: []File{{Path: path}}}).Archive(); err == nil {
			t.Errorf("%q was accepted", path)
		}
	}
	if _, err := (Image{Name: "localhost/x:1", Files: []File{{Path: "a"}, {Path: "a"}}}).Archive(); err == nil {
		t.Error("two files of one name were accepted")
	}
}
