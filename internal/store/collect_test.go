package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

func TestWhatNoCheckpointUsesGoesInTheSecondCollection(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		a := put(t, s, fstest.MapFS{"x": {Data: random(1, 1<<20)}}, "pod")
		b := put(t, s, fstest.MapFS{"x": {Data: random(2, 1<<20)}}, "pod")
		must(t, s.Delete(t.Context(), a.ID))

		dry, err := s.Collect(t.Context(), CollectOptions{DryRun: true})
		must(t, err)
		if dry.Condemned != 2 || m.size(prefixCondemned) != 0 {
			t.Errorf("a dry run found %+v", dry)
		}
		first, err := s.Collect(t.Context(), CollectOptions{})
		must(t, err)
		if first.Checkpoints != 1 || first.Packs != 4 || first.Condemned != 2 || first.Removed != 0 || first.CondemnedBytes < 1<<20 {
			t.Errorf("the first found %+v", first)
		}
		second, err := s.Collect(t.Context(), CollectOptions{})
		must(t, err)
		if second.Removed != 2 || second.RemovedBytes != first.CondemnedBytes || m.size(prefixCondemned) != 0 {
			t.Errorf("the second found %+v", second)
		}
		out, err := get(t, s, b.ID)
		must(t, err)
		expectSame(t, fstest.MapFS{"x": {Data: random(2, 1<<20)}}, out)
	})
}

func TestAPackStaysForItsGraceAndForThoseWhoWrote(t *testing.T) {
	s, _ := made(t, false)
	now := time.Now()
	s.at(now)
	a := put(t, s, fstest.MapFS{"x": {Data: random(1, 1000)}})
	must(t, s.Delete(t.Context(), a.ID))
	l, err := s.begin(t.Context())
	must(t, err)
	removes := func(want int, grace time.Duration) {
		t.Helper()
		if c, err := s.Collect(t.Context(), CollectOptions{Grace: grace}); err != nil || c.Removed != want {
			t.Errorf("%+v, %v", c, err)
		}
	}
	removes(0, 0)
	removes(0, 0) // somebody wrote when it was condemned, and still does
	later, err := s.begin(t.Context())
	must(t, err)
	l.end(t.Context())
	removes(0, time.Minute)
	s.at(now.Add(time.Minute))
	removes(2, time.Minute) // the other began after that
	later.end(t.Context())
}

func TestAPackThatIsUsedAgainStaysAndItsGraceBeginsAnew(t *testing.T) {
	s, m := made(t, false)
	now := time.Now()
	collect := func(after time.Duration, removed int) {
		t.Helper()
		s.at(now.Add(after))
		c, err := s.Collect(t.Context(), CollectOptions{Grace: time.Hour})
		must(t, err)
		if c.Removed != removed {
			t.Errorf("%+v", c)
		}
	}
	a := put(t, s, fstest.MapFS{"x": {Data: random(1, 1000)}}, "pod")
	object := m.objects[prefixRoots+a.ID.String()]
	must(t, s.Delete(t.Context(), a.ID))
	collect(0, 0)
	m.objects[prefixRoots+a.ID.String()] = object // as of a writer that ended just then
	collect(2*time.Hour, 0)
	marks := maps.Clone(m.objects)
	collect(3*time.Hour, 0)
	if !maps.EqualFunc(marks, m.objects, slices.Equal) {
		t.Error("marks are made again and again")
	}
	must(t, s.Delete(t.Context(), a.ID))
	collect(4*time.Hour, 0)
	collect(4*time.Hour+time.Minute, 0)
	collect(5*time.Hour, 2)
}

func TestAWriterUsesNothingThatIsCondemned(t *testing.T) {
	s, m := made(t, false)
	dir := fstest.MapFS{"x": {Data: random(1, 100_000)}}
	a := put(t, s, dir, "pod")
	r, _, err := s.readRoot(t.Context(), a.ID)
	must(t, err)
	var ids []ID
	for _, of := range r.packs() {
		ids = append(ids, of.ID)
	}
	// Marked when nobody wrote, and used since by a writer of before.
	must(t, s.condemn(t.Context(), ids))
	before := m.size(prefixPacks)
	put(t, s, dir, "pod")
	if grown := m.size(prefixPacks) - before; grown < 100_000 {
		t.Errorf("the store grew by %d bytes only: what is condemned was used", grown)
	}
}

// hooked calls a function once, after what has a prefix was listed.
type hooked struct {
	*memory
	prefix string
	after  func()
}

