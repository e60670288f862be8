package store

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// flips is how many bits are flipped, one at a time, in each kind of store.
const flips = 10_000

func TestEachFlippedBitIsFound(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		put(t, s, fstest.MapFS{
			pagesFile: {Data: slices.Concat(random(1, 10*pageSize), prose(2, 10*pageSize))},
			"x.tar":   {Data: slices.Concat(random(3, 20_000), prose(4, 20_000))},
		}, "pod")
		gone := put(t, s, fstest.MapFS{"y": {Data: random(5, 10_000)}})
		must(t, s.Delete(t.Context(), gone.ID))
		l, err := s.begin(t.Context())
		must(t, err)
		defer l.end(t.Context())
		_, err = s.Collect(t.Context(), CollectOptions{})
		must(t, err)
		names := slices.Sorted(maps.Keys(m.objects))
		kinds := map[string]bool{}
		for _, name := range names {
			kinds[strings.Split(name, "/")[0]] = true
		}
		if want := map[bool]int{false: 6, true: 7}[encrypted]; len(kinds) != want {
			t.Fatalf("there are %v", kinds)
		}
		must(t, readAll(t.Context(), m, encrypted, names))
		r := rand.New(rand.NewPCG(1, 2))
		for range flips {
			name := names[r.IntN(len(names))]
			data := m.objects[name]
			at, bit := r.IntN(len(data)), byte(1)<<r.IntN(8)
			data[at] ^= bit
			err := readAll(t.Context(), m, encrypted, []string{name})
			data[at] ^= bit
			if err == nil {
				t.Fatalf("bit %d of byte %d of %s was flipped, and nobody noticed", bit, at, name)
			}
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrKey) && !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), name) {
				t.Fatalf("a bit of %s was flipped, and the error is: %v", name, err)
			}
		}
	})
}

// readAll opens a store and reads these objects as they are read.
func readAll(ctx context.Context, m *memory, encrypted bool, names []string) error {
	var with []Key
	if encrypted {
		with = []Key{testKey}
	}
	s, err := Open(ctx, m, with)
	if err != nil {
		return err
	}
	for _, name := range names {
		prefix, id, _ := strings.Cut(name, "/")
		switch prefix += "/"; prefix {
		case prefixPacks:
			of, err := ParseID(id)
			if err != nil {
				return err
			}
			if err := s.verifyPack(ctx, Pack{of, int64(len(m.objects[name]))}); err != nil {
				return err
			}
		case prefixRoots:
			of, err := ParseID(id)
			if err != nil {
				return err
			}
			if _, _, err := s.readRoot(ctx, of); err != nil {
				return err
			}
		case prefixLeases, prefixCondemned, prefixHints:
			var any map[string]any
			if err := s.readJSON(ctx, prefix, name, &any); err != nil {
				return err
			}
		}
	}
	return nil
}
