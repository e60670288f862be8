// Package dir keeps a store's objects in a directory: on the node, or on a file system
// that nodes share. It takes no locks and maps no files, so it works over NFS.
package dir

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

const (
	// No object's name begins with a dot.
	partsDir = ".parts"
	// partAge is when a file that is still being written is taken for that of a writer
	// that was killed. A living one writes MaxObject bytes in less, or else its Put
	// fails and is tried again.
	partAge = time.Hour
	// oneWrite is how much is written between two looks at the context.
	oneWrite = 1 << 20
	// onePage is how many entries of a directory are held at a time.
	onePage = 512
)

// Open opens the store in a directory, which is made if only it itself is missing: where
// its parent is missing, too, a file system may not be mounted.
func Open(path string) (backend.Backend, error) {
	made := os.Mkdir(path, 0o700)
	if made != nil && !errors.Is(made, fs.ErrExist) {
		if errors.Is(made, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s does not exist", backend.ErrNoStore, filepath.Dir(path))
		}
		return nil, classify(fmt.Errorf("make the store's directory: %w", made), path)
	}
	if info, err := os.Lstat(path); err != nil {
		return nil, classify(fmt.Errorf("the store's directory: %w", err), path)
	} else if !info.IsDir() {
		return nil, fmt.Errorf("%w: %s is no directory", backend.ErrNoStore, path)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, classify(fmt.Errorf("the store's directory: %w", err), path)
	}
	d := &directory{path: path, root: root}
	if made == nil {
		if err := syncDir(filepath.Dir(path)); err != nil {
			return nil, errors.Join(fmt.Errorf("the store's directory: %w", err), root.Close())
		}
	}
	if err := d.sweep(); err != nil {
		return nil, errors.Join(classify(fmt.Errorf("remove what killed writers left in %s: %w", path, err), path), root.Close())
	}
	return d, nil
}

type directory struct {
	path string
	root *os.Root

	mu    sync.Mutex
	swept time.Time
}

// Put writes a file of another name first: what has the object's name is whole.
func (d *directory) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := backend.CheckPut(name, data, refs); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.sweepIfDue(); err != nil {
		return d.failed("put", name, err)
	}
	if err := d.put(ctx, name, data); err != nil {
		return d.failed(fmt.Sprintf("put %d bytes as", len(data)), name, err)
	}
	return nil
}

func (d *directory) put(ctx context.Context, name string, data []byte) (err error) {
	parts, err := d.folder(partsDir, true)
	if err != nil {
		return err
	}
	defer parts.Close()
	group, file := split(name)
	folder, err := d.folder(group, true)
	if err != nil {
		return err
	}
	defer folder.Close()

	part := partName()
	f, err := parts.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			parts.Remove(part) // else it is swept later
		}
	}()
	for rest := data; len(rest) > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Write(rest[:min(len(rest), oneWrite)])
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil { // NFS may say only here that there is no room
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Rename replaces a symbolic link, and is refused where a directory is.
	if err := d.root.Rename(partsDir+"/"+part, filepath.Join(group, file)); err != nil {
		return err
	}
	return syncRoot(folder)
}

// Read reads from one file all along, also if it is replaced meanwhile.
func (d *directory) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := backend.CheckRead(name, offset, length); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	data, err := d.read(name, offset, length)
	if errors.Is(err, fs.ErrNotExist) {
		if err := d.gone(); err != nil {
			return nil, d.failed("read", name, err)
		}
		return nil, fmt.Errorf("%w: %s in %s", backend.ErrNotFound, name, d.path)
	}
	if err != nil {
		return nil, d.failed("read", name, err)
	}
	return data, nil
}

func (d *directory) read(name string, offset, length int64) ([]byte, error) {
	group, file := split(name)
	folder, err := d.folder(group, false)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	f, err := openFile(folder, file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from, n, err := backend.Range(name, info.Size(), offset, length)
	if err != nil {
		return nil, err
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(f, from, n), data); err != nil {
		return nil, err
	}
	return data, nil
}

// List leaves out what is no object of a store.
func (d *directory) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		if err := d.list(ctx, prefix, yield); err != nil && !errors.Is(err, errEnough) {
			yield(backend.Object{}, d.failed("list", prefix, err))
		}
	}
}

var errEnough = errors.New("the caller has seen enough")

func (d *directory) list(ctx context.Context, prefix string, yield func(backend.Object, error) bool) error {
	if err := errors.Join(ctx.Err(), d.gone()); err != nil {
		return err
	}
	if group, _, slash := strings.Cut(prefix, "/"); slash {
		if backend.CheckName(group) != nil {
			return nil
		}
		err := d.listFolder(ctx, group, prefix, yield)
		if errors.Is(err, fs.ErrNotExist) {
			return d.gone()
		}
		return err
	}
	return d.listFolder(ctx, "", prefix, yield)
}

