package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const pageSize = 4096

// Which pages of memory a mapping has of its own is asked as CRIU asks it, so that an
// image has the same: those that are in memory or swapped out, and neither a file's nor
// the page of zeros (PAGEMAP_SCAN, since Linux 6.7).

const (
	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsZero    = 1 << 5
	pageIsGuard   = 1 << 8 // since Linux 6.15
)

type scanArgs struct {
	Size, Flags                                   uint64
	Start, End, WalkEnd                           uint64
	Vec, VecLen, MaxPages                         uint64
	Inverted, CategoryMask, AnyofMask, ReturnMask uint64
}

type scanRegion struct{ Start, End, Categories uint64 }

const scanRequest = 3<<30 | uint(unsafe.Sizeof(scanArgs{}))<<16 | 'f'<<8 | 16 // _IOWR('f', 16, struct pm_scan_arg)

// scanner asks for the pages of one process.
type scanner struct {
	f       *os.File
	guards  bool // this kernel knows guard pages
	regions []scanRegion
}

func newScanner(pid int) (*scanner, error) {
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "pagemap"))
	if err != nil {
		return nil, err
	}
	s := &scanner{f: f, guards: true, regions: make([]scanRegion, 4096)}
	if _, _, err := s.scan(0, pageSize); errors.Is(err, unix.EINVAL) {
		s.guards = false
		_, _, err = s.scan(0, pageSize)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%w: this kernel cannot list a process' pages (PAGEMAP_SCAN, since Linux 6.7): %w", ErrUnfit, err), f.Close())
		}
	} else if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: this kernel cannot list a process' pages (PAGEMAP_SCAN, since Linux 6.7): %w", ErrUnfit, err), f.Close())
	}
	return s, nil
}

func (s *scanner) close() error { return s.f.Close() }

func (s *scanner) scan(start, end uint64) (found []scanRegion, next uint64, err error) {
	a := scanArgs{
		Start: start, End: end, Vec: uint64(uintptr(unsafe.Pointer(&s.regions[0]))), VecLen: uint64(len(s.regions)),
		Inverted: pageIsZero | pageIsFile, CategoryMask: pageIsZero | pageIsFile, AnyofMask: pageIsPresent | pageIsSwapped,
		ReturnMask: pageIsPresent | pageIsSwapped,
	}
	a.Size = uint64(unsafe.Sizeof(a))
	if s.guards {
		a.ReturnMask |= pageIsGuard
	}
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, s.f.Fd(), uintptr(scanRequest), uintptr(unsafe.Pointer(&a)))
	if errno != 0 {
		return nil, 0, errno
	}
	return s.regions[:n], a.WalkEnd, nil
}

// pages lists the runs of pages of a mapping.
func (s *scanner) pages(m mapping) (runs []run, err error) {
	for at := m.start; at < m.end; {
		found, next, err := s.scan(at, m.end)
		if err != nil {
			return nil, fmt.Errorf("list the pages from %x to %x: %w", at, m.end, err)
		}
		for _, r := range found {
			if r.Categories&pageIsGuard != 0 {
				continue
			}
			pages := (r.End - r.Start) / pageSize
			if n := len(runs); n > 0 && runs[n-1].end() == r.Start {
				runs[n-1].pages += pages
			} else {
				runs = append(runs, run{start: r.Start, pages: pages})
			}
		}
		if next <= at {
			return nil, fmt.Errorf("list the pages from %x to %x: the kernel does not get on", at, m.end)
		}
		at = next
	}
	return runs, nil
}

// memory reads that of a process that stands still.
type memory struct{ mem *os.File }

func openMemory(pid int) (*memory, error) {
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "mem"))
	if err != nil {
		return nil, err
	}
	return &memory{f}, nil
}

func (m *memory) close() error { return m.mem.Close() }

// read fills p from an address, whatever the process itself may read. process_vm_readv(2)
// has fewer copies to make; but it pins pages, and for that the kernel first makes a copy of
// each that a child shares with its parent.
func (m *memory) read(p []byte, address uint64) error {
	if n, err := m.mem.ReadAt(p, int64(address)); err != nil {
		return fmt.Errorf("read memory at %x: %w", address+uint64(n), err)
	}
	return nil
}

// piece is a run of pages on its way into an image, and where it is read.
type piece struct {
	run
	held    []byte   // it is here already,
	file    *os.File // or there,
	offset  int64    // at this place, or in the child
	mapping span     // which it is of, if the child has it
}

// maxHeld bounds the memory that is read while the processes stand still, because their
// children do not have it.
const maxHeld = 64 << 20

// hold reads, of a process that stands still, what its child will not have.
func hold(pid int, mappings []mapping, budget *int64) (pieces []piece, err error) {
	var s *scanner
	var mem *memory
	for _, m := range mappings {
		if m.forked() {
			continue
		}
		if s == nil {
			if s, err = newScanner(pid); err != nil {
				return nil, err
			}
			defer s.close()
			if mem, err = openMemory(pid); err != nil {
				return nil, err
			}
			defer mem.close()
		}
		runs, err := s.pages(m)
		if err != nil {
			return nil, err
		}
		for _, r := range runs {
			size := int64(r.pages) * pageSize
			if *budget -= size; *budget < 0 {
				return nil, fmt.Errorf("%w: more than %d MiB of its memory are kept from children (MADV_DONTFORK, MADV_WIPEONFORK)", ErrUnfit, maxHeld>>20)
			}
			held := make([]byte, size)
			if err := mem.read(held, r.start); err != nil {
				return nil, err
			}
			pieces = append(pieces, piece{run: m.flagged(r), held: held})
		}
	}
	return pieces, nil
}

