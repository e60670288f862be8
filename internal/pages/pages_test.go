package pages_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/pagestest"
)

const (
	page    = images.PageSize
	present = pagestest.Present
	lazy    = pagestest.Lazy
)

func run(at, pages uint64, flags uint32) pagestest.Run {
	return pagestest.Run{At: at, Pages: pages, Flags: flags}
}

// sealed is a checkpoint of a container with two processes and shared memory.
func sealed(t *testing.T) (dir, digest string) {
	t.Helper()
	dir = t.TempDir()
	criu := filepath.Join(dir, "containers/a/criu")
	if err := os.MkdirAll(criu, 0o700); err != nil {
		t.Fatal(err)
	}
	content := func(pages int) []byte {
		var b []byte
		for i := range pages {
			b = append(b, bytes.Repeat([]byte{byte(i + 1)}, page)...)
		}
		return b
	}
	for name, data := range map[string][]byte{
		"pagemap-1.img": pagestest.Map(t, 1, run(0x10000, 20, present|lazy), run(0x30000, 1, present), run(0x40000, 2, 0), run(0x50000, 30, present|lazy)),
		"pages-1.img":   content(51), "pagemap-2.img": pagestest.Map(t, 2, run(0x10000, 1, present)), "pages-2.img": content(1),
		"pagemap-shmem-7.img": pagestest.Map(t, 3, run(0, 40, present)), "pages-3.img": content(40), "core-1.img": []byte("core"),
	} {
		if err := os.WriteFile(filepath.Join(criu, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	digest, err := checkpoint.Seal(context.Background(), dir, &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}})
	if err != nil {
		t.Fatal(err)
	}
	return dir, digest
}

func TestAnAddressLeadsToItsPageAndBack(t *testing.T) {
	dir, _ := sealed(t)
	c, err := pages.ReadContainer(t.Context(), os.DirFS(dir), "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		pid     uint32
		address uint64
		file    string
		offset  int64
	}{{1, 0x10000, "pages-1.img", 0}, {1, 0x23000, "pages-1.img", 19 * page}, {1, 0x30000, "pages-1.img", 20 * page}, {1, 0x50000, "pages-1.img", 21 * page},
		{1, 0x6d000, "pages-1.img", 50 * page}, {2, 0x10000, "pages-2.img", 0}} {
		file, offset, ok := c.Find(want.pid, want.address+123)
		if !ok || file != "containers/a/criu/"+want.file || offset != want.offset {
			t.Errorf("%d %x: %s %d %v", want.pid, want.address, file, offset, ok)
		}
		if pid, address, ok := c.Of(file, offset+123); !ok || pid != want.pid || address != want.address {
			t.Errorf("%s %d: %d %x %v", file, offset, pid, address, ok)
		}
	}
	for _, address := range []uint64{0, 0xf000, 0x24000, 0x31000, 0x40000, 0x6e000} {
		if _, _, ok := c.Find(1, address); ok {
			t.Errorf("%x was not captured", address)
		}
	}
	if _, _, ok := c.Of("containers/a/criu/pages-1.img", 51*page); ok {
		t.Error("there is no such page")
	}
}

func TestOnlyPagesThatAreGivenLazilyAreNotCheckedBefore(t *testing.T) {
	policy := pages.Policy{Threshold: 50 * page}
	flip := func(t *testing.T, file string, offset int64) {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		f.ReadAt(b[:], offset)
		b[0] ^= 1
		f.WriteAt(b[:], offset)
	}
	for name, c := range map[string]struct {
		file   string
		offset int64
		fails  bool
	}{
		"a lazy page":                {"pages-1.img", 40 * page, false},
		"a page that CRIU reads":     {"pages-1.img", 20 * page, true},
		"its neighbour in the block": {"pages-1.img", 18 * page, true},
		"shared memory":              {"pages-3.img", 30 * page, true},
		"another process's":          {"pages-2.img", 0, true},
		"a page map":                 {"pagemap-1.img", 30, true},
		"something else":             {"core-1.img", 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, digest := sealed(t)
			flip(t, dir+"/containers/a/criu/"+c.file, c.offset)
			v, err := policy.Verify(t.Context(), dir, digest, pages.ModeAuto)
			if c.fails != errors.Is(err, checkpoint.ErrCorrupt) || !c.fails && (err != nil || v.Lazily == nil) {
				t.Errorf("got %v", err)
			}
			if _, err := policy.Verify(t.Context(), dir, digest, pages.ModeEager); !errors.Is(err, checkpoint.ErrCorrupt) {
				t.Errorf("where all is checked: %v", err)
			}
		})
	}
	t.Run("another manifest", func(t *testing.T) {
		dir, _ := sealed(t)
		if _, err := policy.Verify(t.Context(), dir, "sha256:1", pages.ModeAuto); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a file more", func(t *testing.T) {
		dir, digest := sealed(t)
		os.WriteFile(dir+"/x", nil, 0o600)
		if _, err := policy.Verify(t.Context(), dir, digest, pages.ModeAuto); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a shorter file", func(t *testing.T) {
		dir, digest := sealed(t)
		os.Truncate(dir+"/containers/a/criu/pages-1.img", 50*page)
		if _, err := policy.Verify(t.Context(), dir, digest, pages.ModeAuto); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWhatIsGivenLazilyIsDecidedBySizeAndByWhoeverAsks(t *testing.T) {
	dir, digest := sealed(t)
	none := errors.New("no userfaultfd")
	for name, c := range map[string]struct {
		policy pages.Policy
		mode   pages.Mode
		lazily bool
		err    error
	}{
		"much":                    {pages.Policy{Threshold: 50 * page}, pages.ModeAuto, true, nil},
		"little":                  {pages.Policy{Threshold: 51 * page}, pages.ModeAuto, false, nil},
		"little, asked for":       {pages.Policy{Threshold: 51 * page}, pages.ModeLazy, true, nil},
		"much, not wanted":        {pages.Policy{Threshold: 1}, pages.ModeEager, false, nil},
		"not possible":            {pages.Policy{Unsupported: none}, pages.ModeAuto, false, nil},
		"not possible, asked for": {pages.Policy{Unsupported: none}, pages.ModeLazy, false, none},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := c.policy.Verify(t.Context(), dir, digest, c.mode)
			if !errors.Is(err, c.err) || (err == nil) != (v != nil) {
				t.Fatalf("got %+v, %v", v, err)
			}
			if v == nil {
				return
			}
			l := v.Lazily
			if (l != nil) != c.lazily || v.Manifest == nil || v.Beside {
				t.Fatalf("got %+v", v)
			}
			if l == nil {
				return
			}
			p, err := l.Plan("a")
			if err != nil || l.Bytes != 50*page || p.Bytes() != l.Bytes || len(p.Processes) != 1 || p.Processes[0].PID != 1 || len(p.Processes[0].Runs) != 2 || p.Processes[0].Runs[1].Page != 21 {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
	if _, err := pages.ParseMode("now"); err == nil || !strings.Contains(err.Error(), "lazy") {
		t.Errorf("got %v", err)
	}
}

func TestLargeFilesOfPagesAreCheckedBesideTheirRestoreAndNothingElseIs(t *testing.T) {
	dir := t.TempDir()
	images := dir + "/containers/a/criu/"
	must(t, os.MkdirAll(images, 0o700))
	for name, size := range map[string]int64{"pages-1.img": 64 << 20, "pages-2.img": 64<<20 - page, "other.img": 64 << 20} {
		must(t, os.WriteFile(images+name, nil, 0o600))
		must(t, os.Truncate(images+name, size))
	}
	digest, err := checkpoint.Seal(t.Context(), dir, &checkpoint.Manifest{Engine: checkpoint.Program{Name: "criu", Version: "1"}, Containers: []checkpoint.Container{{Name: "a"}}})
	must(t, err)
	check := func() (*pages.Verified, error) {
		return pages.Policy{}.Verify(t.Context(), dir, digest, pages.ModeEager)
	}
	if v, err := check(); err != nil || !v.Beside || v.Lazily != nil || v.Manifest == nil {
		t.Errorf("%+v, %v", v, err)
	}
	for name, later := range map[string]bool{"pages-1.img": true, "pages-2.img": false, "other.img": false} {
		t.Run(name, func(t *testing.T) {
			f, err := os.OpenFile(images+name, os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt([]byte{1}, 63<<20)
			must(t, err)
			if _, err := check(); later != (err == nil) || !later && !errors.Is(err, checkpoint.ErrCorrupt) {
				t.Errorf("before: %v", err)
			}
			if err := pages.VerifyBeside(t.Context(), dir, digest, nil); later != errors.Is(err, checkpoint.ErrCorrupt) || later != (err != nil) || later && !strings.Contains(err.Error(), name) {
				t.Errorf("beside: %v", err)
			}
			_, err = f.WriteAt([]byte{0}, 63<<20)
			must(t, err)
			if err := pages.VerifyBeside(t.Context(), dir, digest, nil); err != nil {
				t.Errorf("as it was: %v", err)
			}
		})
	}
	if err := pages.VerifyBeside(t.Context(), dir, "sha256:1", nil); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("another manifest: %v", err)
	}
	must(t, os.Truncate(images+"pages-1.img", 64<<20-1))
	if _, err := check(); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("a shorter file is seen before anything begins: %v", err)
	}
	must(t, os.Remove(images+"pages-1.img"))
	if _, err := check(); !errors.Is(err, checkpoint.ErrMissing) {
		t.Errorf("so is one that is missing: %v", err)
	}
}

func TestPageMapsThatContradictEachOtherAreRefused(t *testing.T) {
	for name, dir := range map[string]fstest.MapFS{
		"one file of pages for two": {"pagemap-1.img": {Data: pagestest.Map(t, 1, run(page, 1, present))}, "pagemap-2.img": {Data: pagestest.Map(t, 1, run(page, 1, present))}},
		"half a page":               {"pagemap-1.img": {Data: pagestest.Map(t, 1, run(page+1, 1, present))}},
		"pages of an earlier image": {"pagemap-1.img": {Data: pagestest.Map(t, 1, run(page, 1, 1))}},
		"out of order":              {"pagemap-1.img": {Data: pagestest.Map(t, 1, run(4*page, 2, present), run(5*page, 1, present))}},
		"more than there can be":    {"pagemap-1.img": {Data: pagestest.Map(t, 1, run(page, 1<<62, present))}},
	} {
		if got, err := pages.Read(t.Context(), dir, 1<<20); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(pagestest.Map(f, 1, run(0x10000, 20, present|lazy), run(0x30000, 1, present)), pagestest.Map(f, 2, run(0x10000, 1, present)))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		dir := fstest.MapFS{"pagemap-1.img": {Data: a}, "pagemap-shmem-9.img": {Data: b}}
		all, err := pages.Read(context.Background(), dir, 1<<20)
		if err != nil {
			return
		}
		for i := range all {
			m := &all[i]
			last, offset := uint64(0), int64(0)
			for _, r := range m.Runs {
				if r.Start < last || r.End < r.Start || r.Offset < offset {
					t.Fatalf("%+v after %x, %d", r, last, offset)
				}
				last, offset = r.End, r.Offset+int64(r.End-r.Start)
				if r.End == r.Start {
					continue
				}
				at, ok := m.Offset(r.End - 1)
				if back, there := m.Address(at); !ok || !there || back != r.End-page {
					t.Errorf("%+v: %d %v, %x %v", r, at, ok, back, there)
				}
			}
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
