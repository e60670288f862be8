package contents_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	criucore "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventpoll"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"google.golang.org/protobuf/proto"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
	"podstasis.dev/stasis/internal/contents/images"
)

const inWeb = "containers/web/criu/"

// image makes an image as CRIU would.
func image(magic images.Magic, entries ...proto.Message) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x54564319)
	b = binary.LittleEndian.AppendUint32(b, uint32(magic))
	for _, e := range entries {
		data, err := proto.MarshalOptions{AllowPartial: true}.Marshal(e)
		if err != nil {
			panic(err) // the test's own message
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
		b = append(b, data...)
	}
	return b
}

// made is a checkpoint of one container of the given files.
func made(files map[string][]byte) (fstest.MapFS, *checkpoint.Manifest) {
	m := &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "web"}}}
	out := fstest.MapFS{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		out[name] = &fstest.MapFile{Data: files[name]}
		m.Files = append(m.Files, checkpoint.File{Path: name, Size: int64(len(files[name]))})
	}
	return out, m
}

func entry(pid, ppid uint32) *pstree.PstreeEntry {
	return &pstree.PstreeEntry{Pid: &pid, Ppid: &ppid, Threads: []uint32{pid}}
}

func core(comm string) *criucore.CoreEntry {
	alive := uint32(images.StateAlive)
	return &criucore.CoreEntry{Tc: &criucore.TaskCoreEntry{TaskState: &alive, Comm: &comm}}
}

// running is a container of one process whose memory holds text at address 0x1000,
// in a mapping of that status.
func running(mapped uint32, args, env [2]uint64, text string) map[string][]byte {
	start, end, zero, one := uint64(0x1000), uint64(0x5000), uint32(0), uint32(1)
	present, pages := uint32(4), uint64(1)
	pid := uint64(0)
	return map[string][]byte{
		inWeb + "pstree.img":   image(images.PSTree, entry(1, 0)),
		inWeb + "core-1.img":   image(images.Core, core("x")),
		inWeb + "files.img":    image(images.Files),
		inWeb + "fdinfo-0.img": image(images.FDInfo),
		inWeb + "mm-1.img": image(images.MM, &mm.MmEntry{MmArgStart: &args[0], MmArgEnd: &args[1], MmEnvStart: &env[0], MmEnvEnd: &env[1], ExeFileId: &zero,
			Vmas: []*vma.VmaEntry{{Start: &start, End: &end, Shmid: &pid, Status: &mapped, Prot: &one, Flags: &zero}}}),
		inWeb + "pagemap-1.img": image(images.Pagemap, &pagemap.PagemapHead{PagesId: &one},
			&pagemap.PagemapEntry{Vaddr: &start, CompatNrPages: &zero, NrPages: &pages, Flags: &present}),
		inWeb + "pages-1.img": append([]byte(text), make([]byte, images.PageSize-len(text))...),
	}
}

func only(t *testing.T, c *api.CheckpointContents) api.Process {
	t.Helper()
	if len(c.Containers) != 1 || len(c.Containers[0].Processes) != 1 {
		t.Fatalf("got %+v", c)
	}
	return c.Containers[0].Processes[0]
}

func TestAProcessThatGaveItselfATitleIsShownWithIt(t *testing.T) {
	// nginx and others write over their arguments, and go on into the environment.
	files, m := made(running(images.StatusAnonPrivate, [2]uint64{0x1000, 0x1008}, [2]uint64{0x1008, 0x1020}, "nginx: worker\x00A=b\x00leftover\x00"))
	p := only(t, read(t, files, m, contents.Options{}))
	if !slices.Equal(p.Arguments, []string{"nginx: worker"}) {
		t.Errorf("arguments %q", p.Arguments)
	}
	if len(p.Environment) != 1 || p.Environment[0].Name != "A" {
		t.Errorf("environment %+v", p.Environment)
	}
}

