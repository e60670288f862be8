package store

import (
	"context"
	"fmt"
	"sort"
	"sync"
)

// Reader reads parts of the files of one checkpoint, each with what lies around it in its
// frames and no more. It keeps the list of files and what it needs of indexes. Several
// may read at a time.
type Reader struct {
	s       *Store
	id      ID
	indexes *indexes
	packs   []Pack
	files   map[string]*readFile

	mu   sync.Mutex
	ends [][]int64 // of a pack's blocks, as offsets in all of them; nil: not read yet
}

// readFile is a file with where its extents begin.
type readFile struct {
	file

	mu     sync.Mutex
	starts []int64 // one more than there are extents; nil: not known yet
}

// Open opens a checkpoint for reading parts of its files.
func (s *Store) Open(ctx context.Context, id ID) (*Reader, error) {
	root, _, err := s.readRoot(ctx, id)
	if err != nil {
		return nil, err
	}
	r := &Reader{s: s, id: id, indexes: newIndexes(s), packs: root.packs(), files: map[string]*readFile{}}
	files, err := s.files(ctx, r.indexes, root)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		r.files[f.path] = &readFile{file: f}
	}
	r.ends = make([][]int64, len(r.packs))
	return r, nil
}

// ReadAt fills p with the bytes of a file from an offset on. All of them have to be there.
func (r *Reader) ReadAt(ctx context.Context, name string, p []byte, offset int64) error {
	f := r.files[name]
	if f == nil {
		return fmt.Errorf("%w: checkpoint %s has no file %s", ErrMissing, r.id, name)
	}
	if offset < 0 || offset > f.size || int64(len(p)) > f.size-offset {
		return corrupt(name, "it is of %d bytes, and has no %d from %d on", f.size, len(p), offset)
	}
	starts, err := r.starts(ctx, f)
	if err != nil {
		return err
	}
	// The first extent that ends behind the offset.
	for i := sort.Search(len(f.extents), func(i int) bool { return starts[i+1] > offset }); len(p) > 0; i++ {
		n := int(min(starts[i+1]-offset, int64(len(p))))
		if err := r.readExtent(ctx, f.extents[i], p[:n], offset-starts[i]); err != nil {
			return err
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// starts says where the extents of a file begin, and where the last one ends.
func (r *Reader) starts(ctx context.Context, f *readFile) ([]int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.starts != nil {
		return f.starts, nil
	}
	starts := make([]int64, 1, len(f.extents)+1)
	end := int64(0)
	for _, e := range f.extents {
		size := int64(e.count)
		if e.pack >= 0 {
			ends, err := r.blockEnds(ctx, e.pack)
			if err != nil {
				return nil, err
			}
			if e.first+e.count >= len(ends) {
				return nil, corrupt(r.packs[e.pack].name(), "it has no block %d", e.first+e.count-1)
			}
			size = ends[e.first+e.count] - ends[e.first]
		}
		end += size
		starts = append(starts, end)
	}
	if end != f.size {
		return nil, corrupt("the list of files", "%s is of %d bytes, and its blocks are of %d", f.path, f.size, end)
	}
	f.starts = starts
	return starts, nil
}

func (r *Reader) blockEnds(ctx context.Context, pack int) ([]int64, error) {
	r.mu.Lock()
	ends := r.ends[pack]
	r.mu.Unlock()
	if ends != nil {
		return ends, nil
	}
	p, err := r.indexes.read(ctx, r.packs[pack])
	if err != nil {
		return nil, err
	}
	ends = []int64{0}
	for _, size := range p.sizes() {
		ends = append(ends, ends[len(ends)-1]+int64(size))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ends[pack] = ends
	return ends, nil
}

// readExtent reads a part of an extent, which is known to lie within it.
func (r *Reader) readExtent(ctx context.Context, e extent, p []byte, offset int64) error {
	if e.pack < 0 {
		clear(p)
		return nil
	}
	ends, err := r.blockEnds(ctx, e.pack)
	if err != nil {
		return err
	}
	index, err := r.indexes.read(ctx, r.packs[e.pack])
	if err != nil {
		return err
	}
	begin := ends[e.first] + offset // of p, in all blocks of the pack
	end := begin + int64(len(p))
	first := sort.Search(len(ends)-1, func(i int) bool { return ends[i+1] > begin })
	last := sort.Search(len(ends)-1, func(i int) bool { return ends[i+1] >= end })
	return r.s.read(ctx, index, framesOf(index, first, last-first+1), func(f *frame, raw []byte) error {
		at := ends[f.first] // of raw
		from, to := max(begin, at), min(end, at+int64(len(raw)))
		if from < to {
			copy(p[from-begin:to-begin], raw[from-at:])
		}
		return nil
	})
}
