package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"podstasis.dev/stasis/internal/store/backend"
)

// PutOptions say how a checkpoint is written.
type PutOptions struct {
	Labels         map[string]string
	ManifestDigest string
	// Alike names what checkpoints with much in common have in common, such as the Pod,
	// and its images. Blocks of the latest checkpoints of these are not written again.
	// No others are looked at: nobody learns from the size what else is in the store.
	Alike []string
	// Journal remembers what has been written, for another attempt after this one was
	// interrupted; it may be nil.
	Journal Journal
	// Progress is told how many bytes of the files have been worked through; it may be nil.
	Progress func(done int64)
	// Turn is waited for when the store has answered, before the writer takes the memory
	// that it needs; what it returns is called when that is free again. It may be nil.
	Turn func(context.Context) (over func(), err error)
}

// Journal is kept where the writer runs. Who loses it writes again what was not finished.
type Journal interface {
	// Packs that were written for the same checkpoint, and its root, if it came so far.
	Read() (packs []Pack, root *ID, err error)
	AddPack(Pack) error
	SetRoot(ID) error
}

// MemoryLimit is what a process can be limited to (debug.SetMemoryLimit) in which one
// writer writes at a time. With what is not the heap's, an agent then stays below 256 MiB.
const MemoryLimit = 160 << 20

// Buffers that a writer holds, whatever the checkpoint's size: packs of packSize, slabs
// of slabSize. With what it knows of blocks (known.go) this is all its memory but for
// the lists of extents, 16 bytes for each run of blocks and for each frame.
const (
	packBuffers = 2 // one is filled, the other is on its way
	slabBuffers = 6
	packSlack   = 1 << 20 // for the last frame and the index of most packs
)

// Put writes the files below a directory as a checkpoint, and returns what the store
// says of it. Until it returns there is none: what an interrupted one wrote is removed
// by a later collection, or used by the next attempt.
func (s *Store) Put(ctx context.Context, dir fs.FS, o PutOptions) (_ Checkpoint, err error) {
	if o.Journal == nil {
		o.Journal = noJournal{}
	}
	l, err := s.begin(ctx)
	if err != nil {
		return Checkpoint{}, err
	}
	defer l.end(ctx)
	if o.Turn != nil {
		over, err := o.Turn(ctx)
		if err != nil {
			return Checkpoint{}, err
		}
		defer over()
	}
	w, done, err := s.newWriter(ctx, o)
	if err != nil || done != nil {
		if err != nil {
			return Checkpoint{}, err
		}
		return *done, nil
	}
	files, err := w.writeAll(dir)
	if err != nil {
		return Checkpoint{}, err
	}
	return w.finish(ctx, l, files, o)
}

type noJournal struct{}

func (noJournal) Read() ([]Pack, *ID, error) { return nil, nil, nil }
func (noJournal) AddPack(Pack) error         { return nil }
func (noJournal) SetRoot(ID) error           { return nil }

// writer writes one checkpoint.
type writer struct {
	s        *Store
	journal  Journal
	progress func(int64)
	slabs    chan []byte
	buffers  chan []byte

	// Uploads go on when the workers have ended: each group's context ends with it.
	workers, uploads *errgroup.Group
	working, sending context.Context

	mu     sync.Mutex
	known  known
	news   int      // blocks
	placed []placed // new blocks, frame by frame
	done   int64
	shares rootShares
	// found are the packs that were there, by their numbers.
	found []foundPack

	building sync.Mutex
	packs    []Pack      // those that were there, then new ones; zero until one is finished
	earlier  map[ID]bool // packs that an attempt before this one wrote
	builder  *packBuilder
	newBytes int64
}

