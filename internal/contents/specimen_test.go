package contents_test

import (
	"archive/zip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"maps"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
)

var update = flag.Bool("update", false, "write testdata/specimen.json anew")

// specimen is a checkpoint that test/cri took of test/cri/specimen ("make specimen").
// Captured pages that nothing reads are zeros.
func specimen(t testing.TB) (fstest.MapFS, *checkpoint.Manifest) {
	t.Helper()
	z, err := zip.OpenReader("testdata/specimen.zip")
	must(t, err)
	defer z.Close()
	files := fstest.MapFS{}
	for _, f := range z.File {
		r, err := f.Open()
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		files[f.Name] = &fstest.MapFile{Data: data}
	}
	m, err := checkpoint.DecodeManifest(files[checkpoint.ManifestName].Data)
	must(t, err)
	return files, m
}

// changed is the specimen with another file in it, or without one.
func changed(t testing.TB, name string, data []byte) (fstest.MapFS, *checkpoint.Manifest) {
	t.Helper()
	files, m := specimen(t)
	files = maps.Clone(files)
	delete(files, name)
	if data != nil {
		files[name] = &fstest.MapFile{Data: data}
		m.Files = append(m.Files, checkpoint.File{Path: name, Size: int64(len(data))})
	}
	return files, m
}

func read(t testing.TB, files fs.FS, m *checkpoint.Manifest, o contents.Options) *api.CheckpointContents {
	t.Helper()
	c, err := contents.Read(context.Background(), files, m, o)
	must(t, err)
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestASpecimenIsReadAsItWas(t *testing.T) {
	files, m := specimen(t)
	got, err := json.MarshalIndent(read(t, files, m, contents.Options{}), "", "  ")
	must(t, err)
	got = append(got, '\n')
	if *update {
		must(t, os.WriteFile("testdata/specimen.json", got, 0o644))
	}
	want, err := os.ReadFile("testdata/specimen.json")
	must(t, err)
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("-want +got (go test -update accepts it):\n%s", diff)
	}
}

func TestValuesAreMaskedUnlessTheyAreHarmlessOrAskedFor(t *testing.T) {
	files, m := specimen(t)
	for show, c := range map[bool]*api.CheckpointContents{
		false: read(t, files, m, contents.Options{}),
		true:  read(t, files, m, contents.Options{ShowValues: true}),
	} {
		seen := map[string]api.EnvironmentVariable{}
		for _, v := range c.Containers[0].Processes[1].Environment {
			seen[v.Name] = v
		}
		for name, value := range map[string]string{"QUEUE_PASSWORD": "hunter2", "SPECIMEN_TOKEN": "s3cr3t", "GODEBUG": "multipathtcp=0"} {
			want := api.EnvironmentVariable{Name: name, Masked: true}
			if show {
				want = api.EnvironmentVariable{Name: name, Value: value}
			}
			if seen[name] != want {
				t.Errorf("shown %v: got %+v, want %+v", show, seen[name], want)
			}
		}
		if want := (api.EnvironmentVariable{Name: "PATH", Value: "/bin:/usr/bin:/sbin:/usr/sbin"}); seen["PATH"] != want {
			t.Errorf("shown %v: got %+v", show, seen["PATH"])
		}
		for _, f := range c.Containers[0].Changes {
			if f.Path == "/etc/written" && (f.Digest != "") != show {
				t.Errorf("shown %v: digest %q: whoever may not see values could try what a small file holds", show, f.Digest)
			}
		}
	}
}

// counting counts what is read of files.
type counting struct {
	fs.FS
	pages *atomic.Int64
}

type countingFile struct {
	fs.File
	pages *atomic.Int64
}

func (c counting) Open(name string) (fs.File, error) {
	f, err := c.FS.Open(name)
	if err == nil && strings.Contains(name, "/pages-") {
		f = &countingFile{f, c.pages}
	}
	return f, err
}

func (f *countingFile) Read(p []byte) (int, error) {
	n, err := f.File.Read(p)
	f.pages.Add(int64(n))
	return n, err
}

func (f *countingFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.(io.ReaderAt).ReadAt(p, off)
	f.pages.Add(int64(n))
	return n, err
}

func TestOfTheCapturedMemoryOnlyCommandLinesAndEnvironmentsAreRead(t *testing.T) {
	files, m := specimen(t)
	var pages atomic.Int64
	read(t, counting{files, &pages}, m, contents.Options{})
	if n := pages.Load(); n == 0 || n > 8<<10 {
		t.Errorf("%d bytes of pages were read", n)
	}
}

func TestAnEndedContextEndsReading(t *testing.T) {
	files, m := specimen(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := contents.Read(ctx, files, m, contents.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
