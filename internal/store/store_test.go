package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// memory is a backend that forgets.
type memory struct {
	mu      sync.Mutex
	objects map[string][]byte
}

func newMemory() *memory { return &memory{objects: map[string][]byte{}} }

func (m *memory) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := errors.Join(ctx.Err(), backend.CheckName(name)); err != nil {
		return err
	}
	if len(data) > backend.MaxObject {
		return backend.ErrInvalid
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, ref := range refs {
		if _, ok := m.objects[ref]; !ok {
			return fmt.Errorf("%s refers to %s, which is not there", name, ref)
		}
	}
	m.objects[name] = bytes.Clone(data)
	return nil
}

func (m *memory) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.objects[name]
	if !ok {
		return nil, backend.ErrNotFound
	}
	if offset < 0 {
		offset += int64(len(data))
	}
	if length < 0 {
		length = int64(len(data)) - offset
	}
	if offset < 0 || length < 0 || offset+length > int64(len(data)) {
		return nil, backend.ErrInvalid
	}
	return bytes.Clone(data[offset : offset+length]), nil
}

func (m *memory) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		m.mu.Lock()
		names := slices.Sorted(maps.Keys(m.objects))
		m.mu.Unlock()
		for _, name := range names {
			m.mu.Lock()
			data, ok := m.objects[name]
			m.mu.Unlock()
			if ok && strings.HasPrefix(name, prefix) && !yield(backend.Object{Name: name, Size: int64(len(data))}, nil) {
				return
			}
		}
	}
}

func (m *memory) Delete(ctx context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, name)
	return nil
}

func (m *memory) Close() error { return nil }

func (m *memory) size(prefix string) int64 {
	sum := 0
	for name, data := range m.objects {
		if strings.HasPrefix(name, prefix) {
			sum += len(data)
		}
	}
	return int64(sum)
}

var testKey = Key{Name: "first", Key: bytes.Repeat([]byte{7}, keySize)}

// made makes a store in memory, once with encryption and once without.
func made(t *testing.T, encrypted bool) (*Store, *memory) {
	t.Helper()
	m := newMemory()
	var with []Key
	var key *Key
	if encrypted {
		key, with = &testKey, []Key{testKey}
	}
	must(t, Create(t.Context(), m, key))
	s, err := Open(t.Context(), m, with)
	must(t, err)
	return s, m
}

func both(t *testing.T, test func(t *testing.T, encrypted bool)) {
	for _, encrypted := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "encrypted"}[encrypted], func(t *testing.T) { test(t, encrypted) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func random(seed uint64, size int) []byte {
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(data)
	return data
}

// prose compresses well, and no two parts of it are alike.
func prose(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	var out []byte
	for len(out) < size {
		out = fmt.Appendf(out, "line %d of %x says nothing\n", len(out), r.Uint32())
	}
	return out[:size]
}

const pagesFile = "containers/a/criu/pages-1.img"

// specimen is a checkpoint's directory with what is special.
func specimen() fstest.MapFS {
	memory := slices.Concat(random(1, 3<<20), make([]byte, 5<<20), prose(2, 2<<20), random(1, 1<<20), make([]byte, 4096), random(9, 123))
	return fstest.MapFS{
		"manifest.json":              {Data: []byte("{}\n"), Mode: 0o600},
		pagesFile:                    {Data: memory, Mode: 0o600},
		"containers/a/rootfs.tar":    {Data: slices.Concat(prose(3, 700_000), random(4, 300_000), make([]byte, 200_000)), Mode: 0o640},
		"containers/a/criu/core.img": {Data: []byte("core"), Mode: 0o600},
		"empty":                      {Mode: 0o600},
		"volumes/v.tar":              {Data: random(5, 1), Mode: 0o600},
	}
}

func put(t *testing.T, s *Store, dir fs.FS, alike ...string) Checkpoint {
	t.Helper()
	c, err := s.Put(t.Context(), dir, PutOptions{Labels: map[string]string{"of": "test"}, ManifestDigest: "sha256:1", Alike: alike})
	must(t, err)
	return c
}

func get(t *testing.T, s *Store, id ID) (string, error) {
	t.Helper()
	dir := t.TempDir()
	return dir, s.Get(t.Context(), id, dir, nil)
}

func expectSame(t *testing.T, want fs.FS, dir string) {
	t.Helper()
	found := 0
	must(t, filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found++
		}
		return err
	}))
	must(t, fs.WalkDir(want, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		found--
		data, err := fs.ReadFile(want, name)
		must(t, err)
		got, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		if !bytes.Equal(data, got) {
			t.Errorf("%s is another: %d bytes, and %d were stored", name, len(got), len(data))
		}
		info, err := d.Info()
		must(t, err)
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode() != info.Mode() {
			t.Errorf("%s has the mode %v, %v, and had %v", name, st.Mode(), err, info.Mode())
		}
		return nil
	}))
	if found != 0 {
		t.Errorf("%d files too many", found)
	}
}

