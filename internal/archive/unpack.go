package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
)

var (
	// ErrInvalid says that an archive is none of a checkpoint, or not as one is.
	ErrInvalid = errors.New("it is not a checkpoint archive as Stasis or a kubelet writes it")
	// ErrTooLarge says that an archive holds more than the limits allow.
	ErrTooLarge = errors.New("the archive holds more than it may")
)

// Limits bound what an archive may hold. Zero members are the defaults.
type Limits struct {
	Bytes int64 // of all files together; unbounded by default
	Files int   // 65536 by default
}

func (l Limits) files() int {
	if l.Files <= 0 {
		return defaultMaxMembers
	}
	return l.Files
}

// Unpacked is what came out of an archive.
type Unpacked struct {
	Manifest       *checkpoint.Manifest
	ManifestDigest string
	// Object is the PodCheckpoint as JSON that a Pod's archive begins with; nil for the
	// archive of one container that a kubelet wrote, which knows none.
	Object []byte
}

// Unpack makes a checkpoint's directory of an archive, which may come from
// anywhere, in an empty directory. When it returns without error the directory is a
// whole checkpoint, durable, with the manifest written last; otherwise it may hold
// anything, and the caller removes it.
func Unpack(ctx context.Context, r io.Reader, into *os.Root, l Limits) (*Unpacked, error) {
	u := &unpacker{ctx: ctx, in: &counter{r: r}, into: into, limits: l}
	u.tar = tar.NewReader(u.in)
	h, err := u.next()
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fmt.Errorf("%w: it is empty", ErrInvalid)
	}
	if h.Name == ObjectName {
		return u.pod(h)
	}
	return u.kubelet(h)
}

// unpacker reads an archive from its beginning to its end, once.
type unpacker struct {
	ctx    context.Context
	in     *counter
	tar    *tar.Reader
	into   *os.Root
	limits Limits

	members int
	written int64
	last    int64 // size of the member before
}

// next returns the next member, or nil at the archive's proper end.
func (u *unpacker) next() (*tar.Header, error) {
	if err := context.Cause(u.ctx); err != nil {
		return nil, err
	}
	u.in.zeros = 0
	h, err := u.tar.Next()
	if err == io.EOF {
		return nil, u.atEnd()
	}
	if err != nil {
		return nil, readError(err)
	}
	if u.members++; u.members > u.limits.files()+2 {
		return nil, fmt.Errorf("%w: more than %d files", ErrTooLarge, u.limits.files())
	}
	if err := plainMember(h); err != nil {
		return nil, err
	}
	u.last = h.Size
	return h, nil
}

// readError tells a bad archive from a bad disk.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return fmt.Errorf("read the archive: %w", err)
}

// plainMember refuses what is neither a regular file, written out in full, nor a
// directory.
func plainMember(h *tar.Header) error {
	if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
		return fmt.Errorf("%w: %q is neither a regular file nor a directory", ErrInvalid, h.Name)
	}
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse.") {
			return fmt.Errorf("%w: %q is a sparse file", ErrInvalid, h.Name)
		}
	}
	return nil
}

// atEnd checks that the archive ends as one does, and that nothing comes after it.
func (u *unpacker) atEnd() error {
	if u.in.zeros < padded(u.last)-u.last+trailerSize {
		return fmt.Errorf("%w: it is cut off, its end is missing", ErrInvalid)
	}
	const most = 1 << 20 // tar(1) fills its last record up
	buf := make([]byte, 32<<10)
	for n := 0; ; {
		k, err := u.in.Read(buf)
		n += k
		if n > most || len(bytes.Trim(buf[:k], "\x00")) > 0 {
			return fmt.Errorf("%w: something comes after its end", ErrInvalid)
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return readError(err)
		}
	}
}

// small reads a member that is held in memory.
func (u *unpacker) small(h *tar.Header, most int64) ([]byte, error) {
	if h.Size > most {
		return nil, fmt.Errorf("%w: %s has %d bytes, %d are taken", ErrTooLarge, h.Name, h.Size, most)
	}
	data, err := io.ReadAll(u.tar)
	if err != nil {
		return nil, readError(err)
	}
	return data, nil
}

