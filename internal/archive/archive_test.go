package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

const object = `{"kind":"PodCheckpoint","metadata":{"name":"c1"}}`

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sealed makes a checkpoint of two containers.
func sealed(t testing.TB) (dir string, m *checkpoint.Manifest, digest string) {
	t.Helper()
	dir = t.TempDir()
	for name, size := range map[string]int{
		"containers/a/config.json": 700, "containers/a/criu/pages-1.img": 40_000, "containers/a/criu/core-1.img": 511,
		"containers/a/criu/inventory.img": 512, "containers/a/criu/empty.img": 0, "containers/a/rootfs.tar": 10_240, "containers/a/stats-dump": 60, "containers/a/dump.log": 900,
		"containers/b/config.json": 1, "containers/b/criu/inventory.img": 513, "containers/b/rootfs.tar": 1024, "volumes/emptydir-v.tar": 3000,
	} {
		data := make([]byte, size)
		rand.NewChaCha8([32]byte([]byte(strings.Repeat(name, 3))[:32])).Read(data)
		if strings.HasSuffix(name, "config.json") {
			data = []byte(`{"annotations":{"io.kubernetes.cri.container-name":"` + strings.Split(name, "/")[1] + `"}}`)
		}
		must(t, os.MkdirAll(filepath.Dir(dir+"/"+name), 0o700))
		must(t, os.WriteFile(dir+"/"+name, data, 0o600))
	}
	created := time.Unix(1_700_000_000, 0).UTC()
	m = &checkpoint.Manifest{
		Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, Runtime: checkpoint.Program{Name: "runc", Version: "1.5.2"},
		CutTime: time.Unix(1_700_000_100, 123).UTC(),
		Containers: []checkpoint.Container{
			{Name: "a", ID: "abc", Image: "img:1", ImageID: "sha256:1", Rootfs: "containers/a/rootfs.tar", Created: &created},
			{Name: "b", ID: "def", Image: "img:2", Rootfs: "containers/b/rootfs.tar"},
		},
		Volumes: []checkpoint.Volume{{Name: "v", Archive: "volumes/emptydir-v.tar"}},
	}
	digest, err := checkpoint.Seal(context.Background(), dir, m)
	must(t, err)
	return dir, m, digest
}

func rootFS(t testing.TB, dir string) fs.FS {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return root.FS()
}

func podArchive(t testing.TB) (*archive.Archive, []byte) {
	t.Helper()
	dir, m, _ := sealed(t)
	a, err := archive.Open(rootFS(t, dir), m, []byte(object))
	must(t, err)
	return a, readAll(t, a)
}

func readAll(t testing.TB, a *archive.Archive) []byte {
	t.Helper()
	data, err := io.ReadAll(a.NewReader())
	must(t, err)
	if int64(len(data)) != a.Size() {
		t.Fatalf("it has %d bytes, and says %d", len(data), a.Size())
	}
	return data
}

func unpack(t testing.TB, data []byte, l archive.Limits) (string, *archive.Unpacked, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	u, err := archive.Unpack(context.Background(), bytes.NewReader(data), root, l)
	return dir, u, err
}

func TestAPodsArchiveUnpacksToTheSameCheckpoint(t *testing.T) {
	_, data := podArchive(t)
	_, _, digest := sealed(t)
	dir, u, err := unpack(t, data, archive.Limits{})
	must(t, err)
	if string(u.Object) != object || u.ManifestDigest != digest {
		t.Errorf("the object is %s, the manifest's digest %s; want %s and %s", u.Object, u.ManifestDigest, object, digest)
	}
	if _, err := checkpoint.Verify(context.Background(), dir, digest); err != nil {
		t.Error(err)
	}
}

func TestTheSameCheckpointIsTheSameBytesAndTag(t *testing.T) {
	one, first := podArchive(t)
	two, second := podArchive(t)
	if !bytes.Equal(first, second) || one.ETag() != two.ETag() {
		t.Error("two archives of one checkpoint differ")
	}
	dir, m, _ := sealed(t)
	other, err := archive.Open(rootFS(t, dir), m, []byte(`{"kind":"PodCheckpoint","metadata":{"name":"c2"}}`))
	must(t, err)
	if other.ETag() == one.ETag() {
		t.Error("archives with different bytes have one tag")
	}
}