// flagged gives a run the flags that CRIU would.
func (m mapping) flagged(r run) run {
	r.flags = pagesPresent
	if m.lazy() {
		r.flags |= pagesLazy
	}
	return r
}

// unlazy takes pages with the tops of stacks out of runs: CRIU brings those back at once.
func unlazy(pieces []piece, stacks []uint64) []piece {
	tops := map[uint64]bool{}
	for _, sp := range stacks {
		tops[sp&^(pageSize-1)] = true
	}
	var out []piece
	for _, p := range pieces {
		if p.flags&pagesLazy == 0 {
			out = append(out, p)
			continue
		}
		for _, top := range slices.Sorted(maps.Keys(tops)) {
			if top < p.start || top >= p.end() {
				continue
			}
			before, at, after := p.split(top)
			if before.pages > 0 {
				out = append(out, before)
			}
			at.flags &^= pagesLazy
			out = append(out, at)
			p = after
			if p.pages == 0 {
				break
			}
		}
		if p.pages > 0 {
			out = append(out, p)
		}
	}
	return out
}

// split divides a piece into what is before a page, the page, and what is after.
func (p piece) split(at uint64) (before, page, after piece) {
	part := func(start, end uint64) piece {
		q := p
		q.start, q.pages = start, (end-start)/pageSize
		q.offset += int64(start - p.start)
		if p.held != nil {
			q.held = p.held[start-p.start : end-p.start]
		}
		return q
	}
	return part(p.start, at), part(at, at+pageSize), part(at+pageSize, p.end())
}

const chunk = 1 << 20

// span is a part of an address space.
type span struct{ start, end uint64 }

// spending tells of what has been read, when it is as much as pays for a system call of the
// child: a few stops, each of which waits for a processor that is free. Parts of a mapping
// are told of as one, with what lies between them.
type spending struct {
	tell    func(span)
	mapping span
	read    span
}

// spendingSize is how much that is. So much more than it need the child holds on to.
const spendingSize = 16 << 20

func (s *spending) add(mapping, read span) {
	if mapping != s.mapping {
		s.flush()
		s.mapping, s.read = mapping, read
	}
	if s.read.end = read.end; s.read.end-s.read.start >= spendingSize {
		s.flush()
		s.read.start = read.end
	}
}

// flush tells of the rest, if it is worth it.
func (s *spending) flush() {
	if s.read.end-s.read.start >= spendingSize/64 {
		s.tell(s.read)
	}
}

// writePages writes the pages of a process, read from its child, into the images of a
// directory, in place of the few that CRIU has written of it. It returns how many bytes
// were written, and counts them in progress meanwhile. What the child has been read of is
// told to spent.
func writePages(ctx context.Context, dir string, pid int, old pagemap, mappings []mapping, held []piece, stacks []uint64, child int, progress *atomic.Int64, spent func(span)) (read int64, err error) {
	pieces, spending := slices.Clone(held), spending{tell: spent}
	s, err := newScanner(child)
	if err != nil {
		return 0, err
	}
	defer s.close()
	for _, m := range mappings {
		if !m.forked() {
			continue
		}
		runs, err := s.pages(m)
		if err != nil {
			return 0, err
		}
		for _, r := range runs {
			pieces = append(pieces, piece{run: m.flagged(r), mapping: span{m.start, m.end}})
		}
	}
	pieces = unlazy(pieces, stacks)

	name := filepath.Join(dir, fmt.Sprintf("pages-%d.img", old.id))
	before, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer before.Close()
	var offset int64
	for _, r := range old.runs {
		pieces = append(pieces, piece{run: r, file: before, offset: offset})
		offset += int64(r.pages) * pageSize
	}
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Compare(a.start, b.start) })

	mem, err := openMemory(child)
	if err != nil {
		return 0, err
	}
	defer mem.close()
	out, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	now := pagemap{id: old.id}
	buf := make([]byte, chunk)
	for _, p := range pieces {
		if n := len(now.runs); n > 0 && p.start < now.runs[n-1].end() {
			return read, fmt.Errorf("%w: pages at %x twice", errImage, p.start)
		}
		for at := p.start; at < p.end(); {
			if ctx.Err() != nil {
				return read, context.Cause(ctx)
			}
			b := buf[:min(chunk, p.end()-at)]
			switch off := int64(at - p.start); {
			case p.held != nil:
				b = p.held[off:min(off+chunk, int64(len(p.held)))]
			case p.file != nil:
				_, err = p.file.ReadAt(b, p.offset+off)
			default:
				err = mem.read(b, at)
			}
			if err != nil {
				return read, err
			}
			if _, err := out.Write(b); err != nil {
				return read, fmt.Errorf("%w: %w", errWrite, err)
			}
			at += uint64(len(b))
			progress.Add(int64(len(b)))
			if p.file == nil {
				read += int64(len(b))
			}
			if p.file == nil && p.held == nil {
				spending.add(p.mapping, span{at - uint64(len(b)), at})
			}
		}
		if n := len(now.runs); n > 0 && now.runs[n-1].end() == p.start && now.runs[n-1].flags == p.flags {
			now.runs[n-1].pages += p.pages
		} else {
			now.runs = append(now.runs, p.run)
		}
	}
	list := filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid))
	err = out.Close()
	if err == nil {
		err = now.write(list + ".new")
	}
	if err == nil {
		err = errors.Join(os.Rename(name+".new", name), os.Rename(list+".new", list))
	}
	if err != nil {
		return read, fmt.Errorf("%w: %w", errWrite, err)
	}
	return read, nil
}
