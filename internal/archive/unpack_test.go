package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

// entry is a member to be, of a regular file unless its header says otherwise.
type entry struct {
	header tar.Header
	data   string
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		e.header.Size = int64(len(e.data))
		e.header.Mode = 0o600
		must(t, w.WriteHeader(&e.header))
		_, err := io.WriteString(w, e.data)
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

// members takes an archive apart.
func members(t testing.TB, data []byte) (entries []entry) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return entries
		}
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		entries = append(entries, entry{*h, string(content)})
	}
}

func TestPodArchivesThatAreNotAsTheyShouldBeAreRefused(t *testing.T) {
	_, whole := podArchive(t)
	find := func(entries []entry, name string) *entry {
		for i := range entries {
			if strings.HasSuffix(entries[i].header.Name, name) {
				return &entries[i]
			}
		}
		t.Fatalf("no %s", name)
		return nil
	}
	edit := func(change func(e []entry) []entry) []byte { return tarOf(t, change(members(t, whole))...) }
	for name, c := range map[string]struct {
		data []byte
		want error
		says string
	}{
		"a bit flipped": {edit(func(e []entry) []entry {
			p := find(e, "pages-1.img")
			p.data = p.data[:100] + "!" + p.data[101:]
			return e
		}), checkpoint.ErrCorrupt, "pages-1.img"},
		"a file shorter": {edit(func(e []entry) []entry {
			p := find(e, "pages-1.img")
			p.data = p.data[:100]
			return e
		}), checkpoint.ErrCorrupt, "pages-1.img"},
		"a file less":          {edit(func(e []entry) []entry { return e[:len(e)-1] }), archive.ErrInvalid, "emptydir-v.tar"},
		"a file more":          {edit(func(e []entry) []entry { return append(e, entry{tar.Header{Name: "containers/a/criu/x.img"}, ""}) }), archive.ErrInvalid, "x.img"},
		"a file twice":         {edit(func(e []entry) []entry { return append(e, e[len(e)-1]) }), archive.ErrInvalid, "emptydir-v.tar"},
		"another order":        {edit(func(e []entry) []entry { e[2], e[3] = e[3], e[2]; return e }), archive.ErrInvalid, "belongs"},
		"the manifest missing": {edit(func(e []entry) []entry { return append(e[:1], e[2:]...) }), archive.ErrInvalid, "manifest.json"},
		"a link": {edit(func(e []entry) []entry {
			*find(e, "core-1.img") = entry{header: tar.Header{Typeflag: tar.TypeSymlink, Name: "containers/a/criu/core-1.img", Linkname: "/etc/shadow"}}
			return e
		}), archive.ErrInvalid, "regular"},
		"a device": {edit(func(e []entry) []entry {
			*find(e, "core-1.img") = entry{header: tar.Header{Typeflag: tar.TypeChar, Name: "containers/a/criu/core-1.img"}}
			return e
		}), archive.ErrInvalid, "regular"},
		"a manifest that is none":      {edit(func(e []entry) []entry { e[1].data = "{"; return e }), archive.ErrInvalid, "manifest.json"},
		"a file outside of the layout": {withFile(t, whole, "evil"), archive.ErrInvalid, "evil"},
		"a file above the directory":   {withFile(t, whole, "../evil"), archive.ErrInvalid, "evil"},
		"a hidden file":                {withFile(t, whole, "containers/a/criu/.evil"), archive.ErrInvalid, "evil"},
		"a file of no container":       {withFile(t, whole, "containers/z/criu/evil.img"), archive.ErrInvalid, "evil"},
		"cut off in a file":            {whole[:len(whole)-3000], archive.ErrInvalid, ""},
		"cut off before its end":       {whole[:len(whole)-1024], archive.ErrInvalid, "cut off"},
		"cut off in its end":           {whole[:len(whole)-512], archive.ErrInvalid, "cut off"},
		"cut off in its last block":    {whole[:len(whole)-100], archive.ErrInvalid, ""},
		"something after its end":      {append(bytes.Clone(whole), "evil"...), archive.ErrInvalid, "after"},
		"zeros without end after it":   {append(bytes.Clone(whole), make([]byte, 2<<20)...), archive.ErrInvalid, "after"},
		"nothing":                      {nil, archive.ErrInvalid, ""},
		"no tar":                       {bytes.Repeat([]byte("x"), 4096), archive.ErrInvalid, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _, err := unpack(t, c.data, archive.Limits{})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(filepath.Join(filepath.Dir(dir), "evil")); err == nil {
				t.Error("a file was made outside of the directory")
			}
			if _, err := os.Lstat(dir + "/manifest.json"); err == nil && name != "something after its end" {
				t.Error("there is a manifest: it would be taken for a checkpoint")
			}
		})
	}
}

// withFile is an archive with a file of any name that its manifest lists.
func withFile(t *testing.T, whole []byte, name string) []byte {
	e := members(t, whole)
	e[1].data = strings.Replace(e[1].data, `"files": [`, `"files": [{"path":"`+name+`","size":0,"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},`, 1)
	return tarOf(t, append(e[:2:2], append([]entry{{header: tar.Header{Name: name}}}, e[2:]...)...)...)
}

