package checkpoint_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
)

// sealed makes a checkpoint of two files and returns its directory and digest.
func sealed(t *testing.T) (dir, digest string) {
	t.Helper()
	dir = t.TempDir()
	write(t, filepath.Join(dir, "containers/a/rootfs.tar"), "rootfs")
	write(t, filepath.Join(dir, "containers/a/criu/pages-1.img"), strings.Repeat("page", 5000))
	m := &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a", Rootfs: "containers/a/rootfs.tar"}}}
	digest, err := checkpoint.Seal(context.Background(), dir, m)
	if err != nil {
		t.Fatal(err)
	}
	return dir, digest
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestASealedDirectoryVerifies(t *testing.T) {
	dir, digest := sealed(t)
	m, err := checkpoint.Verify(context.Background(), dir, digest)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Files) != 2 || m.LogicalBytes() != 20006 {
		t.Errorf("it lists %+v", m.Files)
	}
	if _, again, err := checkpoint.ReadManifest(dir); err != nil || again != digest {
		t.Errorf("read again: digest %s, %v", again, err)
	}
}

func TestAnyChangeIsFoundAndNamed(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string)
		want   error
		names  string
	}{
		"a bit flipped": {func(t *testing.T, dir string) {
			write(t, dir+"/containers/a/rootfs.tar", "rootft")
		}, checkpoint.ErrCorrupt, "rootfs.tar"},
		"a byte more": {func(t *testing.T, dir string) {
			write(t, dir+"/containers/a/rootfs.tar", "rootfsx")
		}, checkpoint.ErrCorrupt, "rootfs.tar"},
		"a byte less": {func(t *testing.T, dir string) {
			write(t, dir+"/containers/a/rootfs.tar", "rootf")
		}, checkpoint.ErrCorrupt, "rootfs.tar"},
		"a file more": {func(t *testing.T, dir string) {
			write(t, dir+"/containers/a/extra", "x")
		}, checkpoint.ErrCorrupt, "extra"},
		"a file less": {func(t *testing.T, dir string) {
			os.Remove(dir + "/containers/a/rootfs.tar")
		}, checkpoint.ErrMissing, "rootfs.tar"},
		"a link for a file": {func(t *testing.T, dir string) {
			os.Rename(dir+"/containers/a/rootfs.tar", dir+"/../elsewhere")
			os.Symlink("../../../elsewhere", dir+"/containers/a/rootfs.tar")
		}, checkpoint.ErrCorrupt, "rootfs.tar"},
		"a directory for a file": {func(t *testing.T, dir string) {
			os.Remove(dir + "/containers/a/rootfs.tar")
			os.Mkdir(dir+"/containers/a/rootfs.tar", 0o700)
		}, checkpoint.ErrCorrupt, "rootfs.tar"},
		"no manifest":   {func(t *testing.T, dir string) { os.Remove(dir + "/manifest.json") }, checkpoint.ErrMissing, "manifest.json"},
		"no directory":  {func(t *testing.T, dir string) { os.RemoveAll(dir) }, checkpoint.ErrMissing, ""},
		"huge manifest": {func(t *testing.T, dir string) { os.Truncate(dir+"/manifest.json", 1<<30) }, checkpoint.ErrCorrupt, "manifest.json"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, digest := sealed(t)
			c.change(t, dir)
			_, err := checkpoint.Verify(context.Background(), dir, digest)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.names) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAnotherManifestIsRefusedBeforeItIsBelieved(t *testing.T) {
	dir, digest := sealed(t)
	other, _ := sealed(t)
	write(t, other+"/containers/a/more", "x")
	if _, err := checkpoint.Seal(context.Background(), other, &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "b"}}}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(other + "/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/manifest.json", string(data))
	if _, err := checkpoint.Verify(context.Background(), dir, digest); !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), digest) {
		t.Errorf("got %v", err)
	}
}

func TestAnInterruptedVerificationSaysSo(t *testing.T) {
	dir, digest := sealed(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := checkpoint.Verify(ctx, dir, digest); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestManifestsWithNamesThatLeadElsewhereAreRefused(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0", 64)
	for name, manifest := range map[string]string{
		"no containers":             `{"formatVersion":1}`,
		"a newer format":            `{"formatVersion":2,"containers":[{"name":"a"}]}`,
		"a container with a slash":  `{"formatVersion":1,"containers":[{"name":"../a"}]}`,
		"a container twice":         `{"formatVersion":1,"containers":[{"name":"a"},{"name":"a"}]}`,
		"an absolute file":          `{"formatVersion":1,"containers":[{"name":"a"}],"files":[{"path":"/etc/passwd","digest":"` + digest + `"}]}`,
		"a file above the root":     `{"formatVersion":1,"containers":[{"name":"a"}],"files":[{"path":"a/../../b","digest":"` + digest + `"}]}`,
		"a file with a bad digest":  `{"formatVersion":1,"containers":[{"name":"a"}],"files":[{"path":"a","digest":"sha256:0"}]}`,
		"a file of negative size":   `{"formatVersion":1,"containers":[{"name":"a"}],"files":[{"path":"a","size":-1,"digest":"` + digest + `"}]}`,
		"the manifest itself":       `{"formatVersion":1,"containers":[{"name":"a"}],"files":[{"path":"manifest.json","digest":"` + digest + `"}]}`,
		"a root that is not listed": `{"formatVersion":1,"containers":[{"name":"a","rootfs":"../../x"}]}`,
		"a volume not listed":       `{"formatVersion":1,"containers":[{"name":"a"}],"volumes":[{"name":"v","archive":"/x"}]}`,
		"no JSON":                   `{`,
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := checkpoint.DecodeManifest([]byte(manifest)); err == nil {
				t.Errorf("it was accepted: %+v", m)
			}
		})
	}
}

func FuzzDecodeManifest(f *testing.F) {
	f.Add([]byte(`{"formatVersion":1,"containers":[{"name":"a","rootfs":"r"}],"files":[{"path":"r","size":1,"digest":"sha256:` + strings.Repeat("0", 64) + `"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := checkpoint.DecodeManifest(data)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if !filepath.IsLocal(file.Path) {
				t.Errorf("accepted the file name %q", file.Path)
			}
		}
		for _, c := range m.Containers {
			if !filepath.IsLocal(c.Name) || strings.Contains(c.Name, "/") {
				t.Errorf("accepted the container name %q", c.Name)
			}
		}
	})
}
