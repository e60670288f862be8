package archive

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
)

var errClosed = errors.New("the reader is closed")

// openFile is the one file that a Reader has open.
type openFile struct {
	mu     sync.Mutex // Close may come at any time
	path   string
	file   fs.File
	closed bool
}

func (o *openFile) close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	return o.drop()
}

func (o *openFile) drop() error {
	if o.file == nil {
		return nil
	}
	err := o.file.Close()
	o.file, o.path = nil, ""
	return err
}

// readAt reads from a file that has a size, and opens it if another one is.
func (o *openFile) readAt(dir fs.FS, path string, size int64, p []byte, off int64) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return 0, errClosed
	}
	if o.path != path {
		if err := o.drop(); err != nil {
			return 0, err
		}
		f, err := openRegular(dir, path, size)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", ErrChanged, err)
		}
		o.file, o.path = f, path
	}
	n, err := o.file.(io.ReaderAt).ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || err == io.EOF {
		err = fmt.Errorf("%s ends early", path)
	}
	return n, fmt.Errorf("%w: %w", ErrChanged, err)
}

// openRegular opens a regular file of a known size that can be read at any place.
func openRegular(dir fs.FS, path string, size int64) (fs.File, error) {
	info, err := fs.Lstat(dir, path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() != size {
		return nil, fmt.Errorf("%s is no regular file of %d bytes", path, size)
	}
	f, err := dir.Open(path)
	if err != nil {
		return nil, err
	}
	if _, ok := f.(io.ReaderAt); !ok {
		f.Close()
		return nil, fmt.Errorf("%s cannot be read at any place", path)
	}
	return f, nil
}