func TestWhatIsLeftOfAnEnvironmentWrittenOverIsNotTakenForNames(t *testing.T) {
	files, m := made(running(images.StatusAnonPrivate, [2]uint64{0x1000, 0x1000}, [2]uint64{0x1000, 0x1020}, "cret-part!=x\x00OK=1\x00\x00s3cr3t"))
	c := read(t, files, m, contents.Options{})
	text, _ := json.Marshal(c)
	if p := only(t, c); len(p.Environment) != 1 || p.Environment[0].Name != "OK" || strings.Contains(string(text), "cret-part") || strings.Contains(string(text), "s3cr3t") {
		t.Errorf("got %s", text)
	}
	if notes := fmt.Sprint(c.Containers[0].Notes); !strings.Contains(notes, "2 strings") {
		t.Errorf("notes: %s", notes)
	}
}

func TestPagesThatWereNotCapturedAreZerosInAnonymousMemoryAndUnknownElsewhere(t *testing.T) {
	args := [2]uint64{0x1ffc, 0x3000} // the second page was not captured
	text := strings.Repeat("x", 0xffc) + "abc\x00"
	files, m := made(running(images.StatusAnonPrivate, args, args, text))
	c := read(t, files, m, contents.Options{})
	if p := only(t, c); !slices.Equal(p.Arguments, []string{"abc"}) || len(c.Containers[0].Notes) > 1 {
		t.Errorf("anonymous: %q, %v", p.Arguments, c.Containers[0].Notes)
	}
	files, m = made(running(images.StatusFilePrivate, args, args, text))
	c = read(t, files, m, contents.Options{})
	if notes := fmt.Sprint(c.Containers[0].Notes); !strings.Contains(notes, "its command line was not captured as a whole") {
		t.Errorf("of a file: %v", notes)
	}
}

func TestImagesThatAreMissingOrSpoiltAreNotedAndTheRestIsRead(t *testing.T) {
	for _, c := range []struct {
		name string
		data []byte
		note string
		rest string // the beginning of a line that is there all the same
	}{
		{"core-1.img", nil, "process 1: ", "web process specimen /bin/specimen worker"},
		{"core-1.img", []byte("nonsense"), "process 1: core-1.img: not a CRIU image", "web process specimen /bin/specimen worker"},
		{"mm-1.img", []byte("nonsense"), "memory of process 1: mm-1.img: not a CRIU image", "web process specimen"},
		{"pagemap-1.img", nil, "captured pages of process 1: ", "web process specimen"},
		{"pages-2.img", []byte("short"), "the map names", "web process specimen"},
		{"files.img", nil, "open files: ", "web process specimen"},
		{"pstree.img", nil, "", "web change removed /etc/group"},
		{"quantum-7.img", []byte("?"), "skipped an image of an unknown kind: quantum-7.img", "web process specimen"},
	} {
		files, m := changed(t, inWeb+c.name, c.data)
		got := read(t, files, m, contents.Options{})
		lines := describe(got)
		if notes := strings.Join(got.Containers[0].Notes, "\n"); !strings.Contains(notes, c.note) {
			t.Errorf("%s: notes:\n%s", c.name, notes)
		}
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, c.rest) }) {
			t.Errorf("%s: %q is missing:\n%s", c.name, c.rest, strings.Join(lines, "\n"))
		}
	}
}

