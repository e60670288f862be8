package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// Run tests that a backend does what backend.Backend says. open returns one that is
// empty; it is called once for each of the tests.
func Run(t *testing.T, open func(t *testing.T) backend.Backend) {
	t.Helper()
	Suite{Open: open}.Run(t)
}

// Suite is Run with a choice.
type Suite struct {
	Open func(t *testing.T) backend.Backend
	Many int // objects to list, more than any page holds: 1100 unless told
}

// Run runs the tests.
func (s Suite) Run(t *testing.T) {
	if s.Many == 0 {
		s.Many = 1100
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, backend.Backend)
	}{
		{"AnObjectIsReadAsItWasPut", readAsPut},
		{"AnObjectOfTheLargestSizeIsKept", largest},
		{"WhatIsNoNameIsRefused", names},
		{"RangesAreExact", ranges},
		{"WhatIsNotThereIsNotFound", missing},
		{"OneOfTheSameNameIsReplaced", replaced},
		{"AnObjectThatIsReplacedIsReadWhole", replacedWhileRead},
		{"DeletedIsGoneAndMayBeDeletedAgain", deleted},
		{"ObjectsAreListedByPrefix", listed},
		{"ManyObjectsAreListed", s.manyListed},
		{"OneNameMayHaveManyWriters", oneNameManyWriters},
		{"ManyWritersDoNotDisturbEachOther", manyWriters},
		{"WhatAnObjectRefersToStaysWithoutIt", refs},
		{"AContextThatHasEndedEndsTheCall", ended},
		{"ACallBrokenOffLeavesAllOrNothing", brokenOff},
		{"DataStaysItsOwners", owners},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := s.Open(t)
			t.Cleanup(func() {
				if err := b.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test.run(t, b)
		})
	}
}

// Noise is incompressible and the same for the same seed.
func Noise(seed uint64, size int) []byte {
	data := make([]byte, size)
	key := [32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}
	rand.NewChaCha8(key).Read(data) // never fails
	return data
}

func put(t *testing.T, b backend.Backend, name string, data []byte, refs ...string) {
	t.Helper()
	if err := b.Put(t.Context(), name, data, refs); err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
}

func read(t *testing.T, b backend.Backend, name string) []byte {
	t.Helper()
	data, err := b.Read(t.Context(), name, 0, -1)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return data
}

func list(t *testing.T, b backend.Backend, prefix string) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	for o, err := range b.List(t.Context(), prefix) {
		if err != nil {
			t.Fatalf("list %q: %v", prefix, err)
		}
		if _, twice := all[o.Name]; twice {
			t.Errorf("%s is listed twice", o.Name)
		}
		all[o.Name] = o.Size
	}
	return all
}

func wantNotFound(t *testing.T, b backend.Backend, name string) {
	t.Helper()
	for _, at := range [][2]int64{{0, -1}, {0, 0}, {0, 1}, {3, 2}, {-1, 1}, {-1, -1}} {
		if data, err := b.Read(t.Context(), name, at[0], at[1]); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("read %s from %d, %d bytes: got %d bytes and the error %v, want ErrNotFound", name, at[0], at[1], len(data), err)
		}
	}
}

func readAsPut(t *testing.T, b backend.Backend) {
	for i, size := range []int{0, 1, 2, 511, 4096, 65537, 1 << 20, 5<<20 + 3, 17<<20 + 1} {
		for _, name := range []string{fmt.Sprintf("object-%d", i), fmt.Sprintf("packs/object.%d", i)} {
			data := Noise(uint64(i), size)
			put(t, b, name, data)
			if got := read(t, b, name); !bytes.Equal(got, data) {
				t.Errorf("%s: %d bytes were put, %d others were read", name, len(data), len(got))
			}
		}
	}
	put(t, b, "nothing", nil)
	if got := read(t, b, "nothing"); len(got) != 0 {
		t.Errorf("of nothing %d bytes were read", len(got))
	}
}