func (h *hooked) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		for object, err := range h.memory.List(ctx, prefix) {
			if !yield(object, err) {
				return
			}
		}
		if prefix == h.prefix && h.after != nil {
			after := h.after
			h.after = nil
			after()
		}
	}
}

func TestAWriterThatEndsWhileRootsAreReadIsTakenForAlive(t *testing.T) {
	s, m := made(t, false)
	a := put(t, s, fstest.MapFS{"x": {Data: random(1, 1000)}})
	object := m.objects[prefixRoots+a.ID.String()]
	must(t, s.Delete(t.Context(), a.ID))
	l, err := s.begin(t.Context())
	must(t, err)
	_, err = s.Collect(t.Context(), CollectOptions{})
	must(t, err)
	s.backend = &hooked{memory: m, prefix: prefixRoots, after: func() {
		m.objects[prefixRoots+a.ID.String()] = object
		l.end(t.Context())
	}}
	if c, err := s.Collect(t.Context(), CollectOptions{}); err != nil || c.Removed != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	_, err = get(t, s, a.ID)
	must(t, err)
}

// upset calls a function once, before what has a prefix is deleted.
type upset struct {
	*memory
	prefix string
	before func()
}

func (u *upset) Delete(ctx context.Context, name string) error {
	if before := u.before; before != nil && strings.HasPrefix(name, u.prefix) {
		u.before = nil
		before()
	}
	return u.memory.Delete(ctx, name)
}

func TestAPackThatOneCollectorIsAboutToRemoveIsNotFoundWhateverAnotherDoes(t *testing.T) {
	s, m := made(t, false)
	dir := fstest.MapFS{"x": {Data: random(1, 1000)}}
	a := put(t, s, dir, "pod")
	object := m.objects[prefixRoots+a.ID.String()]
	must(t, s.Delete(t.Context(), a.ID))
	_, err := s.Collect(t.Context(), CollectOptions{})
	must(t, err)
	other, err := Open(t.Context(), m, nil)
	must(t, err)
	var b Checkpoint
	s.backend = &upset{m, prefixPacks, func() {
		// A root that uses the packs comes, the other collector sees it, a writer begins,
		// the root goes, and the writer ends.
		m.objects[prefixRoots+a.ID.String()] = object
		_, err := other.Collect(t.Context(), CollectOptions{})
		must(t, err)
		must(t, other.hint(t.Context(), []string{"pod"}, a.ID))
		l, err := other.begin(t.Context())
		must(t, err)
		w, _, err := other.newWriter(t.Context(), PutOptions{Alike: []string{"pod"}, Journal: noJournal{}})
		must(t, err)
		must(t, other.Delete(t.Context(), a.ID))
		files, err := w.writeAll(dir)
		must(t, err)
		b, err = w.finish(t.Context(), l, files, PutOptions{})
		must(t, err)
		l.end(t.Context())
	}}
	c, err := s.Collect(t.Context(), CollectOptions{})
	must(t, err)
	if c.Removed == 0 {
		t.Errorf("%+v", c)
	}
	_, err = get(t, other, b.ID)
	must(t, err)
}

func TestNothingIsCollectedWhileARootCannotBeRead(t *testing.T) {
	s, m := made(t, false)
	a, b := put(t, s, specimen()), put(t, s, fstest.MapFS{"x": {Data: random(2, 1000)}})
	must(t, s.Delete(t.Context(), a.ID))
	m.objects[prefixRoots+b.ID.String()][0] ^= 1
	if _, err := s.Collect(t.Context(), CollectOptions{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), b.ID.String()) || m.size(prefixCondemned) != 0 {
		t.Errorf("%v", err)
	}
}

func TestAWriterThatDiedIsForgottenAndOneThatStoodStillGivesUp(t *testing.T) {
	s, m := made(t, false)
	now := time.Now()
	s.at(now)
	l, err := s.begin(t.Context())
	must(t, err)
	s.at(now.Add(leaseTime/2 + time.Second))
	if err := l.check(); !errors.Is(err, ErrLease) {
		t.Errorf("one that stood still: %v", err)
	}
	if alive, err := s.writing(t.Context()); err != nil || len(alive) != 1 {
		t.Errorf("alive are %v, %v", alive, err)
	}
	s.at(now.Add(leaseTime * 2))
	if alive, err := s.writing(t.Context()); err != nil || len(alive) != 0 || m.size(prefixLeases) != 0 {
		t.Errorf("alive are %v, %v", alive, err)
	}
	l.end(t.Context())
}

