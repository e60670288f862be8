// Package layer writes a directory tree as a tar stream and lays one over
// another tree: the writable layer of a container and the contents of volumes.
//
// The stream is POSIX pax (pax(1)) with extended attributes as SCHILY.xattr
// records, files with holes as GNU tar has them, and an OCI image's layer: what
// overlayfs keeps as character devices 0:0 and as an attribute (Linux
// Documentation/filesystems/overlayfs.rst) becomes files named .wh.NAME and
// .wh..wh..opq.
package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	paxXattr      = "SCHILY.xattr."
	overlayPrefix = "trusted.overlay."
	xattrOpaque   = overlayPrefix + "opaque"
)

// Write writes the tree below dir to w, without following symbolic links.
// Hard links between its files are kept. Sockets are left out, as tar(1) does:
// whoever bound one binds it again, and the engine restores those that are open.
//
// A tree that overlayfs keeps in a form that cannot be copied by itself
// (redirect_dir, metacopy) is an error.
func Write(ctx context.Context, w io.Writer, dir string) error {
	t := newWriter(ctx, w)
	err := filepath.WalkDir(dir, func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		return t.add(full, filepath.ToSlash(rel))
	})
	if err != nil {
		return fmt.Errorf("archive %s: %w", dir, err)
	}
	if err := t.tar.Close(); err != nil {
		return fmt.Errorf("archive %s: %w", dir, err)
	}
	return nil
}

type inode struct{ dev, ino uint64 }

type writer struct {
	tar   *tar.Writer
	out   io.Writer        // what tar writes to
	links map[inode]string // names of files with several links, by inode
	ended func() error     // why to stop
}

func newWriter(ctx context.Context, w io.Writer) *writer {
	return &writer{tar: tar.NewWriter(w), out: w, links: map[inode]string{}, ended: func() error { return context.Cause(ctx) }}
}

// untilEnded reads on until there is a reason to stop: a Pod may stand still for
// as long as one large file takes.
type untilEnded struct {
	io.Reader
	ended func() error
}

func (r untilEnded) Read(p []byte) (int, error) {
	if err := r.ended(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// entry is what the tree has under a name, without a file's content.
type entry struct {
	full, rel string
	header    *tar.Header // nil of what the archive leaves out
	removed   bool        // it stands for a removed file
	opaque    bool        // a directory that shows nothing of what is below
	id        inode
	links     uint64
	ctime     syscall.Timespec
	// origin says that overlayfs brought the file from a layer below: it may be known to
	// processes by that one's inode.
	origin bool
}

// regular says whether the entry has content of its own.
func (e *entry) regular() bool {
	return e.header != nil && e.header.Typeflag == tar.TypeReg && !e.removed
}

func describe(full, rel string, info fs.FileInfo) (*entry, error) {
	st := info.Sys().(*syscall.Stat_t)
	e := &entry{full: full, rel: rel, id: inode{uint64(st.Dev), st.Ino}, links: uint64(st.Nlink), ctime: st.Ctim}
	if info.Mode()&fs.ModeSocket != 0 {
		return e, nil
	}
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if link, err = os.Readlink(full); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return nil, err
	}
	e.header = h
	if info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0 {
		// All removed files of an overlay may share one inode: this comes before links.
		e.removed = true
		return e, nil
	}
	h.Format = tar.FormatPAX
	h.Name = rel
	if info.IsDir() {
		h.Name += "/"
	}
	h.Uname, h.Gname = "", "" // names belong to the container, numbers are kept
	h.ModTime = info.ModTime()
	h.AccessTime, h.ChangeTime = h.AccessTime.Truncate(0), h.ChangeTime.Truncate(0)
	attributes, of, err := xattrs(full)
	if err != nil {
		return nil, err
	}
	h.PAXRecords = literal(rel, attributes)
	e.opaque, e.origin = info.IsDir() && of.opaque, of.origin
	return e, nil
}

func (t *writer) add(full, rel string) error {
	info, err := os.Lstat(full)
	if err != nil {
		return err
	}
	e, err := describe(full, rel, info)
	if err != nil {
		return err
	}
	if !e.regular() || t.seen(e) {
		return t.write(e, content{})
	}
	f, err := openContent(full)
	if err != nil {
		return err
	}
	defer f.Close()
	extents, err := extentsOf(f, e.header.Size)
	if err != nil {
		return fmt.Errorf("find the holes of %s: %w", full, err)
	}
	return t.write(e, content{from: f, extents: extents, inPlace: true})
}

func openContent(full string) (*os.File, error) {
	return os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NOATIME, 0)
}