func TestListsAreCutAndSaidToBe(t *testing.T) {
	files, m := specimen(t)
	c := read(t, files, m, contents.Options{Limits: contents.Limits{Processes: 1, Files: 2, Sockets: 3, Variables: 1, Changes: 2, Mounts: 1, Arguments: 1, Threads: 2}})
	for _, path := range []string{"containers[0].processes", "containers[0].processes[0].files", "containers[0].sockets", "containers[0].changes",
		"containers[0].mounts", "containers[0].processes[0].environment", "containers[0].processes[0].arguments", "containers[0].processes[0].threadNames"} {
		if !slices.Contains(c.Truncated, path) {
			t.Errorf("%s is not said to be cut: %v", path, c.Truncated)
		}
	}
	web := c.Containers[0]
	if len(web.Processes) != 1 || len(web.Processes[0].Files) != 2 || len(web.Sockets) != 3 || len(web.Changes) != 2 || len(web.Mounts) != 1 {
		t.Errorf("got %d processes, %d files, %d sockets, %d changes, %d mounts", len(web.Processes), len(web.Processes[0].Files), len(web.Sockets), len(web.Changes), len(web.Mounts))
	}
}

func TestTheWholeAnswerIsBounded(t *testing.T) {
	var tree, files []proto.Message
	many := map[string][]byte{}
	name := strings.Repeat("n", 3000)
	for i := range uint32(2000) {
		tree = append(tree, entry(i+1, i))
		many[fmt.Sprintf("%score-%d.img", inWeb, i+1)] = image(images.Core, core(name))
	}
	many[inWeb+"pstree.img"], many[inWeb+"files.img"] = image(images.PSTree, tree...), image(images.Files, files...)
	dir, m := made(many)
	c := read(t, dir, m, contents.Options{Limits: contents.Limits{Bytes: 1 << 20}})
	text, err := json.Marshal(c)
	must(t, err)
	if len(text) > 2<<20 || !slices.Contains(c.Truncated, "containers[0].processes") {
		t.Errorf("%d bytes, cut: %v", len(text), c.Truncated)
	}
}

func TestReadingImagesIsBounded(t *testing.T) {
	files, m := specimen(t)
	c := read(t, files, m, contents.Options{Limits: contents.Limits{ImageBytes: 4096}})
	if notes := fmt.Sprint(c.Containers[0].Notes); !strings.Contains(notes, "larger than what is read of all images") {
		t.Errorf("notes: %s", notes)
	}
}

func TestProcessesThatAreEachOthersParentsAreListedOnce(t *testing.T) {
	files := map[string][]byte{inWeb + "pstree.img": image(images.PSTree, entry(3, 2), entry(2, 3), entry(1, 0), entry(5, 5), entry(4, 1))}
	dir, m := made(files)
	var pids []int64
	for _, p := range read(t, dir, m, contents.Options{}).Containers[0].Processes {
		pids = append(pids, p.PID)
	}
	if !slices.Equal(pids, []int64{1, 4, 3, 2, 5}) {
		t.Errorf("got %v", pids)
	}
}

func TestAnEventpollThatWatchesManyIsNotDecodedAsAWhole(t *testing.T) {
	watched := make([]*eventpoll.EventpollTfdEntry, 20000)
	for i := range watched {
		watched[i] = &eventpoll.EventpollTfdEntry{Id: proto.Uint32(1), Tfd: proto.Uint32(uint32(i)), Events: proto.Uint32(1), Data: proto.Uint64(1)}
	}
	kind := fdinfo.FdTypes_EVENTPOLL
	files := running(images.StatusAnonPrivate, [2]uint64{}, [2]uint64{}, "")
	files[inWeb+"files.img"] = image(images.Files, &fdinfo.FileEntry{Type: &kind, Id: proto.Uint32(9), Epfd: &eventpoll.EventpollFileEntry{Id: proto.Uint32(9), Tfd: watched}})
	files[inWeb+"fdinfo-0.img"] = image(images.FDInfo, &fdinfo.FdinfoEntry{Id: proto.Uint32(9), Flags: proto.Uint32(0), Type: &kind, Fd: proto.Uint32(4)})
	dir, m := made(files)
	if p := only(t, read(t, dir, m, contents.Options{})); len(p.Files) != 1 || p.Files[0].Path != "watches many" || p.Files[0].Type != "eventpoll" {
		t.Errorf("got %+v", p.Files)
	}
}