func TestWhatIsPutComesBack(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		dir := specimen()
		var done int64
		c, err := s.Put(t.Context(), dir, PutOptions{Labels: map[string]string{"of": "test"}, ManifestDigest: "sha256:1", Progress: func(n int64) { done = max(done, n) }})
		must(t, err)
		if c.Files != 6 || c.LogicalBytes != done || c.Labels["of"] != "test" || c.ManifestDigest != "sha256:1" {
			t.Errorf("it is %+v, and %d bytes were told", c, done)
		}
		if stored := m.size("packs/") + m.size("checkpoints/"); c.NewBytes != stored {
			t.Errorf("it says %d new bytes, and the store has %d", c.NewBytes, stored)
		}
		out, err := get(t, s, c.ID)
		must(t, err)
		expectSame(t, dir, out)
		for name, f := range dir {
			if data, err := s.ReadFile(t.Context(), c.ID, name, int64(len(f.Data))); err != nil || !bytes.Equal(data, f.Data) {
				t.Errorf("%s alone: %d bytes, %v", name, len(data), err)
			}
		}
		if _, err := s.ReadFile(t.Context(), c.ID, "manifest.json", 2); !errors.Is(err, ErrCorrupt) {
			t.Errorf("more than was asked for: %v", err)
		}
		if _, err := s.ReadFile(t.Context(), c.ID, "other", 2); !errors.Is(err, ErrMissing) {
			t.Errorf("a file that is not there: %v", err)
		}
		if told, err := s.Describe(t.Context(), c.ID); err != nil || told.NewBytes != c.NewBytes || !told.Created.Equal(c.Created) {
			t.Errorf("it is described as %+v, %v", told, err)
		}
		if left := m.size(prefixLeases); left != 0 {
			t.Error("the writer's lease is still there")
		}
		v, err := s.Verify(t.Context(), nil, nil)
		if err != nil || v.Checkpoints != 1 || len(v.Problems) != 0 || v.Bytes != m.size("packs/")+m.size("checkpoints/") {
			t.Errorf("verified: %+v, %v", v, err)
		}
	})
}

func TestHolesStayHoles(t *testing.T) {
	s, _ := made(t, false)
	dir := fstest.MapFS{pagesFile: {Data: slices.Concat(random(1, 4096), make([]byte, 8<<20), random(2, 4096)), Mode: 0o600}}
	out, err := get(t, s, put(t, s, dir).ID)
	must(t, err)
	expectSame(t, dir, out)
	if used := blocksUsed(t, filepath.Join(out, pagesFile)); used > 64<<10 {
		t.Errorf("two pages and zeros take %d bytes of the disk", used)
	}
}

// changed gives memory with so many pages changed at random.
func changed(memory []byte, pages int, seed uint64) []byte {
	out := bytes.Clone(memory)
	r := rand.New(rand.NewPCG(seed, 1))
	for _, page := range r.Perm(len(memory) / pageSize)[:pages] {
		copy(out[page*pageSize:], random(seed<<20|uint64(page)+100, pageSize))
	}
	return out
}

