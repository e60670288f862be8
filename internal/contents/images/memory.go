package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
)

// PageSize is that of the images.
const PageSize = 4096

// Status of a mapping, as criu/include/image.h numbers them.
const (
	StatusStack       = 1 << 1
	StatusVsyscall    = 1 << 2
	StatusVDSO        = 1 << 3
	StatusHeap        = 1 << 5
	StatusFilePrivate = 1 << 6
	StatusFileShared  = 1 << 7
	StatusAnonShared  = 1 << 8
	StatusAnonPrivate = 1 << 9
	StatusSysV        = 1 << 10
	StatusSocket      = 1 << 11
	StatusVvar        = 1 << 12
	StatusAIO         = 1 << 13
	StatusMemfd       = 1 << 14
)

// maxMappings bounds the mappings of a process; Linux allows 65530 unless told otherwise.
const maxMappings = 1 << 18

// No program has addresses between these two; sums of sizes below the first do not
// overflow. Above the second lies the vsyscall page.
const (
	maxAddress    = 1 << 61
	kernelAddress = 0xffff_ffff_ff00_0000
)

// Mapping is a range of an address space.
type Mapping struct {
	Start, End        uint64
	Offset, ShmID     uint64 // ShmID names shared memory, or the file that is mapped
	Prot, Flags, Mode uint32 // Mode is the status bits
	Captured          int64  // bytes, filled in by Account
}

// Memory is a process's address space.
type Memory struct {
	// Numbers by the field's number in mm.proto: 1 start of code … 12 the program's file.
	Numbers  [13]uint64
	Mappings []Mapping // in order of their addresses
}

// Fields of Memory.Numbers.
const (
	StartCode = 1 + iota
	EndCode
	StartData
	EndData
	StartStack
	StartBrk
	Brk
	ArgStart
	ArgEnd
	EnvStart
	EnvEnd
	ExeFile
)

// ReadMemory reads mm-PID.img.
func (s *Source) ReadMemory(ctx context.Context, pid uint32) (*Memory, error) {
	m := &Memory{}
	name := fmt.Sprintf("mm-%d.img", pid)
	return m, s.Entries(ctx, name, MM, func(entry []byte) error {
		return Fields(entry, func(f Field) error {
			if f.Number >= 1 && int(f.Number) < len(m.Numbers) {
				m.Numbers[f.Number] = f.Value
			}
			if f.Number != 14 {
				return nil
			}
			return m.add(f.Bytes)
		})
	})
}

func (m *Memory) add(b []byte) error {
	var v vma.VmaEntry
	if err := Decode(b, &v); err != nil {
		return err
	}
	start, end := v.GetStart(), v.GetEnd()
	if end > maxAddress && start < kernelAddress || end <= start || len(m.Mappings) > 0 && start < m.Mappings[len(m.Mappings)-1].End {
		return fmt.Errorf("%w: mapping %x-%x out of order", ErrFormat, start, end)
	}
	if len(m.Mappings) == maxMappings {
		return fmt.Errorf("%w: more than %d mappings", ErrTooMuch, maxMappings)
	}
	m.Mappings = append(m.Mappings, Mapping{Start: start, End: end, Offset: v.GetPgoff(), ShmID: v.GetShmid(),
		Prot: v.GetProt(), Flags: v.GetFlags(), Mode: v.GetStatus()})
	return nil
}

// Pages is a run of captured pages.
type Pages struct {
	Start, End uint64
	// Offset in the image of pages; negative for pages that lie in an earlier image
	// (incremental checkpoints).
	Offset int64
	// Lazy says that a restore may leave the page out and give it later.
	Lazy bool
}

// Flags of an entry of a page map.
const (
	inParent = 1 << 0
	lazy     = 1 << 1
	present  = 1 << 2
)

// Pagemap calls each with the runs of pages of pagemap-NAME.img, by ascending
// addresses, and returns the number of the image that holds them.
func (s *Source) Pagemap(ctx context.Context, name string, each func(Pages) error) (pagesID uint32, err error) {
	first, offset, last := true, int64(0), uint64(0)
	err = s.Entries(ctx, "pagemap-"+name+".img", Pagemap, func(entry []byte) error {
		if first {
			first = false
			var head pagemap.PagemapHead
			err := Decode(entry, &head)
			pagesID = head.GetPagesId()
			return err
		}
		var e pagemap.PagemapEntry
		if err := Decode(entry, &e); err != nil {
			return err
		}
		count := e.GetNrPages()
		if count == 0 {
			count = uint64(e.GetCompatNrPages())
		}
		if count > math.MaxInt64/PageSize || e.GetVaddr() > math.MaxUint64-count*PageSize || e.GetVaddr() < last {
			return fmt.Errorf("%w: %d pages at %x out of order", ErrFormat, count, e.GetVaddr())
		}
		run := Pages{Start: e.GetVaddr(), End: e.GetVaddr() + count*PageSize, Offset: offset, Lazy: e.GetFlags()&lazy != 0}
		last = run.End
		if (e.Flags == nil && !e.GetInParent()) || e.GetFlags()&present != 0 {
			if offset > math.MaxInt64-int64(count*PageSize) {
				return fmt.Errorf("%w: more pages than can be", ErrFormat)
			}
			offset += int64(count * PageSize)
		} else if e.GetInParent() || e.GetFlags()&inParent != 0 {
			run.Offset = -1
		} else {
			return nil // not there at all
		}
		return each(run)
	})
	return pagesID, err
}

// ReadPages reads len(p) bytes at an offset of an image of pages, and nothing else of it.
func (s *Source) ReadPages(pagesID uint32, p []byte, offset int64) error {
	name := fmt.Sprintf("pages-%d.img", pagesID)
	f, err := s.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	switch r := f.(type) {
	case io.ReaderAt:
		err = s.full(io.NewSectionReader(r, offset, int64(len(p))), p)
	case io.Seeker:
		if _, err = r.Seek(offset, io.SeekStart); err == nil {
			err = s.full(f, p)
		}
	default:
		err = errors.New("it cannot be read from its middle")
	}
	if err != nil {
		return fmt.Errorf("%s at %d: %w", name, offset, err)
	}
	return nil
}