func layer(t *testing.T, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		must(t, w.WriteHeader(h))
		_, err := w.Write(make([]byte, h.Size))
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func TestChangesOfTheRootFileSystemAreReadFromALayer(t *testing.T) {
	data := layer(t,
		&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		&tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o755},
		&tar.Header{Name: "a/.wh.gone", Typeflag: tar.TypeReg},
		&tar.Header{Name: "a/.wh.real", Typeflag: tar.TypeReg, Size: 4, Mode: 0o644, PAXRecords: map[string]string{"STASIS.literal": "1"}},
		&tar.Header{Name: "b/", Typeflag: tar.TypeDir, Mode: 0o755},
		&tar.Header{Name: "b/.wh..wh..opq", Typeflag: tar.TypeReg},
		&tar.Header{Name: "b/new", Typeflag: tar.TypeReg, Size: 5, Mode: 0o4755},
		&tar.Header{Name: "empty/", Typeflag: tar.TypeDir, Mode: 0o1777},
		&tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "new", Mode: 0o777},
		&tar.Header{Name: "old", Typeflag: tar.TypeChar},
		&tar.Header{Name: "oldopaque/", Typeflag: tar.TypeDir, Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}},
	)
	dir, m := made(map[string][]byte{"containers/web/rootfs.tar": data})
	m.Containers[0].Rootfs = "containers/web/rootfs.tar"
	var got []string
	c := read(t, dir, m, contents.Options{}).Containers[0]
	for _, f := range c.Changes {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s", f.Change, f.Path, f.Mode)))
	}
	want := []string{"removed /a/gone", "written /a/.wh.real -rw-r--r--", "replaced /b", "written /b/new -rwsr-xr-x",
		"written /empty drwxrwxrwt", "written /link lrwxrwxrwx", "removed /old", "replaced /oldopaque"}
	if !slices.Equal(got, want) || c.ChangedBytes != 9 {
		t.Errorf("%d bytes, got\n%s\nwant\n%s", c.ChangedBytes, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestReadingTarFilesIsBounded(t *testing.T) {
	files, m := specimen(t)
	for name, limits := range map[string]contents.Limits{"entries": {TarEntries: 4}, "bytes": {TarBytes: 1024}} {
		c := read(t, files, m, contents.Options{Limits: limits})
		if !slices.Contains(c.Truncated, "containers[0].changes") || !slices.Contains(c.Truncated, "volumes[0].files") {
			t.Errorf("%s: cut are %v", name, c.Truncated)
		}
	}
}

// FuzzRead spoils one image of the specimen at a time.
func FuzzRead(f *testing.F) {
	files, m := specimen(f)
	var names []string
	for _, file := range m.Files {
		if !strings.Contains(file.Path, "pages-") && file.Size < 16<<10 && files[file.Path] != nil {
			names = append(names, file.Path)
		}
	}
	for i, name := range names {
		f.Add(uint8(i), files[name].Data)
	}
	limits := contents.Limits{Bytes: 1 << 20, ImageBytes: 1 << 20, HeldBytes: 1 << 20, DigestBytes: 1 << 10}
	f.Fuzz(func(t *testing.T, which uint8, data []byte) {
		spoilt := maps.Clone(files)
		spoilt[names[int(which)%len(names)]] = &fstest.MapFile{Data: data}
		c, err := contents.Read(context.Background(), spoilt, m, contents.Options{Limits: limits})
		must(t, err)
		text, err := json.Marshal(c)
		must(t, err)
		if len(text) > 16<<20 {
			t.Errorf("an answer of %d bytes", len(text))
		}
		for _, container := range c.Containers {
			for _, p := range container.Processes {
				if p.Memory.Captured < 0 || p.Memory.Virtual < 0 {
					t.Errorf("process %d has memory %+v", p.PID, p.Memory)
				}
			}
		}
		must(t, contents.Compare(c, c).Write(&bytes.Buffer{}))
	})
}
