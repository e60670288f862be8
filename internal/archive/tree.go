package archive

import (
	"bytes"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
)

// tree is a file system of what readers give.
type tree struct {
	modified time.Time
	files    map[string]*leaf
	dirs     map[string]map[string]bool // names in each, and whether they are directories
}

type leaf struct {
	size int64
	open func() (io.Reader, error)
}

var _ interface {
	fs.ReadDirFS
	fs.ReadLinkFS
	fs.StatFS
} = (*tree)(nil)

func newTree(modified time.Time) *tree {
	return &tree{modified: modified, files: map[string]*leaf{}, dirs: map[string]map[string]bool{".": {}}}
}

func (t *tree) add(name string, size int64, open func() (io.Reader, error)) {
	t.files[name] = &leaf{size, open}
	isDir := false
	for child := name; child != "."; child = path.Dir(child) {
		parent := path.Dir(child)
		if t.dirs[parent] == nil {
			t.dirs[parent] = map[string]bool{}
		}
		t.dirs[parent][path.Base(child)] = isDir
		isDir = true
	}
}

func (t *tree) addBytes(name string, data []byte) {
	t.add(name, int64(len(data)), func() (io.Reader, error) { return bytes.NewReader(data), nil })
}

// list is what a manifest would say of the files, but for digests.
func (t *tree) list() (files []checkpoint.File) {
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		files = append(files, checkpoint.File{Path: name, Size: t.files[name].size})
	}
	return files
}

// Open implements fs.FS.
func (t *tree) Open(name string) (fs.File, error) {
	info, err := t.Stat(name)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if info.IsDir() {
		entries, err := t.ReadDir(name)
		return &openDir{info: info, entries: entries}, err
	}
	r, err := t.files[name].open()
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	at, ok := r.(readerAt)
	if !ok {
		again := &restarting{open: t.files[name].open, r: r}
		at = io.NewSectionReader(again, 0, t.files[name].size)
	}
	return file{readerAt: at, info: info}, nil
}

// Stat implements fs.StatFS.
func (t *tree) Stat(name string) (fs.FileInfo, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrInvalid}
	}
	if f, ok := t.files[name]; ok {
		return info{path.Base(name), f.size, 0o400, t.modified}, nil
	}
	if _, ok := t.dirs[name]; ok {
		return info{path.Base(name), 0, fs.ModeDir | 0o500, t.modified}, nil
	}
	return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
}

// Lstat implements fs.ReadLinkFS. There are no links.
func (t *tree) Lstat(name string) (fs.FileInfo, error) { return t.Stat(name) }

// ReadLink implements fs.ReadLinkFS.
func (t *tree) ReadLink(name string) (string, error) {
	return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
}

// ReadDir implements fs.ReadDirFS.
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	children, ok := t.dirs[name]
	if !ok {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	var entries []fs.DirEntry
	for child := range children {
		info, err := t.Stat(path.Join(name, child))
		if err != nil {
			return nil, err
		}
		entries = append(entries, fs.FileInfoToDirEntry(info))
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

type info struct {
	name     string
	size     int64
	mode     fs.FileMode
	modified time.Time
}

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return i.size }
func (i info) Mode() fs.FileMode  { return i.mode }
func (i info) ModTime() time.Time { return i.modified }
func (i info) IsDir() bool        { return i.mode.IsDir() }
func (i info) Sys() any           { return nil }

type readerAt interface {
	io.Reader
	io.ReaderAt
	io.Seeker
}

// file can be read at any place.
type file struct {
	readerAt
	info fs.FileInfo
}

func (f file) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f file) Close() error               { return nil }

// restarting reads at any place what can only be read from its beginning: forward
// by reading on, back by beginning anew. Most read forward.
type restarting struct {
	open func() (io.Reader, error)

	mu sync.Mutex
	r  io.Reader
	at int64
}

// ReadAt implements io.ReaderAt.
func (s *restarting) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off < s.at {
		r, err := s.open()
		if err != nil {
			return 0, err
		}
		s.r, s.at = r, 0
	}
	n, err := io.CopyN(io.Discard, s.r, off-s.at)
	s.at += n
	if err != nil {
		return 0, err
	}
	k, err := io.ReadFull(s.r, p)
	s.at += int64(k)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return k, err
}

type openDir struct {
	info    fs.FileInfo
	entries []fs.DirEntry
}

func (d *openDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *openDir) Close() error               { return nil }
func (d *openDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.Name(), Err: fs.ErrInvalid}
}

// ReadDir implements fs.ReadDirFile.
func (d *openDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if n <= 0 || n > len(d.entries) {
		if n > 0 && len(d.entries) == 0 {
			return nil, io.EOF
		}
		n = len(d.entries)
	}
	taken := d.entries[:n]
	d.entries = d.entries[n:]
	return taken, nil
}