func largest(t *testing.T, b backend.Backend) {
	data := Noise(1, backend.MaxObject+1)
	if err := b.Put(t.Context(), "packs/large", data, nil); !errors.Is(err, backend.ErrInvalid) {
		t.Errorf("an object beyond MaxObject: %v, want ErrInvalid", err)
	}
	wantNotFound(t, b, "packs/large")
	data = data[:backend.MaxObject]
	put(t, b, "packs/large", data)
	if !bytes.Equal(read(t, b, "packs/large"), data) {
		t.Error("another object was read than was put")
	}
	tail, err := b.Read(t.Context(), "packs/large", -9, 5)
	if err != nil || !bytes.Equal(tail, data[backend.MaxObject-9:][:5]) {
		t.Errorf("5 bytes from 9 before the end: %x, %v", tail, err)
	}
	if size := list(t, b, "packs/")["packs/large"]; size != backend.MaxObject {
		t.Errorf("listed with %d bytes", size)
	}
}

func names(t *testing.T, b backend.Backend) {
	for _, name := range []string{"", ".", "..", "/", "/a", "a/", "a//b", "a/b/c", "../a", "a/..", ".a", "a/.b", "A", "a_b", "a b", "a\x00", "ä", strings.Repeat("a", 101)} {
		if err := b.Put(t.Context(), name, []byte("x"), nil); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("put %q: %v, want ErrInvalid", name, err)
		}
		if _, err := b.Read(t.Context(), name, 0, -1); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("read %q: %v, want ErrInvalid", name, err)
		}
		if err := b.Delete(t.Context(), name); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("delete %q: %v, want ErrInvalid", name, err)
		}
		if err := b.Put(t.Context(), "good", []byte("x"), []string{name}); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("put with a reference to %q: %v, want ErrInvalid", name, err)
		}
	}
	if all := list(t, b, ""); len(all) != 0 {
		t.Errorf("something was kept: %v", all)
	}
	long := strings.Repeat("a", 60) + "/" + strings.Repeat("b", 59)
	put(t, b, long, []byte("x"))
	put(t, b, "0.a-b", []byte("y"))
	if all := list(t, b, ""); len(all) != 2 || all[long] != 1 {
		t.Errorf("listed: %v", all)
	}
	if got := read(t, b, long); string(got) != "x" {
		t.Errorf("read %q", got)
	}
}

func ranges(t *testing.T, b backend.Backend) {
	data := Noise(7, 100_000)
	put(t, b, "packs/p", data)
	put(t, b, "packs/empty", nil)
	size := int64(len(data))
	for _, at := range []struct{ offset, length, from, to int64 }{
		{0, -1, 0, size}, {0, size, 0, size}, {0, 1, 0, 1}, {1, 1, 1, 2}, {99_999, 1, 99_999, size}, {99_999, -1, 99_999, size},
		{50_000, 1000, 50_000, 51_000}, {-1, 1, size - 1, size}, {-1, -1, size - 1, size}, {-100, 10, size - 100, size - 90},
		{-size, -1, 0, size}, {-size, 5, 0, 5}, {0, 0, 0, 0}, {500, 0, 500, 500}, {size, 0, size, size}, {size, -1, size, size}, {-5, 0, size - 5, size - 5},
	} {
		got, err := b.Read(t.Context(), "packs/p", at.offset, at.length)
		if err != nil || !bytes.Equal(got, data[at.from:at.to]) {
			t.Errorf("from %d, %d bytes: %d bytes, %v", at.offset, at.length, len(got), err)
		}
	}
	for _, at := range [][2]int64{
		{0, size + 1}, {1, size}, {size, 1}, {size + 1, -1}, {size + 1, 0}, {size + 1, 1}, {-size - 1, -1}, {-size - 1, 1}, {-size - 1, 0},
		{-1, 2}, {99_999, 2}, {0, -2}, {0, backend.MaxObject + 1}, {1 << 62, 1}, {-1 << 62, 1},
	} {
		if got, err := b.Read(t.Context(), "packs/p", at[0], at[1]); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("from %d, %d bytes of %d: %d bytes and the error %v, want ErrInvalid", at[0], at[1], size, len(got), err)
		}
	}
	for _, at := range [][2]int64{{0, 1}, {1, 0}, {1, -1}, {-1, -1}, {-1, 0}} {
		if got, err := b.Read(t.Context(), "packs/empty", at[0], at[1]); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("from %d, %d bytes of none: %d bytes and the error %v, want ErrInvalid", at[0], at[1], len(got), err)
		}
	}
	for _, length := range []int64{0, -1} {
		if got, err := b.Read(t.Context(), "packs/empty", 0, length); err != nil || len(got) != 0 {
			t.Errorf("%d bytes of none: %d bytes, %v", length, len(got), err)
		}
	}
}