// newWriter finds what the store has already. If this checkpoint is in it, nothing is
// left to be done.
func (s *Store) newWriter(ctx context.Context, o PutOptions) (*writer, *Checkpoint, error) {
	w := &writer{s: s, journal: o.Journal, progress: o.Progress, slabs: make(chan []byte, slabBuffers), buffers: make(chan []byte, packBuffers)}
	for range slabBuffers {
		w.slabs <- nil // made when it is needed
	}
	for range packBuffers {
		w.buffers <- nil
	}
	packs, id, err := o.Journal.Read()
	if err != nil {
		return nil, nil, fmt.Errorf("read what an earlier attempt wrote: %w", err)
	}
	if id != nil {
		c, err := s.Describe(ctx, *id)
		if err == nil {
			return nil, &c, nil
		} else if !errors.Is(err, ErrMissing) {
			return nil, nil, err
		}
	}
	// In this order: a pack that is not condemned now, and is there later, stays.
	condemned, err := s.condemned(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, of := range packs {
		if err := w.learn(ctx, condemned, of, 0); err != nil {
			return nil, nil, err
		}
	}
	w.earlier = make(map[ID]bool, len(w.packs))
	for _, of := range w.packs {
		w.earlier[of.ID] = true
	}
	alike, err := s.alike(ctx, o.Alike)
	if err != nil {
		return nil, nil, err
	}
	var previous map[ID]blockSet
	for _, id := range alike {
		r, _, err := s.readRoot(ctx, id)
		if errors.Is(err, ErrMissing) || errors.Is(err, ErrCorrupt) {
			continue // it only costs room; verification finds what is corrupt
		} else if err != nil {
			return nil, nil, err
		}
		for i, of := range r.packs() {
			if err := w.learn(ctx, condemned, of, r.PackUsed[i]*worthUsing); err != nil {
				return nil, nil, err
			}
		}
		if previous != nil {
			continue
		}
		if previous, err = s.consists(ctx, r); err == nil {
			w.shares.Previous = id.String()
		} else if !errors.Is(err, ErrMissing) && !errors.Is(err, ErrCorrupt) {
			return nil, nil, err
		}
	}
	for _, of := range w.packs {
		w.found = append(w.found, foundPack{w.earlier[of.ID], previous[of.ID]})
	}
	w.uploads, w.sending = errgroup.WithContext(ctx)
	w.workers, w.working = errgroup.WithContext(w.sending)
	w.workers.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	return w, nil, nil
}

// foundPack is what is known of a pack that was there.
type foundPack struct {
	own      bool     // an attempt before this one wrote it
	previous blockSet // of what the previous checkpoint consists of
}

// worthUsing is the part of a pack, one in so many, that the latest checkpoint must
// consist of for the next one to use the pack, too. Else what changes little by little
// would keep packs for ever of which hardly a block is needed any more: they are removed
// whole.
const worthUsing = 5

// learn makes a pack's blocks known, up to a bound, if it has at most so many; 0 is any
// number. A pack that cannot be read is not used.
func (w *writer) learn(ctx context.Context, condemned map[ID]bool, of Pack, most int) error {
	if condemned[of.ID] || slices.Contains(w.packs, of) || w.known.count >= maxKnown {
		return nil
	}
	p, err := w.s.readIndex(ctx, of)
	if errors.Is(err, ErrMissing) || errors.Is(err, ErrCorrupt) {
		return nil
	} else if err != nil {
		return err
	}
	if most > 0 && len(p.ids) > most {
		return nil
	}
	number := int32(len(w.packs))
	w.packs = append(w.packs, of)
	for i, id := range p.ids {
		if _, ok := w.known.find(id); !ok {
			w.known.add(id, refOf(place{number, int32(i)}))
		}
	}
	return nil
}

// written is a file whose blocks are not all in their places yet.
type written struct {
	file
	slabs [][]run
}

func (w *writer) writeAll(dir fs.FS) ([]*written, error) {
	var files []*written
	err := fs.WalkDir(dir, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", name)
		}
		f, err := w.writeFile(dir, name)
		if err != nil {
			return fmt.Errorf("store %s: %w", name, err)
		}
		files = append(files, f)
		return nil
	})
	if waited := w.workers.Wait(); waited != nil {
		err = waited // it is why the walk ended
	}
	if err == nil {
		err = w.closePack()
	}
	if waited := w.uploads.Wait(); waited != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = waited
	}
	return files, err
}

