package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	blockSize  = checkpoint.BlockSize
	blockPages = blockSize / pageSize
)

// blockID names a block of a file of pages: the file by its place in the list of files.
type blockID struct{ file, block int }

// source reads blocks, as they come and unchecked.
type source interface {
	// read fills p with the bytes of a file from an offset on. It tries until ctx ends.
	read(ctx context.Context, file string, p []byte, offset int64) error
}

// blocks reads files of pages by blocks, and gives none that is not what was written.
type blocks struct {
	from  source
	names []string
	sums  []checkpoint.FileBlocks
	small [][]byte // of files that have no list: their whole contents, checked

	mu      sync.Mutex
	reading map[blockID]*reading
}

// reading is a block that is being read, for all who want it.
type reading struct {
	done chan struct{}
	data []byte
	err  error
	left int // who has not released it
}

var buffers = sync.Pool{New: func() any { return new([blockSize]byte) }}

// newBlocks looks for the digests of all files of pages of a plan.
func newBlocks(ctx context.Context, p *Plan, from source) (*blocks, error) {
	m, digest, err := checkpoint.ReadManifest(p.Dir)
	if err != nil {
		return nil, err
	}
	if digest != p.ManifestDigest {
		return nil, fmt.Errorf("%w: %s has digest %s, and not %s", checkpoint.ErrCorrupt, checkpoint.ManifestName, digest, p.ManifestDigest)
	}
	list, err := checkpoint.ReadBlocks(p.Dir, m)
	if err != nil {
		return nil, err
	}
	b := &blocks{from: from, reading: map[blockID]*reading{}}
	for _, process := range p.Processes {
		b.names = append(b.names, process.File)
		sums, ok := list.Of(process.File)
		var small []byte
		if !ok {
			if small, err = readSmall(ctx, from, m, process.File); err != nil {
				return nil, err
			}
		}
		b.sums, b.small = append(b.sums, sums), append(b.small, small)
	}
	return b, nil
}

// readSmall reads a file of one block, whose digest is in the manifest.
func readSmall(ctx context.Context, from source, m *checkpoint.Manifest, name string) ([]byte, error) {
	for _, f := range m.Files {
		if f.Path != name || f.Size > blockSize {
			continue
		}
		data := make([]byte, f.Size)
		if err := from.read(ctx, name, data, 0); err != nil {
			return nil, err
		}
		return data, f.Check(data)
	}
	return nil, fmt.Errorf("%w: no %s", checkpoint.ErrMissing, name)
}

// get reads a block, or waits for who does already. The caller calls release when it is
// done with the data.
func (b *blocks) get(ctx context.Context, id blockID) (data []byte, release func(), err error) {
	if small := b.small[id.file]; small != nil && id.block == 0 {
		return small, func() {}, nil
	}
	b.mu.Lock()
	r := b.reading[id]
	mine := r == nil
	if mine {
		r = &reading{done: make(chan struct{})}
		b.reading[id] = r
	}
	r.left++
	b.mu.Unlock()
	if mine {
		r.data, r.err = b.fetch(ctx, id)
		close(r.done)
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		b.release(id, r)
		return nil, nil, context.Cause(ctx)
	}
	if r.err != nil {
		b.release(id, r)
		return nil, nil, r.err
	}
	return r.data, func() { b.release(id, r) }, nil
}

func (b *blocks) release(id blockID, r *reading) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.left--; r.left > 0 {
		return
	}
	if b.reading[id] == r {
		delete(b.reading, id)
	}
	select {
	case <-r.done:
		if r.data != nil {
			buffers.Put((*[blockSize]byte)(r.data[:blockSize:blockSize]))
		}
	default: // whoever reads it has gone first: it is not there to be used again
	}
}

func (b *blocks) fetch(ctx context.Context, id blockID) ([]byte, error) {
	if id.block < 0 || id.block >= b.sums[id.file].Count() {
		return nil, fmt.Errorf("%w: %s has no block %d", checkpoint.ErrCorrupt, b.names[id.file], id.block)
	}
	offset, size := b.sums[id.file].Range(id.block)
	buffer := buffers.Get().(*[blockSize]byte)
	data := buffer[:size]
	err := b.from.read(ctx, b.names[id.file], data, offset)
	if err == nil {
		err = b.sums[id.file].Check(id.block, data)
	}
	if err != nil {
		buffers.Put(buffer)
		return nil, err
	}
	return data, nil
}

// local is a checkpoint's directory on this node. Its files stay open: they are there to
// the end, whoever removes their names.
type local struct{ files map[string]*os.File }

func openLocal(p *Plan) (*local, error) {
	root, err := os.OpenRoot(p.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the checkpoint: %w", err)
	}
	defer root.Close()
	l := &local{files: map[string]*os.File{}}
	for _, process := range p.Processes {
		if l.files[process.File] != nil {
			continue
		}
		f, err := root.Open(filepath.FromSlash(process.File))
		if err != nil {
			return nil, fmt.Errorf("open the checkpoint: %w", err)
		}
		l.files[process.File] = f
	}
	return l, nil
}

func (l *local) read(_ context.Context, file string, p []byte, offset int64) error {
	n, err := l.files[file].ReadAt(p, offset)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %s is shorter than it was written", checkpoint.ErrCorrupt, file)
	}
	return fmt.Errorf("read %s: %w", file, err)
}