func missing(t *testing.T, b backend.Backend) {
	wantNotFound(t, b, "missing")
	wantNotFound(t, b, "packs/missing")
	put(t, b, "packs/there", []byte("x"))
	wantNotFound(t, b, "packs/missing")
	wantNotFound(t, b, "packs/ther")
	wantNotFound(t, b, "there")
	wantNotFound(t, b, "packs")
	for _, name := range []string{"missing", "packs/missing", "indexes/missing", "packs"} {
		if err := b.Delete(t.Context(), name); err != nil {
			t.Errorf("delete %s, which is not there: %v", name, err)
		}
	}
	if got := read(t, b, "packs/there"); string(got) != "x" {
		t.Errorf("read %q", got)
	}
}

func replaced(t *testing.T, b backend.Backend) {
	for i, size := range []int{10, 100_000, 0, 3, 3} {
		data := Noise(uint64(i), size)
		put(t, b, "store.json", data)
		if !bytes.Equal(read(t, b, "store.json"), data) {
			t.Errorf("put number %d: read another", i+1)
		}
		if all := list(t, b, ""); len(all) != 1 || all["store.json"] != int64(size) {
			t.Errorf("put number %d, of %d bytes: listed %v", i+1, size, all)
		}
	}
}

func replacedWhileRead(t *testing.T, b backend.Backend) {
	versions := [][]byte{bytes.Repeat([]byte("1"), 200_000), bytes.Repeat([]byte("2"), 300_000), bytes.Repeat([]byte("3"), 70_000)}
	put(t, b, "checkpoints/c", versions[0])
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for reads := 0; ; reads++ {
				data, err := b.Read(t.Context(), "checkpoints/c", 0, -1)
				if err != nil {
					t.Errorf("read while it is replaced: %v", err)
					return
				}
				if !slices.ContainsFunc(versions, func(v []byte) bool { return bytes.Equal(v, data) }) {
					t.Errorf("read %d bytes, beginning with %.8q and ending with %.8q: part of an object", len(data), data, data[max(0, len(data)-8):])
					return
				}
				select {
				case <-done:
					if reads > 0 {
						return
					}
				default:
				}
			}
		})
	}
	for i := range 20 {
		put(t, b, "checkpoints/c", versions[i%len(versions)])
	}
	close(done)
	readers.Wait()
}

func deleted(t *testing.T, b backend.Backend) {
	put(t, b, "packs/a", []byte("same"))
	put(t, b, "packs/b", []byte("same"))
	put(t, b, "packs/ab", []byte("other"))
	for range 2 {
		if err := b.Delete(t.Context(), "packs/a"); err != nil {
			t.Fatalf("delete: %v", err)
		}
		wantNotFound(t, b, "packs/a")
	}
	if all := list(t, b, ""); len(all) != 2 || all["packs/b"] != 4 || all["packs/ab"] != 5 {
		t.Errorf("left: %v", all)
	}
	if got := read(t, b, "packs/b"); string(got) != "same" {
		t.Errorf("an object with the same data went along: %q", got)
	}
	put(t, b, "packs/a", []byte("same"))
	if got := read(t, b, "packs/a"); string(got) != "same" {
		t.Errorf("put again after it was deleted: %q", got)
	}
}