// writeFile cuts a file, and has workers take what it cuts.
func (w *writer) writeFile(dir fs.FS, name string) (*written, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	out := &written{file: file{path: name, mode: info.Mode().Perm()}}
	var mu sync.Mutex // of slabs, which grows while workers fill it
	err = cut(name, f, w.takeSlab, func(s slab) error {
		number := len(out.slabs)
		mu.Lock()
		out.slabs = append(out.slabs, nil)
		mu.Unlock()
		out.size += int64(len(s.data))
		w.workers.Go(func() error {
			runs, err := w.writeSlab(s)
			w.slabs <- s.data
			mu.Lock()
			out.slabs[number] = runs
			mu.Unlock()
			return err
		})
		return context.Cause(w.working)
	})
	return out, err
}

func (w *writer) takeSlab() []byte {
	buffer := <-w.slabs
	if buffer == nil {
		buffer = make([]byte, 0, slabSize)
	}
	return buffer[:0:slabSize]
}

// fresh is a block that the store does not have yet.
type fresh struct {
	begin, end int // in the slab
	id         ID
	number     int // among new blocks
}

// placed are blocks whose numbers among new ones follow each other, and so do their
// places.
type placed struct {
	number int
	first  place
}

// writeSlab names a slab's blocks, and adds those that are new to a pack.
func (w *writer) writeSlab(s slab) ([]run, error) {
	ids := make([]ID, len(s.ends))
	zero := make([]bool, len(s.ends))
	begin := 0
	for i, end := range s.ends {
		block := s.data[begin:end]
		if zero[i] = isZero(block); !zero[i] {
			ids[i] = w.s.keys.id(block)
		}
		begin = end
	}
	var runs []run
	var news []fresh
	w.mu.Lock()
	share := &w.shares.Files
	if s.pages {
		share = &w.shares.Memory
	}
	share.Bytes += int64(len(s.data))
	begin = 0
	for i, end := range s.ends {
		block := s.data[begin:end]
		begin = end
		if zero[i] {
			runs = appendRun(runs, refZero, len(block))
			share.Zeros += int64(len(block))
			continue
		}
		ref, ok := w.known.find(ids[i])
		if ok && ref&refNew == 0 {
			w.present(share, placeOf(ref), int64(len(block)))
		}
		if !ok {
			number := w.news
			w.news++
			ref = refNew | uint64(number)
			if w.known.count < maxKnown {
				w.known.add(ids[i], ref)
			}
			news = append(news, fresh{end - len(block), end, ids[i], number})
		}
		runs = appendRun(runs, ref, 1)
	}
	w.mu.Unlock()
	for len(news) > 0 {
		n, size := 0, 0
		for n < len(news) && size < frameSize {
			size += news[n].end - news[n].begin
			n++
		}
		if err := w.writeFrame(s.data, news[:n], size); err != nil {
			return nil, err
		}
		news = news[n:]
	}
	w.mu.Lock()
	w.done += int64(len(s.data))
	done := w.done
	w.mu.Unlock()
	if w.progress != nil {
		w.progress(done)
	}
	return runs, nil
}

// present counts a block that was in the store.
func (w *writer) present(share *Share, at place, size int64) {
	of := &w.found[at.pack]
	if of.own {
		return
	}
	share.Present += size
	if of.previous.has(int(at.block)) {
		share.Previous += size
	}
}

var frames = sync.Pool{New: func() any { b := make([]byte, 2*maxFrame); return &b }}

