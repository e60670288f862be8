package transfer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// zeros is an archive of any size that is never in memory. Its connections break
// after so many bytes, if that is not 0.
type zeros struct {
	t       *testing.T
	breaks  int64
	longest int64
	asked   int
	err     error
}

func (z *zeros) Range(_ context.Context, etag string, first, last int64) (io.ReadCloser, error) {
	z.asked++
	z.longest = max(z.longest, last-first+1)
	if z.err != nil {
		return nil, z.err
	}
	n := last - first + 1
	if z.breaks > 0 {
		n = min(n, z.breaks)
	}
	return io.NopCloser(io.LimitReader(nothing{}, n)), nil
}

type nothing struct{}

func (nothing) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// sink counts.
type sink struct{ n, marks int64 }

func (s *sink) Write(p []byte) (int, error) { s.n += int64(len(p)); return len(p), nil }
func (s *sink) Mark() error                 { s.marks++; return nil }

func policy(patience time.Duration) Policy {
	return Policy{Patience: patience, Transient: func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errAway) },
		Progress: func(int64, int64) {}, Notice: func(error, time.Duration) {}, Now: time.Now}
}

var errAway = errors.New("away")

func TestADownloadTakesConstantMemoryAndRangesOfBoundedLength(t *testing.T) {
	from, to := &zeros{t: t}, &sink{}
	const size = 2 << 30
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := Download(t.Context(), from, Object{Size: size, ETag: "e"}, 0, to, policy(time.Second)); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if to.n != size {
		t.Errorf("%d bytes arrived, want %d", to.n, int64(size))
	}
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 4<<20 {
		t.Errorf("%d bytes were allocated for an archive of %d", allocated, int64(size))
	}
	if from.longest > MaxPart || to.marks < size/MaxPart {
		t.Errorf("the longest range had %d bytes, %d parts were marked", from.longest, to.marks)
	}
}

func TestADownloadGoesOnWhereItsConnectionBroke(t *testing.T) {
	from, to := &zeros{t: t, breaks: 3 << 20}, &sink{}
	patient := policy(time.Minute)
	var notices int
	patient.Notice = func(error, time.Duration) { notices++ }
	if err := Download(t.Context(), from, Object{Size: 10 << 20, ETag: "e"}, 1<<20, to, patient); err != nil {
		t.Fatal(err)
	}
	if to.n != 9<<20 || notices == 0 {
		t.Errorf("%d bytes arrived, want %d; %d breaks", to.n, 9<<20, notices)
	}
}

func TestADownloadIsGivenUpWhenNothingArrivesForTooLong(t *testing.T) {
	to := &sink{}
	err := Download(t.Context(), &zeros{t: t, err: errAway}, Object{Size: 1 << 20, ETag: "e"}, 0, to, policy(500*time.Millisecond))
	if !errors.Is(err, ErrStalled) || !errors.Is(err, errAway) || to.marks == 0 {
		t.Errorf("error %v after %d marks, want one that says what happened, with all that came made safe", err, to.marks)
	}
}

func TestADownloadThatIsRefusedIsNotTriedAgain(t *testing.T) {
	from := &zeros{t: t, err: ErrChanged}
	if err := Download(t.Context(), from, Object{Size: 1 << 20, ETag: "e"}, 0, &sink{}, policy(time.Minute)); !errors.Is(err, ErrChanged) || from.asked != 1 {
		t.Errorf("error %v after %d requests", err, from.asked)
	}
}

func TestRangesGrowAndShrinkWithTheSpeed(t *testing.T) {
	w := newWindow()
	for range 10 {
		w.moved(w.size, 100*time.Millisecond)
	}
	if w.size != MaxPart {
		t.Errorf("on a fast connection a range has %d bytes, want %d", w.size, MaxPart)
	}
	for range 20 {
		w.moved(w.size, time.Duration(float64(w.size)/100_000*float64(time.Second))) // 100 kB/s
	}
	if w.size < 900_000 || w.size > 1_100_000 {
		t.Errorf("at 100 kB/s a range has %d bytes: it takes %.0f s, want 10", w.size, float64(w.size)/100_000)
	}
	for range 20 {
		w.broke()
	}
	if w.size != minPart {
		t.Errorf("after breaks a range has %d bytes, want %d", w.size, minPart)
	}
}

