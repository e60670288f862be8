package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// How the OCI image specification writes what a layer takes away: an empty file
// .wh.NAME for a removed NAME, and .wh..wh..opq in a directory of which nothing
// of the layers below shows.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = whiteoutPrefix + whiteoutPrefix + ".opq"
	// paxLiteral on an entry says that its name is what it is: a real file may be
	// called .wh.NAME, and other readers then take it for a removed one.
	paxLiteral = "STASIS.literal"
)

// Meaning is what an entry of a layer's archive says about its name.
type Meaning int

// The meanings of entries.
const (
	Present  Meaning = iota // it is as the entry says
	Removed                 // what the layers below have under that name is gone
	Replaced                // nothing that the layers below have in that directory shows
)

// Explain returns the name that an entry is about, clean and without a slash at
// its end, and what it says. Its errors are names that are none in a tree.
func Explain(h *tar.Header) (name string, m Meaning, err error) {
	if name, err = cleanName(h.Name); err != nil {
		return "", Present, err
	}
	dir, base := path.Split(name)
	switch {
	case isWhiteoutDevice(h):
		return name, Removed, nil
	case h.PAXRecords[paxLiteral] != "" || !strings.HasPrefix(base, whiteoutPrefix):
		return name, Present, nil
	case base == opaqueName:
		return path.Clean(dir), Replaced, nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." || strings.HasPrefix(hidden, whiteoutPrefix) {
		return "", Present, errors.New("it is named like a removed file, and like none that there can be")
	}
	return dir + hidden, Removed, nil
}

// isWhiteoutDevice knows the form that overlayfs keeps on disk, which checkpoints
// were written in at first.
func isWhiteoutDevice(h *tar.Header) bool {
	return h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0
}

// addWhiteout writes that rel is removed.
func (t *writer) addWhiteout(rel string, modified time.Time) error {
	dir, base := path.Split(rel)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return nil // no image can hold such a name: there is nothing to hide
	}
	return t.tar.WriteHeader(&tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeReg, Mode: 0o600,
		Name: dir + whiteoutPrefix + base, ModTime: modified,
	})
}

// addOpaque writes, after the entry of the directory rel itself, that it shows
// nothing of what is below.
func (t *writer) addOpaque(rel string, modified time.Time) error {
	return t.tar.WriteHeader(&tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeReg, Mode: 0o600,
		Name: path.Join(rel, opaqueName), ModTime: modified,
	})
}

// literal adds the record to those of an entry whose name needs it.
func literal(rel string, records map[string]string) map[string]string {
	if !strings.HasPrefix(path.Base(rel), whiteoutPrefix) {
		return records
	}
	if records == nil {
		records = map[string]string{}
	}
	records[paxLiteral] = "1"
	return records
}

// applyOpaque makes the directory anew that was just laid: removing its contents
// one by one would leave a mark for each of them in an overlay.
func applyOpaque(root *os.Root, last *tar.Header, name string) error {
	var before string
	if last != nil && last.Typeflag == tar.TypeDir {
		before, _, _ = Explain(last)
	}
	if name != filepath.FromSlash(before) {
		return fmt.Errorf("it says that %s shows nothing of what is below, and does not follow that directory's own entry", name)
	}
	if name == "." {
		return empty(root)
	}
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	return applyDir(root, last, name)
}

// Empty removes everything below dir.
func Empty(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("empty %s: %w", dir, err)
	}
	defer root.Close()
	if err := empty(root); err != nil {
		return fmt.Errorf("empty %s: %w", dir, err)
	}
	return nil
}

// empty removes everything in a tree but its root.
func empty(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := root.RemoveAll(e.Name()); err != nil {
			return err
		}
	}
	return nil
}