func TestAnIncrementCostsWhatChanged(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		memory := random(1, 64<<20)
		put(t, s, fstest.MapFS{pagesFile: {Data: memory, Mode: 0o600}}, "pod")
		for round, part := range []int{100, 10, 2} {
			pages := len(memory) / pageSize / part
			before := m.size("")
			memory = changed(memory, pages, uint64(round+2))
			c := put(t, s, fstest.MapFS{pagesFile: {Data: memory, Mode: 0o600}}, "pod")
			grown := m.size("") - before
			ratio := float64(grown) / float64(pages*pageSize)
			t.Logf("1/%d changed: %d bytes for %d, %.3f", part, grown, pages*pageSize, ratio)
			if ratio > 1.10 {
				t.Errorf("1/%d changed: the store grew by %.3f times as much", part, ratio)
			}
			out, err := get(t, s, c.ID)
			must(t, err)
			expectSame(t, fstest.MapFS{pagesFile: {Data: memory, Mode: 0o600}}, out)
		}
	})
}

// Ten checkpoints, of which each has a third of the pages of the one before, and only
// the latest of which is kept.
func TestAPackOfWhichLittleIsNeededIsNotKeptForEver(t *testing.T) {
	s, m := made(t, false)
	memory := random(1, 8<<20)
	var last Checkpoint
	for round := range 10 {
		c := put(t, s, fstest.MapFS{pagesFile: {Data: memory, Mode: 0o600}}, "pod")
		if round > 0 {
			must(t, s.Delete(t.Context(), last.ID))
		}
		last = c
		for range 2 {
			_, err := s.Collect(t.Context(), CollectOptions{})
			must(t, err)
		}
		memory = changed(memory, len(memory)/pageSize*2/3, uint64(round+2))
	}
	if size := m.size(prefixPacks); size > 3*8<<20 {
		t.Errorf("one checkpoint of 8 MiB takes %d bytes", size)
	}
	r, _, err := s.readRoot(t.Context(), last.ID)
	must(t, err)
	for i, of := range r.packs() {
		p, err := s.readIndex(t.Context(), of)
		must(t, err)
		if r.PackUsed[i] == 0 || r.PackUsed[i] > len(p.ids) || r.PackUsed[i]*4*worthUsing < len(p.ids) {
			t.Errorf("it uses %d of %d blocks of a pack", r.PackUsed[i], len(p.ids))
		}
	}
}

func TestPagesThatMoveAndBytesThatAreInsertedAreFoundAgain(t *testing.T) {
	s, m := made(t, false)
	memory, archive := random(1, 8<<20), random(2, 8<<20)
	put(t, s, fstest.MapFS{pagesFile: {Data: memory}, "v.tar": {Data: archive}}, "pod")
	before := m.size("")
	put(t, s, fstest.MapFS{
		pagesFile: {Data: slices.Concat(memory[:1<<20], random(3, pageSize), memory[1<<20:])},
		"v.tar":   {Data: slices.Concat(archive[:3<<20], []byte("new"), archive[3<<20:])},
	}, "pod")
	if grown := m.size("") - before; grown > pageSize+2*maxBlock+20_000 {
		t.Errorf("for a page and three bytes the store grew by %d", grown)
	}
}

func TestOnlyCheckpointsThatAreAlikeShareBlocks(t *testing.T) {
	s, m := made(t, false)
	dir := fstest.MapFS{pagesFile: {Data: random(1, 1<<20)}}
	put(t, s, dir, "namespace a")
	before := m.size("packs/")
	put(t, s, dir, "namespace b")
	if grown := m.size("packs/") - before; grown < 1<<20 {
		t.Errorf("another namespace's checkpoint cost %d bytes only, which tells what this one has", grown)
	}
	before = m.size("packs/")
	put(t, s, dir, "pod", "namespace a")
	if grown := m.size("packs/") - before; grown > 20_000 {
		t.Errorf("the same again cost %d bytes", grown)
	}
}

