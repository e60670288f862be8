package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"
)

func TestAnyPartOfAFileIsReadAsItWasPut(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, m := made(t, encrypted)
		big := random(1, 9<<20)
		clear(big[3<<20 : 5<<20]) // a hole
		dir := fstest.MapFS{"pages-1.img": {Data: big}, "small": {Data: prose(2, 999)}, "empty": {}}
		r, err := s.Open(t.Context(), put(t, s, dir).ID)
		must(t, err)
		pick := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			offset := pick.IntN(len(big))
			p := make([]byte, pick.IntN(min(len(big)-offset, 300<<10)+1))
			must(t, r.ReadAt(t.Context(), "pages-1.img", p, int64(offset)))
			if !bytes.Equal(p, big[offset:offset+len(p)]) {
				t.Fatalf("%d bytes from %d on are others", len(p), offset)
			}
		}
		all := make([]byte, len(big))
		must(t, r.ReadAt(t.Context(), "pages-1.img", all, 0))
		if !bytes.Equal(all, big) {
			t.Error("the whole file is another")
		}
		must(t, r.ReadAt(t.Context(), "empty", nil, 0))
		for _, err := range []error{
			r.ReadAt(t.Context(), "small", make([]byte, 2), 998), r.ReadAt(t.Context(), "small", make([]byte, 1), -1), r.ReadAt(t.Context(), "small", make([]byte, 1), 1<<40),
		} {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("what a file has not: %v", err)
			}
		}
		if err := r.ReadAt(t.Context(), "other", nil, 0); !errors.Is(err, ErrMissing) {
			t.Errorf("a file that is not there: %v", err)
		}
		for name, data := range m.objects { // of all that is read from now on
			if len(data) > 1000 {
				data[len(data)/4] ^= 1
				m.objects[name] = data
			}
		}
		if err := r.ReadAt(t.Context(), "pages-1.img", all, 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("what was changed: %v", err)
		}
	})
}

func TestSomeFilesComeWithoutTheOthers(t *testing.T) {
	s, _ := made(t, false)
	id := put(t, s, specimen()).ID
	dir := t.TempDir()
	var name string
	for path := range specimen() {
		name = max(name, path)
	}
	must(t, s.GetFiles(t.Context(), id, dir, func(path string) bool { return path == name }, nil))
	got, err := os.ReadFile(filepath.Join(dir, name))
	must(t, err)
	if !bytes.Equal(got, specimen()[name].Data) {
		t.Errorf("%s is another", name)
	}
	for path := range specimen() {
		if _, err := os.Stat(filepath.Join(dir, path)); path != name && err == nil {
			t.Errorf("%s came too", path)
		}
	}
}
