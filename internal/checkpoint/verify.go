package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// A restore waits for the verification of all that it is made from, which at the speed
// of one processor takes about as long as the restore itself. So all of them work on it,
// on a file each, and on large files together, block by block.
const (
	// runBlocks is how many blocks of a file, one after the other, one takes at a time:
	// enough for the disk to read ahead.
	runBlocks = 128
	// maxVerifiers bounds how many work at a time.
	maxVerifiers = 8
)

// piece is what one takes at a time: a run of a file's blocks, or a whole file.
type piece struct {
	of         *whole
	begin, end int
}

// whole is a file on its way through verification. Of one without a list of blocks
// there is one piece.
type whole struct {
	File
	blocks FileBlocks
	listed bool
	open   func() (*os.File, error) // once
	left   sync.WaitGroup           // pieces that are not done
}

// verifyFiles checks files of a checkpoint. Of several that are not what was written it
// names one. Where there is no list of blocks each is one's work.
func verifyFiles(ctx context.Context, root *os.Root, files []File, list *Blocks, spare func(ctx context.Context)) error {
	var pieces []piece
	for _, f := range files {
		of := &whole{File: f}
		if list != nil {
			of.blocks, of.listed = list.Of(f.Path)
		}
		if !of.listed {
			pieces = append(pieces, piece{of: of})
			continue
		}
		of.open = sync.OnceValues(func() (*os.File, error) { return openWhole(root, f) })
		for begin := 0; begin < of.blocks.Count(); begin += runBlocks {
			pieces = append(pieces, piece{of, begin, min(begin+runBlocks, of.blocks.Count())})
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan piece)
	var workers sync.WaitGroup
	given, all := context.WithCancel(ctx) // ends when there is nothing more to take
	defer all()
	for i := range min(runtime.GOMAXPROCS(0), maxVerifiers) {
		workers.Go(func() {
			buffer := make([]byte, BlockSize)
			for {
				if i > 0 && i == runtime.GOMAXPROCS(0)-1 && spare != nil {
					spare(given)
				}
				p, more := <-work
				if !more {
					return
				}
				if err := p.verify(ctx, root, buffer); err != nil {
					cancel(err)
				}
			}
		})
	}
	var last *whole
	for _, p := range pieces {
		p.of.left.Add(1)
		if last != p.of {
			last.closeAfter()
			last = p.of
		}
		select {
		case work <- p:
			continue
		case <-ctx.Done():
			p.of.left.Done()
		}
		break
	}
	close(work)
	all()
	workers.Wait()
	last.closeAfter()
	return context.Cause(ctx)
}

// closeAfter closes the file when those who work on it have done so.
func (w *whole) closeAfter() {
	if w == nil || !w.listed {
		return
	}
	go func() {
		w.left.Wait()
		if f, err := w.open(); err == nil {
			f.Close()
		}
	}()
}

func (p piece) verify(ctx context.Context, root *os.Root, buffer []byte) error {
	defer p.of.left.Done()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if !p.of.listed {
		return verifyFile(ctx, root, p.of.File)
	}
	f, err := p.of.open()
	if err != nil {
		return err
	}
	for block := p.begin; block < p.end; block++ {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		offset, size := p.of.blocks.Range(block)
		if n, err := f.ReadAt(buffer[:size], offset); err != nil && (err != io.EOF || n < size) {
			return fmt.Errorf("read %s: %w", p.of.Path, err)
		}
		if err := p.of.blocks.Check(block, buffer[:size]); err != nil {
			return err
		}
	}
	return nil
}

// openWhole opens a file that has the size that the manifest says.
func openWhole(root *os.Root, want File) (*os.File, error) {
	f, err := openRegular(root, filepath.FromSlash(want.Path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no %s", ErrMissing, want.Path)
	} else if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != want.Size {
		err = fmt.Errorf("%w: %s has another size than the %d bytes written", ErrCorrupt, want.Path, want.Size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