// content is where a regular file's data are: in the file itself, each extent in its
// place, or somewhere else, one after the other from an offset on.
type content struct {
	from    io.ReaderAt
	extents []extent
	inPlace bool
	at      int64
}

// read calls fn with each extent and a reader of its data.
func (c content) read(fn func(extent, io.Reader) error) error {
	at := c.at
	for _, e := range c.extents {
		if c.inPlace {
			at = e.offset
		}
		if err := fn(e, io.NewSectionReader(c.from, at, e.length)); err != nil {
			return err
		}
		at += e.length
	}
	return nil
}

// seen says whether an entry is another name of a file that has been written.
func (t *writer) seen(e *entry) bool {
	_, seen := t.links[e.id]
	return seen && e.links > 1
}

// write writes an entry; content is a regular file's.
func (t *writer) write(e *entry, c content) error {
	switch {
	case e.header == nil:
		return nil
	case e.removed:
		return t.addWhiteout(e.rel, e.header.ModTime)
	}
	h := e.header
	directory := h.Typeflag == tar.TypeDir
	if e.opaque {
		if err := t.tar.WriteHeader(h); err != nil {
			return err
		}
		return t.addOpaque(e.rel, h.ModTime)
	}
	if !directory && e.links > 1 {
		if first, seen := t.links[e.id]; seen {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			h.PAXRecords = literal(e.rel, nil)
		} else {
			t.links[e.id] = e.rel
		}
	}
	if h.Typeflag != tar.TypeReg {
		return t.tar.WriteHeader(h)
	}
	if !whole(c.extents, h.Size) {
		return wrap(t.addSparse(h, c), e.full)
	}
	if err := t.tar.WriteHeader(h); err != nil {
		return err
	}
	// The tree stands still while it is read. Were it to grow all the same, the
	// size in the header bounds what is taken; were it to shrink, CopyN fails.
	return wrap(c.read(func(x extent, r io.Reader) error {
		if _, err := io.CopyN(t.tar, untilEnded{r, t.ended}, x.length); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", x.length, x.offset, err)
		}
		return nil
	}), e.full)
}

func wrap(err error, name string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// ofOverlay is what overlayfs keeps of a file in its attributes: that it is a directory
// which shows nothing of what is below, that it came from there.
type ofOverlay struct{ opaque, origin bool }

// xattrs returns a file's extended attributes as records, without those of overlayfs.
func xattrs(full string) (records map[string]string, of ofOverlay, err error) {
	names, err := listXattr(full)
	if err != nil {
		return nil, of, fmt.Errorf("extended attributes of %s: %w", full, err)
	}
	for _, name := range names {
		value, err := getXattr(full, name)
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return nil, of, fmt.Errorf("extended attribute %s of %s: %w", name, full, err)
		}
		if kind, ok := strings.CutPrefix(name, overlayPrefix); ok {
			switch kind {
			case "opaque":
				of.opaque = of.opaque || string(value) == "y"
				continue
			case "origin":
				of.origin = true
				continue
			case "impure", "nlink", "uuid", "upper":
				continue // book-keeping of the mount that is gone
			default:
				return nil, of, fmt.Errorf("%s has %s: the overlay is mounted with redirect_dir or metacopy, whose writable layers cannot be captured by themselves; mount it without", full, name)
			}
		}
		if records == nil {
			records = map[string]string{}
		}
		records[paxXattr+name] = string(value)
	}
	return records, of, nil
}

func listXattr(full string) ([]string, error) {
	for size := 1 << 10; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Llistxattr(full, buf)
		switch {
		case errors.Is(err, unix.ERANGE):
			continue
		case errors.Is(err, unix.ENOTSUP):
			return nil, nil
		case err != nil:
			return nil, err
		}
		return strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 }), nil
	}
}