func listed(t *testing.T, b backend.Backend) {
	if all := list(t, b, ""); len(all) != 0 {
		t.Fatalf("not empty: %v", all)
	}
	sizes := map[string]int64{"store.json": 3, "packs/aa": 0, "packs/ab": 2, "packs/b": 1, "packs.old": 4, "packs2/aa": 5, "indexes/aa": 6}
	for name, size := range sizes {
		put(t, b, name, make([]byte, size))
	}
	for _, prefix := range []string{"", "p", "packs", "packs/", "packs/a", "packs/aa", "packs/aaa", "packs.", "packs2/", "indexes/", "s", "store.json", "z", "z/", "aa"} {
		want := map[string]int64{}
		for name, size := range sizes {
			if strings.HasPrefix(name, prefix) {
				want[name] = size
			}
		}
		got := list(t, b, prefix)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("prefix %q: listed %v, want %v", prefix, got, want)
		}
	}
	seen := 0
	for _, err := range b.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		seen++
		break
	}
	if seen != 1 {
		t.Errorf("a listing that is left after the first object: %d", seen)
	}
}

func (s Suite) manyListed(t *testing.T, b backend.Backend) {
	parallel(t, s.Many, func(i int) error {
		return b.Put(t.Context(), fmt.Sprintf("packs/%05d", i), make([]byte, i%5), nil)
	})
	put(t, b, "indexes/0", nil)
	all := list(t, b, "packs/")
	for i := range s.Many {
		if size, there := all[fmt.Sprintf("packs/%05d", i)]; !there || size != int64(i%5) {
			t.Errorf("packs/%05d: listed: %v, with %d bytes", i, there, size)
		}
	}
	if len(all) != s.Many {
		t.Errorf("%d objects are listed, want %d", len(all), s.Many)
	}
	if all := list(t, b, ""); len(all) != s.Many+1 {
		t.Errorf("%d objects are listed in all, want %d", len(all), s.Many+1)
	}
}

func oneNameManyWriters(t *testing.T, b backend.Backend) {
	written := make([][]byte, 12)
	parallel(t, len(written), func(i int) error {
		written[i] = bytes.Repeat([]byte{'a' + byte(i)}, 10_000*(i+1))
		return b.Put(t.Context(), "packs/same", written[i], nil)
	})
	got := read(t, b, "packs/same")
	if !slices.ContainsFunc(written, func(w []byte) bool { return bytes.Equal(w, got) }) {
		t.Errorf("read %d bytes that no writer wrote", len(got))
	}
	if all := list(t, b, ""); len(all) != 1 || all["packs/same"] != int64(len(got)) {
		t.Errorf("listed: %v", all)
	}
}

func manyWriters(t *testing.T, b backend.Backend) {
	parallel(t, 24, func(i int) error {
		name, data := fmt.Sprintf("packs/%d", i), Noise(uint64(i), 50_000+i)
		if err := b.Put(t.Context(), name, data, nil); err != nil {
			return fmt.Errorf("put %s: %w", name, err)
		}
		got, err := b.Read(t.Context(), name, 0, -1)
		if err != nil || !bytes.Equal(got, data) {
			return fmt.Errorf("read %s after it was put: %d bytes, %v", name, len(got), err)
		}
		if i%2 == 1 {
			if err := b.Delete(t.Context(), name); err != nil {
				return fmt.Errorf("delete %s: %w", name, err)
			}
			if _, err := b.Read(t.Context(), name, 0, -1); !errors.Is(err, backend.ErrNotFound) {
				return fmt.Errorf("read %s after it was deleted: %w", name, err)
			}
		}
		return nil
	})
	if all := list(t, b, ""); len(all) != 12 {
		t.Errorf("%d objects are left, want 12: %v", len(all), all)
	}
}