// writeFrame writes blocks of a slab, of size bytes together.
func (w *writer) writeFrame(slab []byte, blocks []fresh, size int) error {
	buffer := frames.Get().(*[]byte)
	defer frames.Put(buffer)
	flags := byte(framePages)
	sizes, ids := make([]int, len(blocks)), make([]ID, len(blocks))
	for i, b := range blocks {
		sizes[i], ids[i] = b.end-b.begin, b.id
		if sizes[i] != pageSize {
			flags = 0
		}
	}
	raw := slab[blocks[0].begin:blocks[len(blocks)-1].end]
	if len(raw) != size { // there are others between
		raw = (*buffer)[:0]
		for _, b := range blocks {
			raw = append(raw, slab[b.begin:b.end]...)
		}
	}
	zstd, encoded := w.s.codec.encode(raw, (*buffer)[size:size])

	w.building.Lock()
	defer w.building.Unlock()
	if w.builder == nil {
		select {
		case free := <-w.buffers:
			if free == nil {
				free = make([]byte, 0, packSize+packSlack)
			}
			w.builder = newPackBuilder(w.s.keys, free)
			w.packs = append(w.packs, Pack{})
		case <-w.working.Done():
			return context.Cause(w.working)
		}
	}
	pack := int32(len(w.packs) - 1)
	first := w.builder.add(flags|zstd, encoded, sizes, ids)
	w.mu.Lock()
	w.placed = append(w.placed, placed{blocks[0].number, place{pack, int32(first)}})
	w.mu.Unlock()
	if len(w.builder.data) >= packSize || len(w.builder.index.ids) >= packBlocks {
		return w.closePackLocked()
	}
	return nil
}

// closePack finishes the pack that is being built, if there is one.
func (w *writer) closePack() error {
	w.building.Lock()
	defer w.building.Unlock()
	if w.builder == nil {
		return nil
	}
	return w.closePackLocked()
}

func (w *writer) closePackLocked() error {
	data := w.builder.finish()
	of := Pack{w.builder.index.id, int64(len(data))}
	w.packs[len(w.packs)-1] = of
	w.newBytes += int64(len(data))
	w.builder = nil
	w.uploads.Go(func() error {
		defer func() { w.buffers <- data }()
		if err := w.s.backend.Put(w.sending, of.name(), data, nil); err != nil {
			return fmt.Errorf("write %s: %w", of.name(), err)
		}
		return w.journal.AddPack(of)
	})
	return nil
}

