package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// maxRead bounds what is read of a pack at once, unless one frame is larger.
const maxRead = 4 << 20

// Get writes the files of a checkpoint below an empty directory, and makes them durable.
// It checks every block; whether the files are the checkpoint's, its manifest tells
// (checkpoint.Verify). progress is told how many bytes have been written; it may be nil.
//
// It needs, besides the lists of extents, maxRead and a few frames for each processor.
func (s *Store) Get(ctx context.Context, id ID, dir string, progress func(done int64)) error {
	return s.GetFiles(ctx, id, dir, func(string) bool { return true }, progress)
}

// GetFiles does so with those files that which says yes to, none of which may be there.
func (s *Store) GetFiles(ctx context.Context, id ID, dir string, which func(path string) bool, progress func(done int64)) error {
	r, _, err := s.readRoot(ctx, id)
	if err != nil {
		return err
	}
	indexes := newIndexes(s)
	files, err := s.files(ctx, indexes, r)
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(f file) bool { return !which(f.path) })
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("write the checkpoint: %w", err)
	}
	defer root.Close()
	g := &getter{s: s, indexes: indexes, root: root, progress: progress, packs: r.packs()}
	if err := g.create(files); err != nil {
		return err
	}
	if err := g.fill(ctx, files); err != nil {
		return err
	}
	return g.sync(files)
}

// ReadFile reads one file of a checkpoint, of at most so many bytes.
func (s *Store) ReadFile(ctx context.Context, id ID, name string, most int64) ([]byte, error) {
	r, _, err := s.readRoot(ctx, id)
	if err != nil {
		return nil, err
	}
	indexes := newIndexes(s)
	files, err := s.files(ctx, indexes, r)
	if err != nil {
		return nil, err
	}
	packs := r.packs()
	for _, f := range files {
		if f.path != name {
			continue
		}
		if f.size > most {
			return nil, corrupt(name, "it is of %d bytes, more than %d", f.size, most)
		}
		data, err := s.contents(ctx, indexes, packs, f.extents, f.size)
		if err == nil && int64(len(data)) != f.size {
			err = corrupt(name, "it is of %d bytes, and %d were expected", len(data), f.size)
		}
		return data, err
	}
	return nil, fmt.Errorf("%w: checkpoint %s has no file %s", ErrMissing, id, name)
}

// files reads a root's list of files.
func (s *Store) files(ctx context.Context, indexes *indexes, r *root) ([]file, error) {
	packs := r.packs()
	data, err := s.contents(ctx, indexes, packs, r.mapFile().extents, r.MapBytes)
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != r.MapBytes {
		return nil, corrupt("the list of files", "it is of %d bytes, and %d were expected", len(data), r.MapBytes)
	}
	files, err := decodeFiles(data, len(packs))
	if err != nil {
		return nil, corrupt("the list of files", "%v", err)
	}
	return files, nil
}