func TestArchivesThatHoldMoreThanTheyMayAreRefused(t *testing.T) {
	_, whole := podArchive(t)
	for name, l := range map[string]archive.Limits{"bytes": {Bytes: 50_000}, "files": {Files: 5}} {
		if _, _, err := unpack(t, whole, l); !errors.Is(err, archive.ErrTooLarge) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, _, err := unpack(t, whole, archive.Limits{Bytes: 80_000, Files: 20}); err != nil {
		t.Error(err)
	}
	bomb := kubeletArchive(t, func(files map[string]string) { files["rootfs-diff.tar"] = zipped(t, strings.Repeat("\x00", 10<<20)) })
	if _, _, err := unpack(t, bomb, archive.Limits{Bytes: 1 << 20}); !errors.Is(err, archive.ErrTooLarge) {
		t.Errorf("of a compressed file that swells: got %v", err)
	}
	object := tarOf(t, entry{tar.Header{Name: "podcheckpoint.json"}, strings.Repeat(" ", 5<<20)})
	if _, _, err := unpack(t, object, archive.Limits{}); !errors.Is(err, archive.ErrTooLarge) {
		t.Errorf("of an object without end: got %v", err)
	}
}

func zipped(t testing.TB, s string) string {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	io.WriteString(w, s)
	must(t, w.Close())
	return buf.String()
}

// image is a CRIU image of one entry.
func image(entry ...byte) string {
	b := []byte("\x19\x43\x56\x54\x07\x10\x05\x55")
	b = binary.LittleEndian.AppendUint32(b, uint32(len(entry)))
	return string(append(b, entry...))
}

const config = `{"id":"0123456789ab","name":"k8s_web","rootfsImage":"nginx:1","rootfsImageRef":"sha256:2","rootfsImageName":"nginx:1",
	"runtime":"io.containerd.runc.v2","createdTime":"2026-01-02T03:04:05Z","checkpointedTime":"2026-01-02T04:05:06Z","restoredTime":"0001-01-01T00:00:00Z","restored":false}`

const spec = `{"process":{"args":["nginx","-g"],"cwd":"/","user":{"uid":101,"gid":102}},"annotations":{"io.kubernetes.cri.container-name":"web",
	"io.kubernetes.cri.sandbox-name":"shop","io.kubernetes.cri.sandbox-namespace":"prod","io.kubernetes.cri.sandbox-uid":"u1","io.kubernetes.cri.sandbox-id":"s1"}}`

func rootfsDiff(t testing.TB) string {
	return string(tarOf(t, entry{tar.Header{Name: "etc/new"}, "new"}))
}

// kubeletArchive is one as containerd writes it, with changes.
func kubeletArchive(t testing.TB, change func(files map[string]string)) []byte {
	t.Helper()
	files := map[string]string{
		"config.dump": config, "spec.dump": spec, "status.dump": "{}", "status": "{}", "container.log": "hello\n",
		"stats-dump":               image(0x0a, 4, 0x08, 5, 0x10, 100),
		"dump.log":                 "(00.000000) Version: 4.2.1 (gitid 0)\n(00.000010) Running on node-1 Linux 6.18.3 #1 SMP x86_64\n",
		"checkpoint/inventory.img": image(8, 1), "checkpoint/core-1.img": image(8, 1), "checkpoint/pages-1.img": "pages",
		"rootfs-diff.tar": zipped(t, rootfsDiff(t)),
	}
	if change != nil {
		change(files)
	}
	entries := []entry{{header: tar.Header{Typeflag: tar.TypeDir, Name: "checkpoint/"}}}
	for name, data := range files {
		entries = append(entries, entry{tar.Header{Name: name}, data})
	}
	return tarOf(t, entries...)
}

func TestAKubeletsArchiveBecomesACheckpointOfThatContainer(t *testing.T) {
	data := kubeletArchive(t, nil)
	dir, u, err := unpack(t, data, archive.Limits{})
	must(t, err)
	m, err := checkpoint.Verify(context.Background(), dir, u.ManifestDigest)
	must(t, err)
	file, err := archive.OpenFile(bytes.NewReader(data), int64(len(data)))
	must(t, err)
	for where, m := range map[string]*checkpoint.Manifest{"unpacked": m, "in place": file.Manifest} {
		c := m.Containers[0]
		if c.Name != "web" || c.ID != "0123456789ab" || c.Image != "nginx:1" || c.Process.UID != 101 || c.Process.Args[0] != "nginx" || c.Rootfs != "containers/web/rootfs.tar" {
			t.Errorf("%s: the container is %+v", where, c)
		}
		if m.Engine.Version != "4.2.1" || m.Platform.Kernel != "6.18.3" || m.Platform.Architecture != "amd64" || m.FreezeDuration != 100*time.Microsecond {
			t.Errorf("%s: engine %+v, platform %+v, frozen for %v", where, m.Engine, m.Platform, m.FreezeDuration)
		}
		if m.Sandbox.Name != "shop" || m.Sandbox.Namespace != "prod" || m.Sandbox.UID != "u1" || !m.CutTime.Equal(time.Date(2026, 1, 2, 4, 5, 6, 0, time.UTC)) {
			t.Errorf("%s: the sandbox is %+v, the cut %v", where, m.Sandbox, m.CutTime)
		}
	}
	must(t, fstest.TestFS(file.FS, "manifest.json", "containers/web/config.json", "containers/web/criu/pages-1.img", "containers/web/container.log", "containers/web/dump.log"))
	for where, dir := range map[string]fs.FS{"unpacked": os.DirFS(dir), "in place": file.FS} {
		for name, want := range map[string]string{"rootfs.tar": rootfsDiff(t), "config.json": spec, "criu/pages-1.img": "pages"} {
			if got, err := fs.ReadFile(dir, "containers/web/"+name); err != nil || string(got) != want {
				t.Errorf("%s: %s holds %.60q, %v", where, name, got, err)
			}
		}
	}
}

func TestRemovedFilesThatAKubeletsArchiveListsBesideTheDifferenceAreInIt(t *testing.T) {
	data := kubeletArchive(t, func(files map[string]string) {
		files["deleted.files"] = `["/etc/gone","usr/too"]`
		files["rootfs-diff.tar"] = rootfsDiff(t)
	})
	dir, _, err := unpack(t, data, archive.Limits{})
	must(t, err)
	file, err := archive.OpenFile(bytes.NewReader(data), int64(len(data)))
	must(t, err)
	for where, dir := range map[string]fs.FS{"unpacked": os.DirFS(dir), "in place": file.FS} {
		data, err := fs.ReadFile(dir, "containers/web/rootfs.tar")
		must(t, err)
		var names []string
		for _, e := range members(t, data) {
			names = append(names, e.header.Name)
		}
		if strings.Join(names, " ") != "etc/.wh.gone usr/.wh.too etc/new" {
			t.Errorf("%s: the difference is %q", where, names)
		}
	}
}

func TestKubeletArchivesThatAreNotAsTheyShouldBeAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(files map[string]string)
		says   string
	}{
		"no spec":                     {func(f map[string]string) { delete(f, "spec.dump") }, "spec.dump"},
		"no config":                   {func(f map[string]string) { delete(f, "config.dump") }, "config.dump"},
		"no images":                   {func(f map[string]string) { delete(f, "checkpoint/inventory.img") }, "inventory.img"},
		"a spec that is none":         {func(f map[string]string) { f["spec.dump"] = "[" }, "spec.dump"},
		"a file that nobody writes":   {func(f map[string]string) { f["evil"] = "" }, "evil"},
		"a file above the directory":  {func(f map[string]string) { f["checkpoint/../../evil"] = "" }, "evil"},
		"a file from the root":        {func(f map[string]string) { f["/evil"] = "" }, "evil"},
		"a file deep below":           {func(f map[string]string) { f["checkpoint/a/evil"] = "" }, "evil"},
		"a container named as a path": {func(f map[string]string) { f["spec.dump"] = strings.Replace(spec, `"web"`, `"../evil"`, 1) }, "evil"},
		"a container named hidden":    {func(f map[string]string) { f["spec.dump"] = strings.Replace(spec, `"web"`, `".staging"`, 1) }, "staging"},
		"a removed file above":        {func(f map[string]string) { f["deleted.files"] = `[".."]` }, "deleted.files"},
		"the same file twice":         {func(f map[string]string) { f["./config.dump"] = config }, "twice"},
		"compressed to nonsense":      {func(f map[string]string) { f["rootfs-diff.tar"] = "\x1f\x8bnonsense..." }, "rootfs-diff.tar"},
	} {
		t.Run(name, func(t *testing.T) {
			data := kubeletArchive(t, c.change)
			dir, _, err := unpack(t, data, archive.Limits{})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(filepath.Join(filepath.Dir(dir), "evil")); err == nil {
				t.Error("a file was made outside of the directory")
			}
			if _, err := archive.OpenFile(bytes.NewReader(data), int64(len(data))); err == nil {
				t.Error("it was opened")
			}
		})
	}
}

func TestADownloadedPodsArchiveIsReadInPlace(t *testing.T) {
	_, data := podArchive(t)
	f, err := archive.OpenFile(bytes.NewReader(data), int64(len(data)))
	must(t, err)
	must(t, fstest.TestFS(f.FS, "manifest.json", "containers/a/criu/pages-1.img", "volumes/emptydir-v.tar"))
	dir, m, digest := sealed(t)
	if string(f.Object) != object || f.ManifestDigest != digest || len(f.Manifest.Files) != len(m.Files) {
		t.Errorf("it says %s, %s", f.Object, f.ManifestDigest)
	}
	want, err := os.ReadFile(dir + "/containers/a/criu/pages-1.img")
	must(t, err)
	if got, err := fs.ReadFile(f.FS, "containers/a/criu/pages-1.img"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a file in it is not the checkpoint's: %v", err)
	}
}