func (d *directory) listFolder(ctx context.Context, group, prefix string, yield func(backend.Object, error) bool) error {
	folder, err := d.folder(group, false)
	if err != nil {
		return err
	}
	defer folder.Close()
	f, err := folder.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries, err := f.ReadDir(onePage)
		for _, entry := range entries {
			name := entry.Name()
			if group != "" {
				name = group + "/" + name
			}
			if backend.CheckName(name) != nil {
				continue
			}
			if entry.IsDir() {
				if group == "" && (strings.HasPrefix(name, prefix) || strings.HasPrefix(prefix, name)) {
					if err := d.listFolder(ctx, name, prefix, yield); err != nil && !errors.Is(err, fs.ErrNotExist) {
						return err
					}
				}
				continue
			}
			if !entry.Type().IsRegular() || !strings.HasPrefix(name, prefix) {
				continue
			}
			info, err := entry.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // deleted meanwhile
			}
			if err != nil {
				return err
			}
			if !yield(backend.Object{Name: name, Size: info.Size()}, nil) {
				return errEnough
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (d *directory) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := d.delete(name)
	if errors.Is(err, fs.ErrNotExist) {
		err = d.gone()
	}
	if err != nil {
		return d.failed("delete", name, err)
	}
	return nil
}

func (d *directory) delete(name string) error {
	group, file := split(name)
	folder, err := d.folder(group, false)
	if err != nil {
		return err
	}
	defer folder.Close()
	info, err := folder.Lstat(file)
	if err != nil || info.IsDir() { // a directory of others is no object
		return err
	}
	if err := folder.Remove(file); err != nil {
		return err
	}
	return syncRoot(folder)
}

func (d *directory) Close() error { return d.root.Close() }

// folder opens a directory in the store, or the store's own. Neither is a symbolic link
// followed there, though it would lead to another place in the store only.
func (d *directory) folder(group string, make bool) (*os.Root, error) {
	if group == "" {
		return d.root.OpenRoot(".")
	}
	info, err := d.root.Lstat(group)
	if errors.Is(err, fs.ErrNotExist) && make {
		if err := d.root.Mkdir(group, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if err := syncRoot(d.root); err != nil {
			return nil, err
		}
		info, err = d.root.Lstat(group)
	}
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return nil, &fs.PathError{Op: "open", Path: group, Err: errors.New("it is a symbolic link, which no store makes")}
	}
	if !info.IsDir() {
		if make {
			return nil, fmt.Errorf("%w: %s is an object", backend.ErrInvalid, group)
		}
		return nil, &fs.PathError{Op: "open", Path: group, Err: fs.ErrNotExist}
	}
	folder, err := d.root.OpenRoot(group)
	if err != nil {
		return nil, err
	}
	opened, err := folder.Stat(".")
	if err == nil && !os.SameFile(info, opened) {
		err = &fs.PathError{Op: "open", Path: group, Err: errors.New("it was replaced while it was opened")}
	}
	if err != nil {
		folder.Close()
		return nil, err
	}
	return folder, nil
}

// gone says whether the store itself is: the directory removed, a file system mounted
// over it or taken away. That is not to be mistaken for an object that is missing.
func (d *directory) gone() error {
	there, err := os.Lstat(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	opened, openedErr := d.root.Stat(".")
	if err == nil && openedErr == nil && os.SameFile(there, opened) {
		return nil
	}
	return fmt.Errorf("%w: %s is not the directory any more that it was", backend.ErrNoStore, d.path)
}

// openFile opens a regular file only: not what a symbolic link leads to, and no pipe,
// which would block.
func openFile(folder *os.Root, name string) (*os.File, error) {
	for range 10 { // times that it is replaced in between
		info, err := folder.Lstat(name)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if !info.Mode().IsRegular() {
			return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("it is no regular file, which no store makes")}
		}
		f, err := folder.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		opened, err := f.Stat()
		if err == nil && opened.Mode().IsRegular() && os.SameFile(info, opened) {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("it is replaced all the time")}
}

func (d *directory) sweepIfDue() error {
	d.mu.Lock()
	due := time.Since(d.swept) > partAge
	d.mu.Unlock()
	if !due {
		return nil
	}
	return d.sweep()
}

// sweep removes the unfinished files of writers that were killed, by their age on the
// clock of the file system: the nodes' may differ.
func (d *directory) sweep() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	parts, err := d.folder(partsDir, true)
	if err != nil {
		return err
	}
	defer parts.Close()
	probe := partName()
	f, err := parts.OpenFile(probe, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err := errors.Join(err, f.Close(), parts.Remove(probe)); err != nil {
		return err
	}
	now := info.ModTime()
	listing, err := parts.Open(".")
	if err != nil {
		return err
	}
	defer listing.Close()
	for {
		entries, err := listing.ReadDir(onePage)
		for _, entry := range entries {
			info, err := entry.Info()
			if err == nil && info.Mode().IsRegular() && now.Sub(info.ModTime()) > partAge {
				err = parts.Remove(entry.Name())
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // another sweeps, too
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			d.swept = time.Now()
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (d *directory) failed(what, name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		if gone := d.gone(); gone != nil {
			err = gone
		}
	}
	return classify(fmt.Errorf("%s %s in %s: %w", what, name, d.path, err), d.path)
}

// classify gives what the system said the meaning that it has for a store.
func classify(err error, path string) error {
	for _, known := range []error{backend.ErrNotFound, backend.ErrInvalid, backend.ErrNoStore} {
		if errors.Is(err, known) {
			return err
		}
	}
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w: no space (or no inode) is left on the file system of %s: %w", backend.ErrFull, path, err)
	case errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: the quota on the file system of %s is used up: %w", backend.ErrFull, path, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: %w", backend.ErrDenied, err)
	case errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%w: a name is an object's and also the part before the slash of others: %w", backend.ErrInvalid, err)
	}
	return err
}

func split(name string) (group, file string) {
	if group, file, slash := strings.Cut(name, "/"); slash {
		return group, file
	}
	return "", name
}

func partName() string {
	var random [16]byte
	rand.Read(random[:]) // never fails
	return hex.EncodeToString(random[:])
}

func syncRoot(folder *os.Root) error {
	f, err := folder.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