// contents reads what extents consist of into memory: for what is small. It gives up
// beyond size bytes.
func (s *Store) contents(ctx context.Context, indexes *indexes, packs []Pack, extents []extent, size int64) ([]byte, error) {
	data := make([]byte, 0, min(size, 1<<20))
	for _, e := range extents {
		if int64(len(data)) > size {
			break
		}
		if e.pack < 0 {
			if int64(len(data)+e.count) > size {
				break
			}
			data = append(data, make([]byte, e.count)...)
			continue
		}
		p, err := indexes.read(ctx, packs[e.pack])
		if err != nil {
			return nil, err
		}
		if e.first+e.count > len(p.ids) {
			return nil, corrupt(p.name(), "it has no block %d", e.first+e.count-1)
		}
		err = s.read(ctx, p, framesOf(p, e.first, e.count), func(f *frame, raw []byte) error {
			begin := 0
			for i, size := range f.sizes {
				if block := f.first + i; block >= e.first && block < e.first+e.count {
					data = append(data, raw[begin:begin+size]...)
				}
				begin += size
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return data, nil
}

// framesOf are the frames that blocks are in, as the first's number and how many.
func framesOf(p *packIndex, first, count int) []int {
	var numbers []int
	for i := range p.frames {
		f := &p.frames[i]
		if f.first < first+count && first < f.first+len(f.sizes) {
			numbers = append(numbers, i)
		}
	}
	return numbers
}

// read gives the frames of a pack, by ascending numbers, decoded and checked. Those that
// are close are read together.
func (s *Store) read(ctx context.Context, p *packIndex, numbers []int, give func(f *frame, raw []byte) error) error {
	buffer := make([]byte, 0, maxFrame)
	for len(numbers) > 0 {
		begin, n := p.frames[numbers[0]].offset, 1
		end := begin + int64(p.frames[numbers[0]].stored)
		for n < len(numbers) {
			f := &p.frames[numbers[n]]
			// What lies between is read, too, where that is less than a request costs.
			if f.offset-end > maxRead/16 || f.offset+int64(f.stored)-begin > maxRead {
				break
			}
			end = f.offset + int64(f.stored)
			n++
		}
		data, err := s.readPart(ctx, p.name(), begin, end-begin)
		if err != nil {
			return err
		}
		for _, number := range numbers[:n] {
			f := &p.frames[number]
			at := f.offset - begin
			raw, err := s.blocksOf(p, number, data[at:at+int64(f.stored)], buffer)
			if err != nil {
				return err
			}
			if err := give(f, raw); err != nil {
				return err
			}
		}
		numbers = numbers[n:]
	}
	return nil
}

// getter writes the files of one checkpoint.
type getter struct {
	s        *Store
	root     *os.Root
	progress func(int64)
	indexes  *indexes
	packs    []Pack
	done     atomic.Int64
}

// create makes the files, each with its size and without blocks.
func (g *getter) create(files []file) error {
	for _, f := range files {
		if dir := path.Dir(f.path); dir != "." {
			if err := g.root.MkdirAll(dir, 0o700); err != nil {
				return fmt.Errorf("write the checkpoint: %w", err)
			}
		}
		out, err := g.root.OpenFile(f.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, f.mode&fs.ModePerm)
		if err != nil {
			return fmt.Errorf("write the checkpoint: %w", err)
		}
		if err := errors.Join(out.Truncate(f.size), out.Close()); err != nil {
			return fmt.Errorf("write %s: %w", f.path, err)
		}
	}
	return nil
}

// piece is where blocks of a pack belong.
type piece struct {
	first, count int // blocks
	file         int
	offset       int64
}

// fill writes the blocks, pack by pack: each is read once, from its begin to its end.
func (g *getter) fill(ctx context.Context, files []file) error {
	pieces, err := g.plan(ctx, files)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	for number, of := range pieces {
		if len(of) == 0 {
			continue
		}
		group.Go(func() error { return g.fillFrom(ctx, g.packs[number], of, files) })
	}
	return group.Wait()
}

// plan says, for each pack, which of its blocks go where, by ascending blocks.
func (g *getter) plan(ctx context.Context, files []file) ([][]piece, error) {
	pieces := make([][]piece, len(g.packs))
	ends := make([][]int64, len(g.packs)) // of blocks, as offsets in all of a pack's
	for i := range files {
		f := &files[i]
		offset := int64(0)
		for _, e := range f.extents {
			if e.pack < 0 {
				offset += int64(e.count)
				continue
			}
			if ends[e.pack] == nil {
				p, err := g.indexes.read(ctx, g.packs[e.pack])
				if err != nil {
					return nil, err
				}
				ends[e.pack] = append(ends[e.pack], 0)
				sum := int64(0)
				for _, size := range p.sizes() {
					sum += int64(size)
					ends[e.pack] = append(ends[e.pack], sum)
				}
			}
			if e.first+e.count >= len(ends[e.pack]) {
				return nil, corrupt(g.packs[e.pack].name(), "it has no block %d", e.first+e.count-1)
			}
			pieces[e.pack] = append(pieces[e.pack], piece{e.first, e.count, i, offset})
			offset += ends[e.pack][e.first+e.count] - ends[e.pack][e.first]
		}
		if offset != f.size {
			return nil, corrupt("the list of files", "%s is of %d bytes, and its blocks are of %d", f.path, f.size, offset)
		}
		f.extents = nil
	}
	for _, of := range pieces {
		slices.SortFunc(of, func(a, b piece) int { return a.first - b.first })
	}
	return pieces, nil
}

func (g *getter) fillFrom(ctx context.Context, of Pack, pieces []piece, files []file) error {
	p, err := g.indexes.read(ctx, of)
	if err != nil {
		return err
	}
	var numbers []int
	next := 0
	for i := range p.frames {
		f := &p.frames[i]
		for next < len(pieces) && pieces[next].first+pieces[next].count <= f.first {
			next++
		}
		// A later piece may begin before an earlier one has ended: look at all that may.
		for _, c := range pieces[next:] {
			if c.first >= f.first+len(f.sizes) {
				break
			}
			if f.first < c.first+c.count {
				numbers = append(numbers, i)
				break
			}
		}
	}
	open := map[int]*os.File{}
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	at := 0
	return g.s.read(ctx, p, numbers, func(f *frame, raw []byte) error {
		for at < len(pieces) && pieces[at].first+pieces[at].count <= f.first {
			at++
		}
		for i := at; i < len(pieces) && pieces[i].first < f.first+len(f.sizes); i++ {
			if err := g.write(f, raw, &pieces[i], files, open); err != nil {
				return err
			}
		}
		return nil
	})
}

// write writes those blocks of a frame that belong to a piece. The piece's blocks come
// in order, and it is moved on behind them.
func (g *getter) write(f *frame, raw []byte, c *piece, files []file, open map[int]*os.File) error {
	skip, begin := c.first-f.first, 0
	if skip < 0 || skip >= len(f.sizes) || c.count == 0 {
		return nil
	}
	for _, size := range f.sizes[:skip] {
		begin += size
	}
	n, end := min(c.count, len(f.sizes)-skip), begin
	for _, size := range f.sizes[skip : skip+n] {
		end += size
	}
	out := open[c.file]
	if out == nil {
		var err error
		if out, err = g.root.OpenFile(files[c.file].path, os.O_WRONLY, 0); err != nil {
			return fmt.Errorf("write the checkpoint: %w", err)
		}
		open[c.file] = out
	}
	if _, err := out.WriteAt(raw[begin:end], c.offset); err != nil {
		return fmt.Errorf("write %s: %w", files[c.file].path, err)
	}
	c.first, c.count, c.offset = c.first+n, c.count-n, c.offset+int64(end-begin)
	done := g.done.Add(int64(end - begin))
	if g.progress != nil {
		g.progress(done)
	}
	return nil
}

func (g *getter) sync(files []file) error {
	for _, f := range files {
		out, err := g.root.OpenFile(f.path, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("write the checkpoint: %w", err)
		}
		if err := errors.Join(out.Sync(), out.Close()); err != nil {
			return fmt.Errorf("write %s: %w", f.path, err)
		}
	}
	return fs.WalkDir(g.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		dir, err := g.root.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(dir.Sync(), dir.Close())
	})
}
