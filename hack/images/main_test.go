package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const exampleDockerfile = `# a comment
FROM scratch
COPY etc /etc
COPY --chmod=0755 bin/tool \
     /usr/local/bin/tool
COPY tree /payload/
COPY a b /data/
ENV A=1 B=2
LABEL org.opencontainers.image.title=example
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["/usr/local/bin/tool"]
CMD ["--help"]
`

// example makes a build context; all its files are as old as age says.
func example(t *testing.T, age time.Duration, umask os.FileMode) string {
	t.Helper()
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{
		"etc/passwd": 0o644, "bin/tool": 0o600, "tree/lib/one": 0o755, "tree/two": 0o640, "a": 0o666, "b": 0o644,
	} {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755&^umask); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte("content of "+name), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(at, mode&^umask); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(at, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("lib/one", filepath.Join(dir, "tree/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(exampleDockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mustBuild(t *testing.T, dir string) (string, string) {
	t.Helper()
	out := filepath.Join(dir, "out", "image.tar")
	digest, err := build(filepath.Join(dir, "Dockerfile"), dir, "localhost/example:dev", "amd64", out)
	if err != nil {
		t.Fatal(err)
	}
	return out, digest
}

func TestTheSameInputGivesTheSameBytesWhateverItsAgeAndUmask(t *testing.T) {
	one, digestOne := mustBuild(t, example(t, 0, 0))
	two, digestTwo := mustBuild(t, example(t, 48*time.Hour, 0o027))
	if digestOne != digestTwo {
		t.Errorf("digests %s and %s", digestOne, digestTwo)
	}
	a, errA := os.ReadFile(one)
	b, errB := os.ReadFile(two)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("the archives differ (%v, %v)", errA, errB)
	}
}

func readTar(t *testing.T, r io.Reader) map[string]*tar.Header {
	t.Helper()
	headers := map[string]*tar.Header{}
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return headers
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		header.PAXRecords = map[string]string{"content": string(content)} // kept for the test
		headers[header.Name] = header
	}
}

func TestTheArchiveIsAnOCILayoutThatHoldsWhatTheDockerfileSays(t *testing.T) {
	out, digest := mustBuild(t, example(t, 0, 0))
	file, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	archive := readTar(t, file)
	content := func(name string) []byte {
		t.Helper()
		if archive[name] == nil {
			t.Fatalf("the archive lacks %s", name)
		}
		return []byte(archive[name].PAXRecords["content"])
	}
	blob := func(hash v1.Hash) []byte { return content("blobs/sha256/" + hash.Hex) }

	var index v1.IndexManifest
	if err := json.Unmarshal(content("index.json"), &index); err != nil {
		t.Fatal(err)
	}
	described := index.Manifests[0]
	if described.Digest.String() != digest || described.Annotations["io.containerd.image.name"] != "localhost/example:dev" {
		t.Errorf("the index describes %+v", described)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(blob(described.Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	var config v1.ConfigFile
	if err := json.Unmarshal(blob(manifest.Config.Digest), &config); err != nil {
		t.Fatal(err)
	}
	if config.Architecture != "amd64" || config.Config.User != "65532:65532" || config.Config.Entrypoint[0] != "/usr/local/bin/tool" ||
		strings.Join(config.Config.Env, ",") != "A=1,B=2" || config.Config.WorkingDir != "/data" || config.Config.Cmd[0] != "--help" {
		t.Errorf("config %+v", config)
	}
	files := map[string]*tar.Header{}
	for i, layer := range manifest.Layers {
		if layer.Digest != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d: diff id %s of digest %s", i, config.RootFS.DiffIDs[i], layer.Digest)
		}
		for name, header := range readTar(t, bytes.NewReader(blob(layer.Digest))) {
			files[name] = header
		}
	}
	for name, mode := range map[string]int64{
		"etc/": 0o755, "etc/passwd": 0o644, "usr/local/bin/": 0o755, "usr/local/bin/tool": 0o755,
		"payload/lib/one": 0o755, "payload/two": 0o644, "data/a": 0o644, "data/b": 0o644, "payload/link": 0o777,
	} {
		switch header := files[name]; {
		case header == nil:
			t.Errorf("the image lacks %s", name)
		case header.Mode != mode || header.Uid != 0 || header.Gid != 0:
			t.Errorf("%s has mode %o, owner %d:%d", name, header.Mode, header.Uid, header.Gid)
		}
	}
	if link := files["payload/link"]; link != nil && link.Linkname != "lib/one" {
		t.Errorf("the link leads to %q", link.Linkname)
	}
}

func TestWhatIsNotUnderstoodIsRefusedWithItsLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                                       "FROM scratch",
		"FROM debian":                            "FROM scratch",
		"FROM scratch\nRUN ls":                   "line 2: RUN",
		"FROM scratch\n\nCOPY --chown=1 a /a":    "line 3",
		"FROM scratch\nENTRYPOINT /bin/sh":       "JSON array",
		"FROM scratch\nCOPY a relative":          "must be absolute",
		"FROM scratch\nCOPY absent /absent":      "absent",
		"FROM scratch\nCOPY ../outside /outside": "COPY",
		"FROM scratch\nCOPY a b /c":              "slash",
		"FROM scratch\nENV X":                    "KEY=VALUE",
	} {
		dir := example(t, 0, 0)
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(dir, "image.tar")
		_, err := build(filepath.Join(dir, "Dockerfile"), dir, "localhost/x:dev", "amd64", out)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one that says %q", text, err, want)
		}
		if _, statErr := os.Stat(out); statErr == nil {
			t.Errorf("%q left an archive", text)
		}
	}
}

func TestANameWithoutHostOrTagIsRefused(t *testing.T) {
	dir := example(t, 0, 0)
	for _, name := range []string{"example", "localhost/example", "example:dev", "localhost/example:"} {
		if _, err := build(filepath.Join(dir, "Dockerfile"), dir, name, "amd64", filepath.Join(dir, "image.tar")); err == nil {
			t.Errorf("%q was taken", name)
		}
	}
}
