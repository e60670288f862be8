package checkpoint_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
)

// Whichever part of a file one verifier has taken, what is wrong in it is found.
func TestWhateverIsAlteredInALargeFileIsFoundByThoseWhoShareIt(t *testing.T) {
	dir := t.TempDir()
	const blocks = 300 // for three at a time
	pages := make([]byte, blocks*checkpoint.BlockSize-5)
	for i := range pages {
		pages[i] = byte(i >> 16)
	}
	file := dir + "/containers/a/criu/pages-1.img"
	write(t, file, string(pages))
	write(t, dir+"/containers/a/criu/pages-2.img", string(pages[:5*checkpoint.BlockSize]))
	if _, err := checkpoint.Seal(t.Context(), dir, &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.Verify(t.Context(), dir, ""); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int{0, checkpoint.BlockSize, 127*checkpoint.BlockSize + 9, 128 * checkpoint.BlockSize, 299 * checkpoint.BlockSize, len(pages) - 1} {
		for _, change := range []byte{1, 0} { // and back
			if _, err := f.WriteAt([]byte{pages[at] ^ change}, int64(at)); err != nil {
				t.Fatal(err)
			}
			_, err := checkpoint.Verify(t.Context(), dir, "")
			if change == 0 && err != nil {
				t.Errorf("byte %d as it was: %v", at, err)
			}
			if change == 1 && (!errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), "pages-1.img")) {
				t.Errorf("byte %d altered: %v", at, err)
			}
		}
	}
	for _, size := range []int64{int64(len(pages)) - 1, int64(len(pages)) + 1, 0} {
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if _, err := checkpoint.Verify(t.Context(), dir, ""); !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), "pages-1.img") {
			t.Errorf("of %d bytes: %v", size, err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.Verify(t.Context(), dir, ""); !errors.Is(err, checkpoint.ErrMissing) || !strings.Contains(err.Error(), "pages-1.img") {
		t.Errorf("without the file: %v", err)
	}
}

// However long that is needed, all is checked.
func TestOneOfSeveralProcessorsIsLeftToWhoeverNeedsIt(t *testing.T) {
	dir, m, _ := large(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for processors, want := range map[int]bool{1: false, 2: true} {
		runtime.GOMAXPROCS(processors)
		var called atomic.Bool
		err := checkpoint.VerifyFiles(t.Context(), dir, m, nil, func(checkpoint.File) bool { return true }, func(ctx context.Context) {
			called.Store(true)
			<-ctx.Done()
		})
		if err != nil || called.Load() != want {
			t.Errorf("%d processors: %v, one was left: %v", processors, err, called.Load())
		}
	}
}

func TestAVerificationEndsWithItsContext(t *testing.T) {
	dir, _, _ := large(t)
	ended := errors.New("no more")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ended)
	if _, err := checkpoint.Verify(ctx, dir, ""); !errors.Is(err, ended) {
		t.Errorf("got %v", err)
	}
}

// BenchmarkVerify is of a file in the page cache.
func BenchmarkVerify(b *testing.B) {
	dir := b.TempDir()
	pages := make([]byte, 256<<20)
	for i := range pages {
		pages[i] = byte(i * i >> 7)
	}
	if err := errors.Join(os.MkdirAll(dir+"/containers/a/criu", 0o700), os.WriteFile(dir+"/containers/a/criu/pages-1.img", pages, 0o600)); err != nil {
		b.Fatal(err)
	}
	if _, err := checkpoint.Seal(b.Context(), dir, &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(pages)))
	for b.Loop() {
		if _, err := checkpoint.Verify(b.Context(), dir, ""); err != nil {
			b.Fatal(err)
		}
	}
}
