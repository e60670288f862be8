// Package archive is the form in which a checkpoint travels: one tar file whose
// every byte follows from the manifest, so that any range of it can be produced
// without what is before it. A Pod's archive is Stasis' own; one container's is the
// one that the kubelet's checkpoint endpoint writes. docs/format.md describes both.
//
// What comes from elsewhere is hostile: Unpack and OpenFile take exact names, regular
// files and bounded sizes, and refuse everything else.
package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
)

// layoutVersion changes whenever the same checkpoint becomes other bytes.
const layoutVersion = 1

const (
	blockSize   = 512
	trailerSize = 2 * blockSize
)

// ErrChanged says that the checkpoint's files are not what its manifest says, or
// are gone: the rest of the archive cannot be produced.
var ErrChanged = errors.New("the checkpoint's files have changed or are gone")

// Archive is a checkpoint as one tar file. It is immutable and may be read by
// many at a time.
type Archive struct {
	dir      fs.FS
	members  []member
	size     int64
	etag     string
	modified time.Time
}

// member is one entry of the archive.
type member struct {
	name   string // a directory's ends with a slash
	offset int64  // of its header
	header int64  // length of the header
	size   int64  // of the content
	path   string // of the content, in the checkpoint's directory
	data   []byte // the content, where it is of no file
}

func (m *member) end() int64 { return m.offset + m.header + padded(m.size) }

func padded(n int64) int64 { return (n + blockSize - 1) / blockSize * blockSize }

// Size is the archive's length in bytes.
func (a *Archive) Size() int64 { return a.size }

// ETag is a strong entity tag (RFC 9110): archives of the same tag are the same
// bytes.
func (a *Archive) ETag() string { return a.etag }

// Modified is the moment that the checkpoint is of.
func (a *Archive) Modified() time.Time { return a.modified }

func (a *Archive) addFile(name, path string, size int64) error {
	return a.add(member{name: name, path: path, size: size})
}

func (a *Archive) addData(name string, data []byte) error {
	return a.add(member{name: name, data: data, size: int64(len(data))})
}

func (a *Archive) add(m member) error {
	header, err := a.headerOf(&m)
	if err != nil {
		return fmt.Errorf("archive %s: %w", m.name, err)
	}
	m.offset, m.header = a.size, int64(len(header))
	a.members = append(a.members, m)
	a.size = m.end()
	return nil
}

func (a *Archive) headerOf(m *member) ([]byte, error) {
	h := tar.Header{Typeflag: tar.TypeReg, Name: m.name, Size: m.size, Mode: 0o600, ModTime: a.modified}
	if strings.HasSuffix(m.name, "/") {
		h.Typeflag, h.Mode = tar.TypeDir, 0o700
	}
	var buf bytes.Buffer
	if err := tar.NewWriter(&buf).WriteHeader(&h); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// finish is called after the last member.
func (a *Archive) finish() { a.size += trailerSize }

// ReadAt implements io.ReaderAt.
func (a *Archive) ReadAt(p []byte, off int64) (int, error) {
	r := a.NewReader()
	defer r.Close()
	return r.readAt(p, off)
}

// Reader reads an archive from any place on. It keeps at most one file open, and
// is for one goroutine but for Close, which any may call.
type Reader struct {
	a      *Archive
	offset int64
	open   openFile
}

var _ io.ReadSeekCloser = (*Reader)(nil)

// NewReader returns a Reader at the archive's beginning.
func (a *Archive) NewReader() *Reader { return &Reader{a: a} }

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.readAt(p, r.offset)
	r.offset += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// Seek implements io.Seeker.
func (r *Reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.offset
	case io.SeekEnd:
		offset += r.a.size
	}
	if offset < 0 {
		return 0, errors.New("seek to before the archive's beginning")
	}
	r.offset = offset
	return offset, nil
}

// Close lets go of what is open. A Read that comes after it fails.
func (r *Reader) Close() error { return r.open.close() }

func (r *Reader) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read before the archive's beginning")
	}
	done := 0
	for done < len(p) && off < r.a.size {
		n, err := r.readSome(p[done:], off)
		done += n
		off += int64(n)
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// readSome reads from one part of one member, at least a byte.
func (r *Reader) readSome(p []byte, off int64) (int, error) {
	members := r.a.members
	i := sort.Search(len(members), func(i int) bool { return off < members[i].end() })
	if i == len(members) {
		n := min(int64(len(p)), r.a.size-off)
		clear(p[:n])
		return int(n), nil
	}
	m := &members[i]
	at := off - m.offset
	if at < m.header {
		header, err := r.a.headerOf(m)
		if err != nil {
			return 0, err
		}
		return copy(p, header[at:]), nil
	}
	at -= m.header
	if at >= m.size {
		n := min(int64(len(p)), padded(m.size)-at)
		clear(p[:n])
		return int(n), nil
	}
	p = p[:min(int64(len(p)), m.size-at)]
	if m.path == "" {
		return copy(p, m.data[at:]), nil
	}
	return r.open.readAt(r.a.dir, m.path, m.size, p, at)
}

// fileSizes of a manifest, by path.
func fileSizes(m *checkpoint.Manifest) map[string]int64 {
	sizes := make(map[string]int64, len(m.Files))
	for _, f := range m.Files {
		sizes[f.Path] = f.Size
	}
	return sizes
}