func refs(t *testing.T, b backend.Backend) {
	put(t, b, "packs/a", []byte("aa"))
	put(t, b, "packs/b", []byte("bb"))
	put(t, b, "packs/twin", []byte("aa"))
	put(t, b, "packs/none", nil)
	put(t, b, "checkpoints/c", []byte("c"), "packs/a", "packs/b", "packs/twin", "packs/none")
	if got := read(t, b, "checkpoints/c"); string(got) != "c" {
		t.Errorf("read %q", got)
	}
	if all := list(t, b, ""); len(all) != 5 || all["checkpoints/c"] != 1 {
		t.Errorf("listed: %v", all)
	}
	if err := b.Delete(t.Context(), "checkpoints/c"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"packs/a": "aa", "packs/b": "bb", "packs/twin": "aa", "packs/none": ""} {
		if got := read(t, b, name); string(got) != want {
			t.Errorf("%s after what refers to it was deleted: %q", name, got)
		}
	}
}

func ended(t *testing.T, b backend.Backend) {
	put(t, b, "packs/a", []byte("x"))
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancelLate := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancelLate()
	for ctx, want := range map[context.Context]error{canceled: context.Canceled, late: context.DeadlineExceeded} {
		if err := b.Put(ctx, "packs/b", []byte("x"), nil); !errors.Is(err, want) {
			t.Errorf("put: %v, want %v", err, want)
		}
		if _, err := b.Read(ctx, "packs/a", 0, -1); !errors.Is(err, want) {
			t.Errorf("read: %v, want %v", err, want)
		}
		if err := b.Delete(ctx, "packs/a"); !errors.Is(err, want) {
			t.Errorf("delete: %v, want %v", err, want)
		}
		var err error
		for _, err = range b.List(ctx, "") {
		}
		if !errors.Is(err, want) {
			t.Errorf("list: %v, want %v", err, want)
		}
	}
	if all := list(t, b, ""); len(all) != 1 || all["packs/a"] != 1 {
		t.Errorf("after calls that were over before they began: %v", all)
	}
}

func brokenOff(t *testing.T, b backend.Backend) {
	data := Noise(3, 20<<20)
	begun := time.Now()
	put(t, b, "packs/whole", data)
	whole := time.Since(begun)
	for i := range 6 {
		name := fmt.Sprintf("packs/%d", i)
		ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(i)/5)
		err := b.Put(ctx, name, data, nil)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a put broken off: %v, want the context's error", err)
		}
		got, readErr := b.Read(t.Context(), name, 0, -1)
		switch {
		case readErr == nil && !bytes.Equal(got, data):
			t.Errorf("a put broken off after %d/5 of its time left %d bytes of %d", i, len(got), len(data))
		case readErr != nil && !errors.Is(readErr, backend.ErrNotFound):
			t.Errorf("read after a put that was broken off: %v", readErr)
		case readErr != nil && err == nil:
			t.Errorf("a put that went well is not found")
		}
		size, there := list(t, b, name)[name]
		if there != (readErr == nil) || there && size != int64(len(data)) {
			t.Errorf("after a put broken off: listed: %v, with %d bytes; read: %v", there, size, readErr)
		}
		put(t, b, name, data[:10]) // what was broken off is in nobody's way
		if got := read(t, b, name); !bytes.Equal(got, data[:10]) {
			t.Errorf("put again: read %d bytes", len(got))
		}
	}
}

func owners(t *testing.T, b backend.Backend) {
	data := []byte("as it was")
	put(t, b, "packs/a", data)
	copy(data, "otherwise")
	got := read(t, b, "packs/a")
	if string(got) != "as it was" {
		t.Errorf("what its writer did afterwards to its own bytes is seen: %q", got)
	}
	copy(got, "otherwise")
	if got := read(t, b, "packs/a"); string(got) != "as it was" {
		t.Errorf("what a reader did to its own bytes is seen: %q", got)
	}
}

// parallel calls do for 0 to n-1, some at a time.
func parallel(t *testing.T, n int, do func(int) error) {
	t.Helper()
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(n, 12) {
		workers.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := do(i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	if t.Failed() {
		t.FailNow()
	}
}
