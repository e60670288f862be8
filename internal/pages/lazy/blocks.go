package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

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

// Ask asks whoever brings a checkpoint to this node for a block of a file. It returns
// when the block is there, or after a while. urgent says that a process waits for it. An
// error says that nobody was there to be asked.
type Ask func(ctx context.Context, file string, block int, urgent bool) (Answer, error)

// Answer is what is said of a block.
type Answer struct {
	There bool
	// Trouble says what stands in the way for now; Lost, why the block will not come.
	Trouble, Lost string
}

// blocks reads files of pages by blocks, and gives none that is not what was written.
// Whether a block is there, in a checkpoint that is still being brought, is told by its
// digest: a part that is not there yet is of zeros.
type blocks struct {
	from  source
	ask   Ask           // nil: all is there
	alone time.Duration // how long nobody may be there to be asked
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

// newBlocks looks for the digests of all files of pages of a plan. ask may be nil if the
// plan's checkpoint is whole.
func newBlocks(ctx context.Context, p *Plan, from source, ask Ask) (*blocks, error) {
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
	b := &blocks{from: from, alone: p.Patience, reading: map[blockID]*reading{}}
	if p.Partial {
		b.ask = ask
	}
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

// get reads a block, or waits for who does already. urgent says that a process waits for
// it. The caller calls release when it is done with the data.
func (b *blocks) get(ctx context.Context, id blockID, urgent bool) (data []byte, release func(), err error) {
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
	switch {
	case mine:
		r.data, r.err = b.fetch(ctx, id, urgent)
		close(r.done)
	case urgent && b.ask != nil:
		b.hurry(ctx, id, r)
	}
	if !mine { // who reads it knows more than that its time is over
		select {
		case <-r.done:
		case <-ctx.Done():
			b.release(id, r)
			return nil, nil, context.Cause(ctx)
		}
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

func (b *blocks) fetch(ctx context.Context, id blockID, urgent bool) ([]byte, error) {
	if id.block < 0 || id.block >= b.sums[id.file].Count() {
		return nil, fmt.Errorf("%w: %s has no block %d", checkpoint.ErrCorrupt, b.names[id.file], id.block)
	}
	offset, size := b.sums[id.file].Range(id.block)
	buffer := buffers.Get().(*[blockSize]byte)
	data := buffer[:size]
	read := func() error {
		if err := b.from.read(ctx, b.names[id.file], data, offset); err != nil {
			return err
		}
		return b.sums[id.file].Check(id.block, data)
	}
	err := read()
	if b.ask != nil && errors.Is(err, checkpoint.ErrCorrupt) {
		if err = b.await(ctx, id, urgent); err == nil {
			err = read()
		}
	}
	if err != nil {
		buffers.Put(buffer)
		return nil, err
	}
	return data, nil
}

// await asks for a block until it is there.
func (b *blocks) await(ctx context.Context, id blockID, urgent bool) error {
	heard, trouble := time.Now(), ""
	for {
		answer, err := b.ask(ctx, b.names[id.file], id.block, urgent)
		switch {
		case ctx.Err() != nil:
			if trouble != "" {
				return fmt.Errorf("%w (%s)", context.Cause(ctx), trouble)
			}
			return context.Cause(ctx)
		case err == nil && answer.There:
			return nil
		case err == nil && answer.Lost != "":
			return errors.New(answer.Lost)
		case err == nil:
			heard, trouble = time.Now(), answer.Trouble
			continue
		case time.Since(heard) > b.alone:
			return fmt.Errorf("nobody has brought it for %s: %w", b.alone, err)
		}
		// Who brings it may be started anew.
		trouble = err.Error()
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// hurry says that a process waits for what somebody else is reading already. Whether that
// helps is seen by who reads.
func (b *blocks) hurry(ctx context.Context, id blockID, r *reading) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		select {
		case <-r.done:
		case <-ctx.Done():
		}
	}()
	_ = b.await(ctx, id, true)
	cancel()
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