func getXattr(full, name string) ([]byte, error) {
	for size := 1 << 10; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Lgetxattr(full, name, buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// Apply lays the tree in r over the tree below dir: new files appear, changed
// ones are replaced, removed ones go. Every name is resolved beneath dir and no
// symbolic link is followed out of it, whatever the stream says.
func Apply(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("lay archive over %s: %w", dir, err)
	}
	defer root.Close()
	archive := &counted{from: r}
	t := tar.NewReader(archive)
	var dirs []*tar.Header // their times are set last: filling them changes those
	var last *tar.Header
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		h, err := t.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("lay archive over %s: read archive: %w", dir, err)
		}
		if err := apply(ctx, root, t, archive, h, last); err != nil {
			return fmt.Errorf("lay archive over %s: %q: %w", dir, h.Name, err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
		last = h
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		name, _ := cleanName(dirs[i].Name)
		if err := root.Chtimes(name, dirs[i].AccessTime, dirs[i].ModTime); err != nil {
			return fmt.Errorf("lay archive over %s: times of %q: %w", dir, name, err)
		}
	}
	return nil
}

// cleanName gives an archive's name the one spelling that os.Root takes.
func cleanName(name string) (string, error) {
	name = path.Clean(strings.TrimSuffix(name, "/"))
	if !fs.ValidPath(name) || strings.ContainsRune(name, 0) {
		return "", errors.New("the name leads out of the tree")
	}
	return name, nil
}

// apply lays one entry. last is the one before it.
func apply(ctx context.Context, root *os.Root, content *tar.Reader, archive *counted, h, last *tar.Header) error {
	name, meaning, err := Explain(h)
	if err != nil {
		return err
	}
	name = filepath.FromSlash(name)
	switch {
	case meaning == Removed:
		return root.RemoveAll(name)
	case meaning == Replaced:
		return applyOpaque(root, last, name)
	case h.Typeflag == tar.TypeDir:
		return applyDir(root, h, name)
	}
	// Removing first keeps other names of the same inode as they are, and an
	// existing symbolic link from being written through.
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := fill(ctx, f, content, archive, h); err != nil {
			f.Close()
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := root.Symlink(h.Linkname, name); err != nil {
			return err
		}
	case tar.TypeLink:
		target, err := cleanName(h.Linkname)
		if err != nil {
			return err
		}
		return root.Link(target, name)
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		if err := makeNode(root, h, name); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unexpected entry of type %q", h.Typeflag)
	}
	return setAttributes(root, h, name)
}

func applyDir(root *os.Root, h *tar.Header, name string) error {
	if name != "." {
		info, err := root.Lstat(name)
		if err == nil && (!info.IsDir() || h.PAXRecords[paxXattr+xattrOpaque] == "y") {
			if err := root.RemoveAll(name); err != nil {
				return err
			}
			err = fs.ErrNotExist
		}
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
	}
	return setAttributes(root, h, name)
}

func makeNode(root *os.Root, h *tar.Header, name string) error {
	parent, err := root.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	kind := map[byte]uint32{tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[h.Typeflag]
	dev := int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	return unix.Mknodat(int(parent.Fd()), filepath.Base(name), kind|0o600, dev)
}

// setAttributes gives an entry its owner, attributes, mode and times, in this
// order: a change of owner clears set-user-ID bits and capabilities.
func setAttributes(root *os.Root, h *tar.Header, name string) error {
	if err := root.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if err := setXattrs(root, h, name); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeSymlink {
		return nil
	}
	mode := h.FileInfo().Mode()
	if err := root.Chmod(name, mode.Perm()|mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return root.Chtimes(name, h.AccessTime, h.ModTime)
}

func setXattrs(root *os.Root, h *tar.Header, name string) error {
	var parent *os.File
	for record, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(record, paxXattr)
		if !ok || strings.HasPrefix(attr, overlayPrefix) {
			continue
		}
		if parent == nil {
			p, err := root.Open(filepath.Dir(name))
			if err != nil {
				return err
			}
			defer p.Close()
			parent = p
		}
		// The directory is held open and lsetxattr(2) does not follow the last
		// name, so nothing outside the tree can be reached.
		full := fmt.Sprintf("/proc/self/fd/%d/%s", parent.Fd(), filepath.Base(name))
		if name == "." {
			full = fmt.Sprintf("/proc/self/fd/%d/.", parent.Fd())
		}
		if err := unix.Lsetxattr(full, attr, []byte(value), 0); err != nil {
			return fmt.Errorf("extended attribute %s: %w", attr, err)
		}
	}
	return nil
}