func open(t *testing.T, target, of string, object Object) (*Partial, bool) {
	t.Helper()
	p, discarded, err := OpenPartial(t.Context(), target, of, object, func(int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	return p, discarded
}

func TestAPartialFileIsGoneOnWithFromWhatIsSafe(t *testing.T) {
	target := filepath.Join(t.TempDir(), "a.tar")
	object := Object{Size: 12, ETag: "one"}
	p, _ := open(t, target, "x", object)
	write := func(text string) {
		t.Helper()
		if _, err := io.WriteString(p, text); err != nil {
			t.Fatal(err)
		}
	}
	write("safe")
	if err := p.Mark(); err != nil {
		t.Fatal(err)
	}
	write("lost") // not marked: a power failure may have left anything in its place
	if _, _, err := OpenPartial(t.Context(), target, "x", object, func(int64, int64) {}); err == nil {
		t.Error("two downloads write one file")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}

	p, discarded := open(t, target, "x", object)
	if discarded || p.Offset() != 4 {
		t.Fatalf("it goes on from %d (discarded: %t), want 4", p.Offset(), discarded)
	}
	write("and more")
	if want := sha256.Sum256([]byte("safeand more")); !bytes.Equal(p.Sum(), want[:]) {
		t.Errorf("digest %x, want %x", p.Sum(), want)
	}
	if err := p.Finish(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(target); err != nil || string(text) != "safeand more" {
		t.Errorf("%q, %v", text, err)
	}
	if left, _ := filepath.Glob(target + ".*"); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
}

func TestAPartOfAnotherArchiveIsThrownAway(t *testing.T) {
	target := filepath.Join(t.TempDir(), "a.tar")
	for i, object := range []Object{{Size: 8, ETag: "one"}, {Size: 8, ETag: "two"}, {Size: 9, ETag: "two"}} {
		p, discarded := open(t, target, "x", object)
		if discarded != (i > 0) || p.Offset() != 0 {
			t.Errorf("%+v: discarded %t, offset %d", object, discarded, p.Offset())
		}
		if _, err := io.WriteString(p, "part"); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.Mark(), p.Close()); err != nil {
			t.Fatal(err)
		}
	}
	p, discarded := open(t, target, "of something else", Object{Size: 9, ETag: "two"})
	defer p.Close()
	if !discarded {
		t.Error("a part of another checkpoint is gone on with")
	}
}

func TestALinkInTheWayOfADownloadIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := errors.Join(os.WriteFile(victim, []byte("precious"), 0o600), os.Symlink(victim, filepath.Join(dir, "a.tar.partial"))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := OpenPartial(t.Context(), filepath.Join(dir, "a.tar"), "x", Object{Size: 1, ETag: "e"}, nil); err == nil {
		t.Error("the link was followed")
	}
	if text, err := os.ReadFile(victim); err != nil || string(text) != "precious" {
		t.Errorf("%q, %v", text, err)
	}
}

// taker is a destination that takes a part of each part.
type taker struct {
	got   bytes.Buffer
	most  int64
	fails int
}

func (d *taker) Offset(context.Context) (int64, error) { return int64(d.got.Len()), nil }

func (d *taker) Put(_ context.Context, first, length int64, part io.Reader) (int64, error) {
	if first != int64(d.got.Len()) {
		return 0, fmt.Errorf("the part begins at %d, %d bytes are there", first, d.got.Len())
	}
	if _, err := io.CopyN(&d.got, part, min(length, d.most)); err != nil {
		return 0, err
	}
	if d.fails > 0 {
		d.fails--
		return 0, errAway // and the answer is lost
	}
	return int64(d.got.Len()), nil
}

func TestAnUploadGoesOnFromWhatIsThere(t *testing.T) {
	text := strings.Repeat("0123456789", 1<<20)
	to := &taker{most: 3 << 20, fails: 2}
	if err := Upload(t.Context(), strings.NewReader(text), int64(len(text)), to, policy(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if to.got.String() != text {
		t.Errorf("%d bytes arrived, not those that were sent", to.got.Len())
	}
}

func TestAnUploadThatNothingIsTakenOfIsGivenUp(t *testing.T) {
	err := Upload(t.Context(), strings.NewReader("text"), 4, &taker{most: 0}, policy(300*time.Millisecond))
	if !errors.Is(err, ErrStalled) {
		t.Errorf("error %v", err)
	}
}
