package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
)

// Open makes the archive of a whole checkpoint. dir is its directory, whose files
// can be read at any place (os.Root's can); m is what its manifest says; object is
// the PodCheckpoint as JSON, of which the same bytes are to be given every time.
func Open(dir fs.FS, m *checkpoint.Manifest, object []byte) (*Archive, error) {
	manifest, err := readSmall(dir, checkpoint.ManifestName, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	if len(object) > maxObjectBytes {
		return nil, fmt.Errorf("the object has %d bytes, %d are taken", len(object), maxObjectBytes)
	}
	a := newArchive(dir, m)
	if err := a.addData(ObjectName, object); err != nil {
		return nil, err
	}
	if err := a.addData(checkpoint.ManifestName, manifest); err != nil {
		return nil, err
	}
	for _, f := range m.Files {
		if err := a.addFile(f.Path, f.Path, f.Size); err != nil {
			return nil, err
		}
	}
	a.finish()
	a.tag("pod", object, manifest)
	return a, nil
}

func newArchive(dir fs.FS, m *checkpoint.Manifest) *Archive {
	// Whole seconds: more than that takes records of its own.
	return &Archive{dir: dir, modified: m.CutTime.UTC().Truncate(time.Second)}
}

// tag computes the entity tag of what determines every byte.
func (a *Archive) tag(kind string, parts ...[]byte) {
	h := sha256.New()
	fmt.Fprintf(h, "stasis archive %d %s\n", layoutVersion, kind)
	for _, p := range parts {
		fmt.Fprintf(h, "%d\n", len(p))
		h.Write(p)
	}
	a.etag = `"` + hex.EncodeToString(h.Sum(nil)) + `"`
}

// readSmall reads a file that is held in memory whole.
func readSmall(dir fs.FS, name string, most int64) ([]byte, error) {
	info, err := fs.Lstat(dir, name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrChanged, err)
	}
	if !info.Mode().IsRegular() || info.Size() > most {
		return nil, fmt.Errorf("%w: %s is no regular file of at most %d bytes", ErrChanged, name, most)
	}
	f, err := dir.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrChanged, err)
	}
	defer f.Close()
	var buf bytes.Buffer
	if _, err := io.Copy(&buf, io.LimitReader(f, most)); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return buf.Bytes(), nil
}