// finish writes the list of files, and then the root.
func (w *writer) finish(ctx context.Context, l *lease, files []*written, o PutOptions) (Checkpoint, error) {
	// The list is of packs as the root has them: of those only that are used.
	var used []Pack
	numbers, uses := map[int32]int{}, map[int32]int{}
	number := func(pack int32) int {
		if _, ok := numbers[pack]; !ok {
			numbers[pack] = len(used)
			used = append(used, w.packs[pack])
		}
		return numbers[pack]
	}
	slices.SortFunc(w.placed, func(a, b placed) int { return a.number - b.number })
	var list []byte
	var logical int64
	for _, f := range files {
		for _, runs := range f.slabs {
			for _, r := range runs {
				w.resolve(r, func(p place, count int) {
					e := extent{pack: -1, count: count}
					if p.pack >= 0 {
						e.pack, e.first = number(p.pack), int(p.block)
						uses[p.pack] += count
					}
					f.extents = appendExtent(f.extents, e)
				})
			}
		}
		f.slabs = nil
		list = appendFile(list, &f.file)
		f.extents = nil
		logical += f.size
	}
	w.uploads, w.sending = errgroup.WithContext(ctx)
	w.working = w.sending
	runs, err := w.writeList(list)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("store the list of files: %w", err)
	}
	r := root{
		Format: FormatVersion, Created: w.s.now().UTC(), Labels: o.Labels, ManifestDigest: o.ManifestDigest,
		LogicalBytes: logical, NewBytes: w.newBytes, Files: len(files), MapBytes: int64(len(list)),
		Shares: &w.shares,
	}
	for _, run := range runs {
		w.resolve(run, func(p place, count int) { r.Map = append(r.Map, [3]int{number(p.pack), int(p.block), count}) })
	}
	refs := make([]string, len(used))
	r.PackUsed = make([]int, len(used))
	for _, e := range r.Map {
		r.PackUsed[e[0]] += e[2]
	}
	for pack, n := range uses {
		r.PackUsed[numbers[pack]] += n
	}
	for i, of := range used {
		r.Packs, r.PackSizes = append(r.Packs, of.ID[:]...), append(r.PackSizes, of.Size)
		refs[i] = of.name()
		if w.earlier[of.ID] {
			r.NewBytes += of.Size // by this checkpoint all the same
		}
	}
	data, err := json.Marshal(r)
	if err != nil {
		return Checkpoint{}, err
	}
	object := w.s.keys.sealObject(prefixRoots, data)
	if len(object) > backend.MaxObject {
		return Checkpoint{}, fmt.Errorf("the checkpoint's root would be of %d bytes, more than %d", len(object), backend.MaxObject)
	}
	id := ID(sha256.Sum256(object))
	if err := w.journal.SetRoot(id); err != nil {
		return Checkpoint{}, fmt.Errorf("remember what is written: %w", err)
	}
	if err := l.check(); err != nil {
		return Checkpoint{}, err
	}
	name := prefixRoots + id.String()
	if err := w.s.backend.Put(ctx, name, object, refs); err != nil {
		return Checkpoint{}, fmt.Errorf("write %s: %w", name, err)
	}
	if err := l.check(); err != nil {
		// The root may have come after its packs were removed.
		return Checkpoint{}, errors.Join(err, w.s.Delete(ctx, id))
	}
	if err := w.s.hint(ctx, o.Alike, id); err != nil {
		return Checkpoint{}, err
	}
	return r.describe(id, int64(len(object))), nil
}

// writeList writes the encoded list of files. Its zeros are blocks as all else.
func (w *writer) writeList(list []byte) ([]run, error) {
	var runs []run
	for len(list) > 0 {
		size := min(len(list), frameSize)
		number := w.news
		w.news++
		block := fresh{0, size, w.s.keys.id(list[:size]), number}
		if err := w.writeFrame(list, []fresh{block}, size); err != nil {
			return nil, err
		}
		runs = appendRun(runs, refNew|uint64(number), 1)
		list = list[size:]
	}
	if err := w.closePack(); err != nil {
		return nil, err
	}
	return runs, w.uploads.Wait()
}

// resolve gives a run's blocks by their places, as many together as follow each other.
func (w *writer) resolve(r run, give func(first place, count int)) {
	switch {
	case r.ref == refZero:
		give(place{-1, -1}, r.count)
	case r.ref&refNew == 0:
		give(placeOf(r.ref), r.count)
	default:
		number, end := int(r.ref&^refNew), int(r.ref&^refNew)+r.count
		at, exact := slices.BinarySearchFunc(w.placed, number, func(p placed, number int) int { return p.number - number })
		if !exact {
			at--
		}
		for ; number < end; at++ {
			p, next := w.placed[at], end
			if at+1 < len(w.placed) {
				next = min(end, w.placed[at+1].number)
			}
			give(place{p.first.pack, p.first.block + int32(number-p.number)}, next-number)
			number = next
		}
	}
}

func appendExtent(extents []extent, e extent) []extent {
	if n := len(extents); n > 0 {
		last := &extents[n-1]
		if last.pack == e.pack && last.count+e.count <= maxExtent && (e.pack < 0 || last.first+last.count == e.first) {
			last.count += e.count
			return extents
		}
	}
	return append(extents, e)
}

var zeros [maxBlock]byte

func isZero(block []byte) bool {
	return len(block) > 0 && block[0] == 0 && bytes.Equal(block, zeros[:len(block)])
}