func TestAWriterWaitsForItsTurnAndKeepsWhatItFindsMeanwhile(t *testing.T) {
	s, m := made(t, false)
	over := false
	turn := func(context.Context) (func(), error) {
		if m.size(prefixLeases) == 0 {
			t.Error("it waits without a lease")
		}
		return func() { over = true }, nil
	}
	_, err := s.Put(t.Context(), specimen(), PutOptions{Turn: turn})
	must(t, err)
	if !over {
		t.Error("it did not give its turn back")
	}
	no := errors.New("no turn")
	before := m.size(prefixPacks)
	_, err = s.Put(t.Context(), specimen(), PutOptions{Turn: func(context.Context) (func(), error) { return nil, no }})
	if !errors.Is(err, no) || m.size(prefixPacks) != before || m.size(prefixLeases) != 0 {
		t.Errorf("without a turn: %v", err)
	}
}

// notebook is a Journal in memory.
type notebook struct {
	mu    sync.Mutex
	packs []Pack
	root  *ID
}

func (n *notebook) Read() ([]Pack, *ID, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.packs), n.root, nil
}

func (n *notebook) AddPack(p Pack) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.packs = append(n.packs, p)
	return nil
}

func (n *notebook) SetRoot(id ID) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.root = &id
	return nil
}

// failing fails from its nth Put of a pack on.
type failing struct {
	*memory
	packs atomic.Int32
}

func (f *failing) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if strings.HasPrefix(name, prefixPacks) && f.packs.Add(-1) < 0 {
		return errors.New("the disk is full")
	}
	return f.memory.Put(ctx, name, data, refs)
}

func TestAnInterruptedWriterCostsOnlyWhatItDidNotFinish(t *testing.T) {
	s, m := made(t, true)
	dir := fstest.MapFS{pagesFile: {Data: random(1, 60<<20), Mode: 0o600}}
	f := &failing{memory: m}
	f.packs.Store(2)
	s.backend = f
	journal := &notebook{}
	if _, err := s.Put(t.Context(), dir, PutOptions{Journal: journal}); err == nil || !strings.Contains(err.Error(), "the disk is full") || !strings.Contains(err.Error(), prefixPacks) {
		t.Fatalf("got %v", err)
	}
	if m.size(prefixRoots) != 0 || m.size(prefixLeases) != 0 {
		t.Error("there is a checkpoint, or a lease")
	}
	s.backend = m
	before := m.size(prefixPacks)
	c, err := s.Put(t.Context(), dir, PutOptions{Journal: journal})
	must(t, err)
	all := m.size(prefixPacks)
	if before < 2*packSize || all > 62<<20 {
		t.Errorf("%d bytes had been written, and %d more were", before, all-before)
	}
	if all += m.size(prefixRoots); c.NewBytes != all {
		t.Errorf("the store grew by %d, and the checkpoint says by %d", all, c.NewBytes)
	}
	if want := (Shares{Memory: Share{Bytes: 60 << 20}}); *c.Shares != want {
		t.Errorf("what the first attempt wrote is shared with others: %+v", *c.Shares)
	}
	out, err := get(t, s, c.ID)
	must(t, err)
	expectSame(t, dir, out)
	// An answer that was lost: it is there, and not written again.
	again, err := s.Put(t.Context(), dir, PutOptions{Journal: journal})
	if err != nil || again.ID != c.ID {
		t.Errorf("once more: %v, %v", again, err)
	}
}

// strict is a backend that many work with and that knows what must never happen: a pack
// that goes while a root needs it. Whoever is dead changes nothing any more.
type strict struct {
	*memory
	mu    sync.Mutex
	refs  map[string][]string // of roots
	wrong []string
}

func (b *strict) Put(ctx context.Context, name string, data []byte, refs []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.memory.Put(ctx, name, data, refs)
	if strings.HasPrefix(name, prefixRoots) {
		if err != nil {
			b.wrong = append(b.wrong, err.Error())
		}
		b.refs[name] = refs
	}
	return err
}

func (b *strict) Delete(ctx context.Context, name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.refs, name)
	for root, refs := range b.refs {
		if slices.Contains(refs, name) {
			b.wrong = append(b.wrong, fmt.Sprintf("%s was deleted, and %s needs it", name, root))
		}
	}
	return b.memory.Delete(ctx, name)
}

// mortal is how one process sees the backend: at some operation it dies.
type mortal struct {
	backend.Backend
	left atomic.Int64
	slow time.Duration // that an operation takes at most
	r    *rand.Rand
	mu   sync.Mutex
}

