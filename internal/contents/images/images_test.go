package images_test

import (
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/checkpoint-restore/go-criu/v8/magic"

	"podstasis.dev/stasis/internal/contents/images"
)

func TestTheMagicNumbersAreCRIUs(t *testing.T) {
	theirs := magic.LoadMagic().ByName
	for name, ours := range map[string]images.Magic{
		"PSTREE": images.PSTree, "CORE": images.Core, "IDS": images.IDs, "MM": images.MM, "PAGEMAP": images.Pagemap, "FDINFO": images.FDInfo,
		"FILES": images.Files, "FS": images.FS, "MNTS": images.Mounts, "MEMFD_INODE": images.MemfdInodes, "REMAP_FPATH": images.Remaps,
	} {
		if theirs[name] != uint64(ours) {
			t.Errorf("%s is %x, not %x", name, theirs[name], uint32(ours))
		}
	}
}

// image is one of a kind with the given bytes after its head.
func image(kind images.Magic, rest ...byte) fstest.MapFS {
	b := binary.LittleEndian.AppendUint32(nil, 0x54564319)
	b = binary.LittleEndian.AppendUint32(b, uint32(kind))
	return fstest.MapFS{"x.img": &fstest.MapFile{Data: append(b, rest...)}}
}

func entries(dir fstest.MapFS, limit int64) (n int, err error) {
	err = images.New(dir, limit).Entries(context.Background(), "x.img", images.Core, func([]byte) error { n++; return nil })
	return n, err
}

func TestAnImageThatIsNotWhatItsNameSaysIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		dir   fstest.MapFS
		limit int64
		want  error
		says  string
	}{
		"of another kind":       {image(images.MM), 1 << 20, images.ErrFormat, "begins with"},
		"empty":                 {fstest.MapFS{"x.img": &fstest.MapFile{}}, 1 << 20, images.ErrFormat, "too early"},
		"half a length":         {image(images.Core, 1, 0), 1 << 20, images.ErrFormat, "too early"},
		"half an entry":         {image(images.Core, 9, 0, 0, 0, 1), 1 << 20, images.ErrFormat, "too early"},
		"an entry of 4 GiB":     {image(images.Core, 255, 255, 255, 255), 1 << 40, images.ErrTooMuch, "4294967295"},
		"more than may be read": {image(images.Core, 1, 0, 0, 0, 1), 10, images.ErrTooMuch, "all images"},
		"many empty entries":    {image(images.Core, make([]byte, 4000)...), 16 << 10, images.ErrTooMuch, "all images"},
		"a directory":           {fstest.MapFS{"x.img/y": &fstest.MapFile{}}, 1 << 20, images.ErrFormat, "regular"},
	} {
		if _, err := entries(c.dir, c.limit); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n, err := entries(image(images.Core, 1, 0, 0, 0, 1, 0, 0, 0, 0), 1<<20); n != 2 || err != nil {
		t.Errorf("got %d entries, %v", n, err)
	}
}

func TestALengthThatIsNotThereAllocatesNothingMuch(t *testing.T) {
	dir := image(images.Core, 0, 0, 0x7f, 0) // says 8323072 bytes
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := entries(dir, 1<<30)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, images.ErrFormat) || n > 1<<20 {
		t.Errorf("got %v, %d bytes were allocated", err, n)
	}
}

// FuzzMemory reads address spaces and page maps.
func FuzzMemory(f *testing.F) {
	f.Add([]byte{0x72, 4, 8, 0, 16, 1}, []byte{8, 1})
	f.Fuzz(func(t *testing.T, mm, pages []byte) {
		entry := func(b []byte) []byte { return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...) }
		dir := fstest.MapFS{
			"mm-1.img":      image(images.MM, entry(mm)...)["x.img"],
			"pagemap-1.img": image(images.Pagemap, append(entry([]byte{8, 1}), pages...)...)["x.img"],
		}
		s := images.New(dir, 1<<20)
		memory, err := s.ReadMemory(context.Background(), 1)
		if err == nil {
			for _, m := range memory.Mappings {
				if m.End <= m.Start {
					t.Errorf("mapping %x-%x", m.Start, m.End)
				}
			}
		}
		last := uint64(0)
		_, _ = s.Pagemap(context.Background(), "1", func(p images.Pages) error {
			if p.Start < last || p.End < p.Start {
				t.Errorf("pages %x-%x after %x", p.Start, p.End, last)
			}
			last = p.End
			return nil
		})
	})
}