func TestAStoreOpensWithItsKeysOnly(t *testing.T) {
	s, m := made(t, true)
	c := put(t, s, specimen())
	other := Key{Name: "first", Key: bytes.Repeat([]byte{8}, keySize)}
	second := Key{Name: "second", Key: bytes.Repeat([]byte{9}, keySize)}
	for name, with := range map[string][]Key{"none": nil, "another of that name": {other}, "one of another name": {second}, "a short one": {{Name: "first", Key: []byte("x")}}} {
		if _, err := Open(t.Context(), m, with); err == nil {
			t.Errorf("it opens with %s", name)
		}
	}
	must(t, s.Rotate(t.Context(), []Key{testKey, second}, second))
	if _, err := Open(t.Context(), m, []Key{testKey}); !errors.Is(err, ErrKey) || !strings.Contains(err.Error(), "second") {
		t.Errorf("after the rotation the old key: %v", err)
	}
	again, err := Open(t.Context(), m, []Key{testKey, second})
	must(t, err)
	out, err := get(t, again, c.ID)
	must(t, err)
	expectSame(t, specimen(), out)
	plain, pm := made(t, false)
	put(t, plain, specimen())
	if _, err := Open(t.Context(), pm, []Key{testKey}); !errors.Is(err, ErrKey) {
		t.Errorf("a store without encryption opens with a key: %v", err)
	}
}

func TestAnEncryptedStoreShowsNothing(t *testing.T) {
	s, m := made(t, true)
	secret := bytes.Repeat([]byte("a secret of some length; "), 4000)
	put(t, s, fstest.MapFS{"containers/of-a-name/x.tar": {Data: secret}}, "namespace of a name")
	id := (*keys)(nil).id(secret[:8])
	for name, data := range m.objects {
		for _, text := range []string{"secret", "of-a-name", "of a name", "test", id.String()} {
			if bytes.Contains(data, []byte(text)) || strings.Contains(name, text) {
				t.Errorf("%s shows %q", name, text)
			}
		}
	}
}

func TestTheSameObjectUnderAnotherNameIsFound(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		a, b := put(t, s, specimen()), put(t, s, fstest.MapFS{"x": {Data: random(3, 1<<20)}})
		m.objects[prefixRoots+a.ID.String()] = m.objects[prefixRoots+b.ID.String()]
		if _, err := get(t, s, a.ID); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), a.ID.String()) {
			t.Errorf("another's root: %v", err)
		}
		r, _, err := s.readRoot(t.Context(), b.ID)
		must(t, err)
		for name := range m.objects {
			if strings.HasPrefix(name, prefixPacks) && name != r.packs()[0].name() {
				m.objects[r.packs()[0].name()] = m.objects[name]
			}
		}
		if _, err := get(t, s, b.ID); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), r.packs()[0].name()) {
			t.Errorf("another's pack: %v", err)
		}
	})
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	s, m := made(t, false)
	c := put(t, s, specimen())
	r, _, err := s.readRoot(t.Context(), c.ID)
	must(t, err)
	delete(m.objects, r.packs()[0].name())
	if _, err := get(t, s, c.ID); !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), r.packs()[0].name()) {
		t.Errorf("without a pack: %v", err)
	}
	v, err := s.Verify(t.Context(), nil, nil)
	if err != nil || len(v.Problems) != 1 || v.Problems[0].Checkpoint != c.ID || !errors.Is(v.Problems[0].Err, ErrMissing) {
		t.Errorf("verified: %+v, %v", v, err)
	}
	must(t, s.Delete(t.Context(), c.ID))
	if _, err := get(t, s, c.ID); !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), c.ID.String()) {
		t.Errorf("without its root: %v", err)
	}
	must(t, s.Delete(t.Context(), c.ID))
}

// at sets a store's clock.
func (s *Store) at(now time.Time) { s.now = func() time.Time { return now } }

func TestAKeyThatAKilledCreationLeftDoesNotCloseTheStore(t *testing.T) {
	b := newMemory()
	must(t, wrap(t.Context(), b, "another identity", make([]byte, keySize), testKey))
	must(t, Create(t.Context(), b, &testKey))
	s, err := Open(t.Context(), b, []Key{testKey})
	must(t, err)
	second := Key{"second", bytes.Repeat([]byte{2}, keySize)}
	// One of its name that opens nothing is no reason to take the others away.
	must(t, wrap(t.Context(), b, "another identity", make([]byte, keySize), second))
	must(t, s.Rotate(t.Context(), []Key{testKey, second}, second))
	s, err = Open(t.Context(), b, []Key{second})
	must(t, err)
	if by := s.WrappedBy(); !slices.Equal(by, []string{"second"}) {
		t.Errorf("opened by %q", by)
	}
}