// opened is a file system that notes what is opened.
type opened struct {
	fs.FS
	names *[]string
}

func (o opened) Open(name string) (fs.File, error) {
	*o.names = append(*o.names, name)
	return o.FS.Open(name)
}

func (o opened) Lstat(name string) (fs.FileInfo, error) { return fs.Lstat(o.FS, name) }
func (o opened) ReadLink(name string) (string, error)   { return fs.ReadLink(o.FS, name) }

func TestAnyRangeIsReadWithoutWhatIsBeforeIt(t *testing.T) {
	dir, m, _ := sealed(t)
	var names []string
	a, err := archive.Open(opened{rootFS(t, dir), &names}, m, []byte(object))
	must(t, err)
	whole := readAll(t, a)
	random := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		from := random.Int64N(a.Size())
		buf := make([]byte, random.Int64N(min(a.Size()-from, 3000))+1)
		n, err := a.ReadAt(buf, from)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if n != len(buf) || !bytes.Equal(buf, whole[from:from+int64(n)]) {
			t.Fatalf("%d bytes from %d on are not those of the whole", len(buf), from)
		}
	}
	names = nil
	last := m.Files[len(m.Files)-1]
	if _, err := a.ReadAt(make([]byte, 100), a.Size()-1024-3072); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(names, []string{last.Path}) {
		t.Errorf("to read of the last file it opened %q", names)
	}
	if n, err := a.ReadAt(make([]byte, 10), a.Size()-5); n != 5 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
}

func TestOneContainersArchiveHasTheLayoutOfTheKubeletsEndpoint(t *testing.T) {
	dir, m, _ := sealed(t)
	a, err := archive.OpenContainer(rootFS(t, dir), m, "a")
	must(t, err)
	members := map[string][]byte{}
	var order []string
	for r := tar.NewReader(bytes.NewReader(readAll(t, a))); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		members[h.Name] = data
		order = append(order, h.Name)
	}
	want := []string{"config.dump", "status.dump", "spec.dump", "stats-dump", "dump.log", "checkpoint/", "checkpoint/core-1.img",
		"checkpoint/empty.img", "checkpoint/inventory.img", "checkpoint/pages-1.img", "rootfs-diff.tar"}
	if !slices.Equal(order, want) {
		t.Errorf("its members are %q, want %q", order, want)
	}
	var config map[string]any
	must(t, json.Unmarshal(members["config.dump"], &config))
	for key, want := range map[string]string{"id": "abc", "name": "a", "rootfsImageName": "img:1", "rootfsImageRef": "sha256:1",
		"runtime": "runc", "createdTime": "2023-11-14T22:13:20Z", "checkpointedTime": "2023-11-14T22:15:00.000000123Z"} {
		if config[key] != want {
			t.Errorf("config.dump says %s is %v, want %s", key, config[key], want)
		}
	}
	rootfs, err := os.ReadFile(dir + "/containers/a/rootfs.tar")
	must(t, err)
	if !bytes.Equal(members["rootfs-diff.tar"], rootfs) {
		t.Error("the difference of the root file system is other bytes than the checkpoint's")
	}
	if _, err := archive.OpenContainer(rootFS(t, dir), m, "c"); !errors.Is(err, archive.ErrNoContainer) || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("of a container that is not there: %v", err)
	}
}