// file writes a member, or what a reader makes of it, and returns its digest.
func (u *unpacker) file(name string, content io.Reader) (checkpoint.File, error) {
	if err := u.into.MkdirAll(path.Dir(name), 0o700); err != nil {
		return checkpoint.File{}, fmt.Errorf("unpack %s: %w", name, err)
	}
	f, err := u.into.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return checkpoint.File{}, fmt.Errorf("unpack %s: %w", name, err)
	}
	sum := sha256.New()
	size, err := u.copy(io.MultiWriter(f, sum), content)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return checkpoint.File{}, fmt.Errorf("unpack %s: %w", name, err)
	}
	return checkpoint.File{Path: name, Size: size, Digest: "sha256:" + hex.EncodeToString(sum.Sum(nil))}, nil
}

func (u *unpacker) copy(w io.Writer, r io.Reader) (size int64, err error) {
	buf := make([]byte, 1<<20)
	for {
		if err := context.Cause(u.ctx); err != nil {
			return size, err
		}
		n, err := r.Read(buf)
		size += int64(n)
		if u.written += int64(n); u.limits.Bytes > 0 && u.written > u.limits.Bytes {
			return size, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, u.limits.Bytes)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return size, err
		}
		if err == io.EOF {
			return size, nil
		} else if err != nil {
			return size, readError(err)
		}
	}
}

// pod unpacks the archive of a whole checkpoint, which must be what Open makes, to
// the member.
func (u *unpacker) pod(h *tar.Header) (*Unpacked, error) {
	object, err := u.small(h, maxObjectBytes)
	if err != nil {
		return nil, err
	}
	if h, err = u.expect(checkpoint.ManifestName); err != nil {
		return nil, err
	}
	manifest, err := u.small(h, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	m, err := checkpoint.DecodeManifest(manifest)
	if err == nil {
		err = checkPaths(m)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if len(m.Files) > u.limits.files() {
		return nil, fmt.Errorf("%w: more than %d files", ErrTooLarge, u.limits.files())
	}
	for _, want := range m.Files {
		if err := u.manifestFile(want); err != nil {
			return nil, err
		}
	}
	if h, err = u.next(); err != nil {
		return nil, err
	} else if h != nil {
		return nil, fmt.Errorf("%w: %q is not in its manifest", ErrInvalid, h.Name)
	}
	if err := u.complete(manifest); err != nil {
		return nil, err
	}
	return &Unpacked{Manifest: m, ManifestDigest: DigestOf(manifest), Object: object}, nil
}

// expect returns the next member, which must be the regular file of that name.
func (u *unpacker) expect(name string) (*tar.Header, error) {
	h, err := u.next()
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fmt.Errorf("%w: it ends before %s", ErrInvalid, name)
	}
	if h.Name != name || h.Typeflag != tar.TypeReg {
		return nil, fmt.Errorf("%w: %q is where %s belongs", ErrInvalid, h.Name, name)
	}
	return h, nil
}

func (u *unpacker) manifestFile(want checkpoint.File) error {
	h, err := u.expect(want.Path)
	if err != nil {
		return err
	}
	if h.Size != want.Size {
		return fmt.Errorf("%w: %s has %d bytes, its manifest says %d", checkpoint.ErrCorrupt, want.Path, h.Size, want.Size)
	}
	got, err := u.file(want.Path, u.tar)
	if err != nil {
		return err
	}
	if got.Digest != want.Digest {
		return fmt.Errorf("%w: %s has digest %s, its manifest says %s", checkpoint.ErrCorrupt, want.Path, got.Digest, want.Digest)
	}
	return nil
}

// complete makes the directories durable and then writes the manifest.
func (u *unpacker) complete(manifest []byte) error {
	dir := u.into.Name()
	for _, name := range []string{containersDir, volumesDir} {
		if err := syncDirs(u.into, name); err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
	if err := checkpoint.WriteFile(path.Join(dir, checkpoint.ManifestName), manifest, 0o600); err != nil {
		return fmt.Errorf("unpack %s: %w", checkpoint.ManifestName, err)
	}
	return nil
}

// counter knows how many zeros there have been in a row.
type counter struct {
	r     io.Reader
	zeros int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if rest := bytes.TrimRight(p[:n], "\x00"); len(rest) > 0 {
		c.zeros = int64(n - len(rest))
	} else {
		c.zeros += int64(n)
	}
	return n, err
}