var errDead = errors.New("killed")

func (b *mortal) step() error {
	b.mu.Lock()
	wait := time.Duration(b.r.Int64N(int64(b.slow)))
	b.mu.Unlock()
	time.Sleep(wait)
	if b.left.Add(-1) < 0 {
		return errDead
	}
	return nil
}

func (b *mortal) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := b.step(); err != nil {
		return err
	}
	if err := b.Backend.Put(ctx, name, data, refs); err != nil {
		return err
	}
	return b.step()
}

func (b *mortal) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := b.step(); err != nil {
		return nil, err
	}
	return b.Backend.Read(ctx, name, offset, length)
}

func (b *mortal) Delete(ctx context.Context, name string) error {
	if err := b.step(); err != nil {
		return err
	}
	return b.Backend.Delete(ctx, name)
}

// The property: whatever writers, collectors and those who delete do at the same time, and
// wherever they die, a checkpoint that is there is whole, and in the end nothing is left
// that no checkpoint uses.
func TestACollectionNeverTakesWhatACheckpointUses(t *testing.T) {
	for seed := range uint64(12) {
		m := newMemory()
		must(t, Create(t.Context(), m, nil))
		shared := &strict{memory: m, refs: map[string][]string{}}
		open := func(number uint64, slow time.Duration, operations int64) *Store {
			b := &mortal{Backend: shared, slow: slow, r: rand.New(rand.NewPCG(seed, number))}
			b.left.Store(1 << 40)
			s, err := Open(t.Context(), b, nil)
			must(t, err)
			b.left.Store(operations)
			return s
		}
		var complete sync.Map // of those that Put returned and nobody deleted
		var writers, collectors sync.WaitGroup
		var over atomic.Bool
		for number := range uint64(2) {
			r := rand.New(rand.NewPCG(seed, number+200))
			collectors.Go(func() {
				for !over.Load() {
					_, _ = open(number+50, 50*time.Microsecond, r.Int64N(300)).Collect(t.Context(), CollectOptions{})
				}
			})
		}
		for number := range uint64(4) {
			r := rand.New(rand.NewPCG(seed, number+100))
			writers.Go(func() {
				for round := range 6 {
					// Slow, so that several collections fall into one Put.
					s := open(number*10+uint64(round), 3*time.Millisecond, r.Int64N(80))
					// A few blocks, of which others write the same.
					dir := fstest.MapFS{}
					for range 3 {
						n := r.Uint64N(4)
						dir[fmt.Sprint(n)] = &fstest.MapFile{Data: random(n, 2000)}
					}
					c, err := s.Put(t.Context(), dir, PutOptions{Alike: []string{"all"}})
					if err != nil {
						continue
					}
					complete.Store(c.ID, true)
					if r.IntN(4) > 0 {
						complete.Delete(c.ID)
						_ = open(1000, time.Millisecond, 10).Delete(t.Context(), c.ID)
					}
				}
			})
		}
		writers.Wait()
		over.Store(true)
		collectors.Wait()
		s, err := Open(t.Context(), shared, nil)
		must(t, err)
		s.at(time.Now().Add(2 * leaseTime)) // the dead have run out
		for range 3 {
			_, err := s.Collect(t.Context(), CollectOptions{})
			must(t, err)
		}
		if len(shared.wrong) > 0 {
			t.Fatalf("seed %d: %s", seed, strings.Join(shared.wrong, "\n"))
		}
		complete.Range(func(id, _ any) bool {
			if _, err := s.Describe(t.Context(), id.(ID)); err != nil {
				t.Errorf("seed %d: a checkpoint is lost: %v", seed, err)
			}
			return true
		})
		v, err := s.Verify(t.Context(), nil, nil)
		must(t, err)
		if len(v.Problems) > 0 {
			t.Fatalf("seed %d: %v", seed, v.Problems)
		}
		used, _, err := s.used(t.Context())
		must(t, err)
		packs, err := s.packSizes(t.Context())
		must(t, err)
		for id := range packs {
			if !used[id] {
				t.Errorf("seed %d: pack %s is left", seed, id)
			}
		}
		for name := range maps.Keys(m.objects) {
			if strings.HasPrefix(name, prefixLeases) {
				t.Errorf("seed %d: %s is left", seed, name)
			}
		}
		marks, err := s.condemned(t.Context())
		must(t, err)
		for id := range marks {
			if !used[id] {
				t.Errorf("seed %d: the mark of pack %s is left", seed, id)
			}
		}
		if t.Failed() {
			return
		}
	}
}
