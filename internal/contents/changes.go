package contents

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// How a layer says that something is gone (OCI image specification, layer.md): a file
// .wh.NAME for NAME, and .wh..wh..opq for all that the directory held before.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	// paxLiteral marks a file that is really called so (docs/format.md).
	paxLiteral = "STASIS.literal"
	// An overlay's own form, in checkpoints of earlier versions.
	paxOpaque = "SCHILY.xattr.trusted.overlay.opaque"
)

// Kinds of changes, as the API names them.
const (
	written  = "written"
	removed  = "removed"
	replaced = "replaced"
)

// entry is one of a tar file.
type entry struct {
	*tar.Header
	path    string // clean, without a leading slash; "." is the root
	content io.Reader
}

var errEnough = errors.New("more than is looked at")

// bounded reads tar files, and not too much of them.
type bounded struct {
	*io.SectionReader
	*bounds
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.tar > b.limits.TarBytes {
		return 0, errEnough
	}
	n, err := b.SectionReader.Read(p)
	b.tar += int64(n)
	return n, err
}

// entries calls each with the entries of a tar file. Contents that each does not read
// are skipped without being read.
func (r *reader) entries(ctx context.Context, name string, each func(entry) error) error {
	f, err := r.dir.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	from, ok := f.(io.ReaderAt)
	if !ok || !info.Mode().IsRegular() {
		return fmt.Errorf("%s cannot be read from its middle", name)
	}
	t := tar.NewReader(&bounded{io.NewSectionReader(from, 0, info.Size()), r.bounds})
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		h, err := t.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if r.looked++; r.looked > r.limits.TarEntries {
			return fmt.Errorf("%s: %w", name, errEnough)
		}
		if err := each(entry{h, path.Clean(strings.TrimSuffix(strings.TrimPrefix(h.Name, "/"), "/")), t}); err != nil {
			return err
		}
	}
}

// changes lists what the container changed of its root file system. Directories are
// listed when they were replaced or have nothing in them: a layer holds the ones above
// whatever changed, too.
func (r *reader) changes(ctx context.Context, n *notes, layer string, c *api.ContainerContents) {
	if layer == "" {
		return // it could not write
	}
	l := &layerList{reader: r, container: c, mounted: map[string]bool{}}
	for _, m := range c.Mounts {
		l.mounted[m.Destination] = true
	}
	err := r.entries(ctx, layer, l.add)
	l.flush("")
	if errors.Is(err, errEnough) {
		r.cuts(r.at + ".changes")
	} else if err != nil {
		n.add("changes of the root file system: %v", err)
	}
}

// layerList lists a layer's entries as changes.
type layerList struct {
	*reader
	container *api.ContainerContents
	mounted   map[string]bool // what the runtime mounts over
	directory *entry          // that may turn out to have nothing in it
	n         int
}

func (l *layerList) add(e entry) error {
	l.flush(e.path)
	base, parent := path.Base(e.path), path.Dir(e.path)
	literal := e.PAXRecords[paxLiteral] != ""
	switch {
	case e.path == ".":
	case base == opaque && !literal:
		l.give(api.FileChange{Path: parent, Change: replaced}, &e)
	case strings.HasPrefix(base, whiteout) && !literal:
		l.give(api.FileChange{Path: path.Join(parent, strings.TrimPrefix(base, whiteout)), Change: removed}, &e)
	case e.Typeflag == tar.TypeChar && e.Devmajor == 0 && e.Devminor == 0:
		l.give(api.FileChange{Path: e.path, Change: removed}, &e)
	case e.Typeflag == tar.TypeDir && e.PAXRecords[paxOpaque] == "y":
		l.give(api.FileChange{Path: e.path, Change: replaced}, &e)
	case e.Typeflag == tar.TypeDir:
		l.directory = &e
	default:
		l.give(api.FileChange{Path: e.path, Change: written}, &e)
	}
	return nil
}

// flush gives the directory out that had no entry in it, now that another follows.
func (l *layerList) flush(next string) {
	d := l.directory
	l.directory = nil
	if d != nil && !strings.HasPrefix(next, d.path+"/") {
		l.give(api.FileChange{Path: d.path, Change: written}, d)
	}
}

func (l *layerList) give(c api.FileChange, e *entry) {
	// What is mounted over needs something to be mounted on, which the runtime makes.
	if l.mounted["/"+c.Path] && (e.Size == 0 || e.Typeflag == tar.TypeDir) && c.Change == written {
		return
	}
	if !l.fits(l.at+".changes", l.n, l.limits.Changes, len(c.Path)+80) {
		return
	}
	l.n++
	c.Path = l.clean("/" + c.Path)
	if c.Change == written {
		c.Mode = mode(e.FileInfo().Mode())
		c.ModificationTime = &metav1.Time{Time: e.ModTime.UTC()}
		if e.Typeflag == tar.TypeReg {
			c.Size = e.Size
			// A file with holes may say any size.
			l.container.ChangedBytes += min(e.Size, math.MaxInt64-l.container.ChangedBytes)
			if l.show {
				c.Digest = l.digestOf(e)
			}
		}
	}
	l.container.Changes = append(l.container.Changes, c)
}

// mode is a mode as ls(1) shows it.
func mode(m fs.FileMode) string {
	b := []byte("-rwxrwxrwx")
	for i := range 9 {
		if m&(1<<(8-i)) == 0 {
			b[i+1] = '-'
		}
	}
	for _, kind := range []struct {
		bit fs.FileMode
		c   byte
	}{{fs.ModeDir, 'd'}, {fs.ModeSymlink, 'l'}, {fs.ModeNamedPipe, 'p'}, {fs.ModeDevice, 'b'}, {fs.ModeCharDevice, 'c'}} {
		if m&kind.bit != 0 {
			b[0] = kind.c
		}
	}
	for _, special := range []struct {
		bit fs.FileMode
		at  int
		c   byte
	}{{fs.ModeSetuid, 3, 's'}, {fs.ModeSetgid, 6, 's'}, {fs.ModeSticky, 9, 't'}} {
		if m&special.bit == 0 {
			continue
		}
		if b[special.at] == '-' {
			b[special.at] = special.c &^ 0x20
		} else {
			b[special.at] = special.c
		}
	}
	return string(b)
}

// digestOf digests a small file, as long as not too much has been. Only who may see
// values gets it: what a short secret is can be found by trying.
func (b *bounds) digestOf(e *entry) string {
	if e.Size > b.limits.DigestFileBytes || b.digest+e.Size > b.limits.DigestBytes {
		return ""
	}
	b.digest += e.Size
	h := sha256.New()
	if n, err := io.Copy(h, e.content); err != nil || n != e.Size {
		return ""
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}
