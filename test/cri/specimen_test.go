package cri_test

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
	"podstasis.dev/stasis/internal/contents/page"
)

// keepSpecimen keeps what was captured when it is asked for: STASIS_KEEP_SPECIMEN names
// a zip file, for internal/contents/testdata; STASIS_KEEP_PAGE names an HTML file, for
// the screenshot in docs. "make specimen" asks.
func keepSpecimen(t *testing.T, dir string, m *checkpoint.Manifest) {
	t.Helper()
	if name := os.Getenv("STASIS_KEEP_SPECIMEN"); name != "" {
		must(t, writeSpecimen(name, dir, m))
	}
	if name := os.Getenv("STASIS_KEEP_PAGE"); name != "" {
		c, err := contents.Read(context.Background(), os.DirFS(dir), m, contents.Options{})
		must(t, err)
		c.Name, c.Namespace = "before-upgrade", c.Source.PodNamespace
		c.Source.Platform = m.Platform.OS + "/" + m.Platform.Architecture // whatever kernel this is
		f, err := os.Create(name)
		must(t, err)
		defer f.Close()
		must(t, page.Write(f, c, page.Options{Made: time.Now()}))
	}
}

// writeSpecimen writes a checkpoint as a zip file. Of the captured pages it keeps those
// that are read for the contents; all others are zeros, which take no room.
func writeSpecimen(name, dir string, m *checkpoint.Manifest) error {
	read := &recorder{FS: os.DirFS(dir), ranges: map[string][][2]int64{}}
	if _, err := contents.Read(context.Background(), read, m, contents.Options{ShowValues: true}); err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	z := zip.NewWriter(f)
	z.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, flate.BestCompression) })
	err = fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "dump.log" {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if strings.HasPrefix(filepath.Base(name), "pages-") {
			data = only(data, read.ranges[name])
		}
		data = bytes.ReplaceAll(data, []byte(`"`+m.Platform.Kernel+`"`), []byte(`"6.1.0"`))
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write(data)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return z.Close()
}

// only keeps some ranges and makes all else zero.
func only(data []byte, ranges [][2]int64) []byte {
	out := make([]byte, len(data))
	for _, r := range ranges {
		copy(out[r[0]:r[1]], data[r[0]:r[1]])
	}
	return out
}

// recorder remembers which parts of which files were read.
type recorder struct {
	fs.FS
	ranges map[string][][2]int64
}

func (r *recorder) Open(name string) (fs.File, error) {
	f, err := r.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return &recorded{f.(*os.File), r, name}, nil
}

type recorded struct {
	*os.File
	recorder *recorder
	name     string
}

func (f *recorded) ReadAt(p []byte, off int64) (int, error) {
	f.recorder.ranges[f.name] = append(f.recorder.ranges[f.name], [2]int64{off, off + int64(len(p))})
	return f.File.ReadAt(p, off)
}
