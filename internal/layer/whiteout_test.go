package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/layer"
)

// entries lists the names of an archive's entries.
func entries(t *testing.T, data []byte) (names []string) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		must(t, err)
		names = append(names, h.Name)
	}
}

func TestRemovedFilesAndReplacedDirectoriesAreWrittenAsAnImageLayerDoes(t *testing.T) {
	from := t.TempDir()
	must(t, unix.Mknod(from+"/gone", unix.S_IFCHR, 0))
	must(t, os.Link(from+"/gone", from+"/gone-too")) // overlayfs shares the inode
	write(t, from+"/opaque/new", "new", 0o644)
	must(t, unix.Setxattr(from+"/opaque", "trusted.overlay.opaque", []byte("y"), 0))
	var buf bytes.Buffer
	must(t, layer.Write(context.Background(), &buf, from))
	want := []string{"./", ".wh.gone", ".wh.gone-too", "opaque/", "opaque/.wh..wh..opq", "opaque/new"}
	if got := entries(t, buf.Bytes()); !slices.Equal(got, want) {
		t.Errorf("the entries are %q, want %q", got, want)
	}
	if bytes.Contains(buf.Bytes(), []byte("trusted.overlay")) {
		t.Error("overlayfs' own attributes are in the archive")
	}
}

func TestSeveralFilesThatWereRemovedTogetherAreGoneAfter(t *testing.T) {
	from, over := t.TempDir(), t.TempDir()
	write(t, over+"/gone", "old", 0o644)
	write(t, over+"/gone-too", "old", 0o644)
	must(t, unix.Mknod(from+"/gone", unix.S_IFCHR, 0))
	must(t, os.Link(from+"/gone", from+"/gone-too"))
	roundTrip(t, from, over)
	for _, name := range []string{"gone", "gone-too"} {
		if _, err := os.Lstat(filepath.Join(over, name)); err == nil {
			t.Errorf("%s is there", name)
		}
	}
}

func TestFilesNamedLikeWhiteoutsComeBackAsTheyWere(t *testing.T) {
	from, over := t.TempDir(), t.TempDir()
	write(t, over+"/kept", "old", 0o644)
	write(t, over+"/d/kept", "old", 0o644)
	write(t, from+"/.wh.kept", "really a file", 0o644)
	must(t, os.Link(from+"/.wh.kept", from+"/.wh.link"))
	write(t, from+"/d/.wh..wh..opq", "and so is this", 0o644)
	write(t, from+"/.wh.dir/file", "x", 0o644)
	must(t, unix.Setxattr(from+"/.wh.dir", "trusted.overlay.opaque", []byte("y"), 0))
	roundTrip(t, from, over)
	for name, want := range map[string]string{
		"kept": "old", "d/kept": "old", ".wh.kept": "really a file", ".wh.link": "really a file",
		"d/.wh..wh..opq": "and so is this", ".wh.dir/file": "x",
	} {
		if b, err := os.ReadFile(filepath.Join(over, name)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v; want %q", name, b, err, want)
		}
	}
}

func TestArchivesInTheFormOfOverlayfsAreStillRead(t *testing.T) {
	over := t.TempDir()
	write(t, over+"/gone", "old", 0o644)
	write(t, over+"/opaque/old", "old", 0o644)
	apply(t, over,
		tar.Header{Typeflag: tar.TypeChar, Name: "gone"},
		tar.Header{Typeflag: tar.TypeDir, Name: "opaque/", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}},
		tar.Header{Typeflag: tar.TypeReg, Name: "opaque/new", Mode: 0o644})
	for name, want := range map[string]bool{"gone": false, "opaque/old": false, "opaque/new": true} {
		if _, err := os.Lstat(filepath.Join(over, name)); (err == nil) != want {
			t.Errorf("%s: there is %v, want %v", name, err == nil, want)
		}
	}
}

func apply(t *testing.T, over string, headers ...tar.Header) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		must(t, w.WriteHeader(&h))
	}
	must(t, w.Close())
	must(t, layer.Apply(context.Background(), &buf, over))
}

func TestNamesOfWhiteoutsThatCannotBeAreRefused(t *testing.T) {
	for name, headers := range map[string][]tar.Header{
		"of nothing":             {{Typeflag: tar.TypeReg, Name: "d/.wh."}},
		"of the directory":       {{Typeflag: tar.TypeReg, Name: "d/.wh.."}},
		"of the one above":       {{Typeflag: tar.TypeReg, Name: "d/.wh..."}},
		"reserved":               {{Typeflag: tar.TypeReg, Name: ".wh..wh.plnk"}},
		"opaque before its time": {{Typeflag: tar.TypeReg, Name: "d/.wh..wh..opq"}},
		"opaque far from it":     {{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, {Typeflag: tar.TypeReg, Name: "d/f"}, {Typeflag: tar.TypeReg, Name: "d/.wh..wh..opq"}},
		"a file, opaque":         {{Typeflag: tar.TypeReg, Name: "kept"}, {Typeflag: tar.TypeReg, Name: "kept/.wh..wh..opq"}},
	} {
		t.Run(name, func(t *testing.T) {
			over := t.TempDir()
			write(t, over+"/d/kept", "x", 0o644)
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			for _, h := range headers {
				must(t, w.WriteHeader(&h))
			}
			must(t, w.Close())
			if err := layer.Apply(context.Background(), &buf, over); err == nil {
				t.Error("it was accepted")
			}
			if _, err := os.Lstat(over + "/d/kept"); err != nil {
				t.Error("it removed something")
			}
		})
	}
}