func TestFilesThatAreGoneOrOtherEndTheReadWithAnError(t *testing.T) {
	for name, spoil := range map[string]func(file string){
		"removed": func(file string) { os.Remove(file) },
		"shorter": func(file string) { os.Truncate(file, 10) },
		"a link":  func(file string) { os.Rename(file, file+"x"); os.Symlink("pages-1.imgx", file) },
	} {
		t.Run(name, func(t *testing.T) {
			dir, m, _ := sealed(t)
			a, err := archive.Open(rootFS(t, dir), m, []byte(object))
			must(t, err)
			spoil(dir + "/containers/a/criu/pages-1.img")
			if _, err := io.ReadAll(a.NewReader()); !errors.Is(err, archive.ErrChanged) {
				t.Errorf("got %v", err)
			}
		})
	}
	a, _ := podArchive(t)
	r := a.NewReader()
	_, err := io.CopyN(io.Discard, r, 4096)
	must(t, err)
	must(t, r.Close())
	if _, err := io.ReadAll(r); err == nil {
		t.Error("a reader that was closed read on")
	}
}

// zeros is a file system with one file of zeros, of any size.
type zeros struct {
	fs.FS
	size int64
}

type zeroFile struct{ fs.File }

type zeroInfo struct {
	fs.FileInfo
	size int64
}

func (z zeroInfo) Size() int64 { return z.size }

func (z zeros) Lstat(name string) (fs.FileInfo, error) {
	i, err := fs.Lstat(z.FS, name)
	if err == nil && strings.HasSuffix(name, "pages-1.img") {
		i = zeroInfo{i, z.size}
	}
	return i, err
}
func (z zeros) ReadLink(name string) (string, error) { return fs.ReadLink(z.FS, name) }
func (z zeros) Open(name string) (fs.File, error) {
	f, err := z.FS.Open(name)
	if err == nil && strings.HasSuffix(name, "pages-1.img") {
		return zeroFile{f}, nil
	}
	return f, err
}
func (z zeroFile) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func TestAFileOfMoreThanEightGibibytesIsRead(t *testing.T) {
	dir, m, _ := sealed(t)
	const size = 9 << 30
	for i := range m.Files {
		if strings.HasSuffix(m.Files[i].Path, "pages-1.img") {
			m.Files[i].Size = size
		}
	}
	a, err := archive.Open(zeros{rootFS(t, dir), size}, m, []byte(object))
	must(t, err)
	r := tar.NewReader(a.NewReader())
	for {
		h, err := r.Next()
		must(t, err)
		if strings.HasSuffix(h.Name, "pages-1.img") {
			if h.Size != size {
				t.Errorf("its size is %d", h.Size)
			}
			return // Next would seek over it: the reader is a Seeker
		}
	}
}

func FuzzUnpack(f *testing.F) {
	dir := f.TempDir()
	must(f, os.MkdirAll(dir+"/containers/a/criu", 0o700))
	must(f, os.WriteFile(dir+"/containers/a/criu/inventory.img", []byte("x"), 0o600))
	m := &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}
	_, err := checkpoint.Seal(context.Background(), dir, m)
	must(f, err)
	small, err := archive.Open(rootFS(f, dir), m, []byte("{}"))
	must(f, err)
	f.Add(readAll(f, small))
	f.Add(kubeletArchive(f, nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		must(t, os.Mkdir(top+"/in", 0o700))
		root, err := os.OpenRoot(top + "/in")
		must(t, err)
		defer root.Close()
		limits := archive.Limits{Bytes: 1 << 20, Files: 50}
		u, err := archive.Unpack(context.Background(), bytes.NewReader(data), root, limits)
		if entries, _ := os.ReadDir(top); len(entries) != 1 {
			t.Fatal("something was made beside the directory")
		}
		file, openErr := archive.OpenFile(bytes.NewReader(data), int64(len(data)))
		if err == nil {
			if _, err := checkpoint.Verify(context.Background(), top+"/in", u.ManifestDigest); err != nil {
				t.Fatalf("it was unpacked and does not verify: %v", err)
			}
			if openErr != nil {
				t.Fatalf("it can be unpacked and not be opened: %v", openErr)
			}
		}
		if openErr == nil {
			fs.WalkDir(file.FS, ".", func(name string, d fs.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					fs.ReadFile(file.FS, name) // an error, or not: it comes back
				}
				return err
			})
		}
	})
}
