package cow

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// What is read and written here are CRIU's images, as a CRIU of this node has just
// written them: two magic numbers, then protocol buffers, each after its length. The
// helper does without a library for them: it would have every start of stasis-runtime
// take longer.

const (
	magicCommon  = 0x54564319
	magicPSTree  = 0x50273030
	magicMM      = 0x57492820
	magicPagemap = 0x56084025

	// maxImage bounds an image that is read. The largest, of a process' mappings, has
	// 65530 of some 60 bytes.
	maxImage = 16 << 20
)

// errImage says that an image is not what is expected.
var errImage = errors.New("an image of CRIU's is not understood")

// messages reads the entries of an image.
func messages(name string, magic uint32) ([][]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxImage {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", errImage, name, maxImage)
	}
	all, err := parseMessages(data, magic)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return all, nil
}

func parseMessages(data []byte, magic uint32) ([][]byte, error) {
	if len(data) < 8 || binary.LittleEndian.Uint32(data) != magicCommon || binary.LittleEndian.Uint32(data[4:]) != magic {
		return nil, fmt.Errorf("%w: it begins with %x", errImage, data[:min(8, len(data))])
	}
	var all [][]byte
	for data = data[8:]; len(data) > 0; {
		if len(data) < 4 {
			return nil, fmt.Errorf("%w: it is cut off", errImage)
		}
		size := binary.LittleEndian.Uint32(data)
		if data = data[4:]; uint64(size) > uint64(len(data)) {
			return nil, fmt.Errorf("%w: it is cut off", errImage)
		}
		all, data = append(all, data[:size]), data[size:]
	}
	return all, nil
}

// fields calls each with the fields of a message: number and value, or bytes.
func fields(message []byte, each func(number int, value uint64, bytes []byte) error) error {
	for len(message) > 0 {
		key, n := binary.Uvarint(message)
		if n <= 0 || key>>3 == 0 || key>>3 > 1<<29 {
			return fmt.Errorf("%w: no field at its place", errImage)
		}
		message = message[n:]
		var value uint64
		var bytes []byte
		switch key & 7 {
		case 0:
			if value, n = binary.Uvarint(message); n <= 0 {
				return fmt.Errorf("%w: a number is cut off", errImage)
			}
		case 1:
			if n = 8; len(message) < n {
				return fmt.Errorf("%w: a number is cut off", errImage)
			}
			value = binary.LittleEndian.Uint64(message)
		case 2:
			size, m := binary.Uvarint(message)
			if m <= 0 || size > uint64(len(message)-m) {
				return fmt.Errorf("%w: a field is cut off", errImage)
			}
			n = m + int(size)
			bytes = message[m:n]
		case 5:
			if n = 4; len(message) < n {
				return fmt.Errorf("%w: a number is cut off", errImage)
			}
			value = uint64(binary.LittleEndian.Uint32(message))
		default:
			return fmt.Errorf("%w: a field of kind %d", errImage, key&7)
		}
		if err := each(int(key>>3), value, bytes); err != nil {
			return err
		}
		message = message[n:]
	}
	return nil
}

// readTree lists the processes of an image directory, by their IDs in it.
func readTree(dir string) (pids []int, err error) {
	entries, err := messages(filepath.Join(dir, "pstree.img"), magicPSTree)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if err := fields(entry, func(number int, value uint64, _ []byte) error {
			if number == 1 {
				pids = append(pids, int(uint32(value)))
			}
			return nil
		}); err != nil {
			return nil, fmt.Errorf("pstree.img: %w", err)
		}
	}
	return pids, nil
}

// Status and flags of a mapping, as criu/include/image.h and mmap(2) number them.
const (
	statusRegular     = 1 << 0
	statusVsyscall    = 1 << 2
	statusVDSO        = 1 << 3
	statusFilePrivate = 1 << 6
	statusAnonPrivate = 1 << 9
	statusVvar        = 1 << 12
	statusAIO         = 1 << 13
	statusShadowStack = 1 << 15

	flagPrivate   = 0x2
	flagDroppable = 0x8
	flagAnonymous = 0x20
	flagLocked    = 0x2000
	flagHuge      = 0x40000

	protRead = 0x1

	adviceDontFork   = 1 << 10
	adviceWipeOnFork = 1 << 18
)

// mapping is a range of memory that belongs to a process alone.
type mapping struct {
	start, end  uint64
	prot, flags uint32
	status      uint32
	advice      uint64
}

// lazy says whether CRIU lets its pages be brought in after a restore.
func (m mapping) lazy() bool {
	return m.flags&flagAnonymous != 0 && m.flags&flagPrivate != 0 && m.flags&(flagLocked|flagHuge) == 0
}

// forked says whether a child has what is in it.
func (m mapping) forked() bool { return m.advice&(adviceDontFork|adviceWipeOnFork) == 0 }

// readMappings reads those of a process whose pages CRIU writes with the process: what
// is shared, or the kernel's, is not among them, nor the vDSO, which it always writes.
func readMappings(dir string, pid int) ([]mapping, error) {
	name := "mm-" + strconv.Itoa(pid) + ".img"
	entries, err := messages(filepath.Join(dir, name), magicMM)
	if err != nil {
		return nil, err
	}
	var all []mapping
	for _, entry := range entries {
		if err := fields(entry, func(number int, _ uint64, bytes []byte) error {
			if number != 14 {
				return nil
			}
			m, err := parseMapping(bytes)
			if err != nil {
				return err
			}
			switch {
			case m.status&statusAIO != 0:
				return fmt.Errorf("%w: it has a ring of aio(7)", ErrUnfit)
			case m.status&(statusVDSO|statusVvar|statusVsyscall) != 0, m.flags&flagDroppable != 0:
			case m.status&statusShadowStack != 0, m.status&statusRegular != 0 && m.status&(statusAnonPrivate|statusFilePrivate) != 0:
				if m.flags&flagHuge != 0 {
					return fmt.Errorf("%w: it has huge pages of its own (MAP_HUGETLB)", ErrUnfit)
				}
				all = append(all, m)
			}
			return nil
		}); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return all, nil
}

func parseMapping(message []byte) (m mapping, err error) {
	err = fields(message, func(number int, value uint64, _ []byte) error {
		switch number {
		case 1:
			m.start = value
		case 2:
			m.end = value
		case 5:
			m.prot = uint32(value)
		case 6:
			m.flags = uint32(value)
		case 7:
			m.status = uint32(value)
		case 9:
			m.advice = value
		}
		return nil
	})
	if err == nil && (m.end <= m.start || m.start%pageSize != 0 || m.end%pageSize != 0) {
		err = fmt.Errorf("%w: a mapping from %x to %x", errImage, m.start, m.end)
	}
	return m, err
}

// Flags of a run of pages (criu/include/pagemap.h).
const (
	pagesInParent = 1 << 0
	pagesLazy     = 1 << 1
	pagesPresent  = 1 << 2
)

// run is a run of pages in an image.
type run struct {
	start, pages uint64
	flags        uint32
}

func (r run) end() uint64 { return r.start + r.pages*pageSize }

// pagemap is what pagemap-PID.img says.
type pagemap struct {
	id   uint32 // of the file that holds the pages
	runs []run
}

func readPagemap(dir string, pid int) (p pagemap, err error) {
	name := "pagemap-" + strconv.Itoa(pid) + ".img"
	entries, err := messages(filepath.Join(dir, name), magicPagemap)
	if err != nil {
		return p, err
	}
	if len(entries) == 0 {
		return p, fmt.Errorf("%s: %w: it is empty", name, errImage)
	}
	err = fields(entries[0], func(number int, value uint64, _ []byte) error {
		if number == 1 {
			p.id = uint32(value)
		}
		return nil
	})
	if err != nil {
		return p, fmt.Errorf("%s: %w", name, err)
	}
	for _, entry := range entries[1:] {
		r := run{flags: pagesPresent}
		var pages, compat uint64
		err := fields(entry, func(number int, value uint64, _ []byte) error {
			switch number {
			case 1:
				r.start = value
			case 2:
				compat = value
			case 3:
				if value != 0 {
					r.flags = pagesInParent
				}
			case 4:
				r.flags = uint32(value)
			case 5:
				pages = value
			}
			return nil
		})
		if r.pages = pages; pages == 0 {
			r.pages = compat
		}
		if err == nil && (r.flags&pagesPresent == 0 || r.pages == 0 || r.pages > 1<<40 || r.start%pageSize != 0) {
			err = fmt.Errorf("%w: %d pages at %x with flags %x", errImage, r.pages, r.start, r.flags)
		}
		if err != nil {
			return p, fmt.Errorf("%s: %w", name, err)
		}
		p.runs = append(p.runs, r)
	}
	return p, nil
}

// write writes a pagemap to a file, as CRIU does.
func (p pagemap) write(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	w.Write(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, magicCommon), magicPagemap))
	entry := func(message []byte) {
		w.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(message))))
		w.Write(message)
	}
	entry(binary.AppendUvarint([]byte{1 << 3}, uint64(p.id)))
	for _, r := range p.runs {
		m := binary.AppendUvarint([]byte{1 << 3}, r.start)
		m = append(m, 2<<3, 0) // a field of older versions, which has to be there
		m = binary.AppendUvarint(append(m, 4<<3), uint64(r.flags))
		m = binary.AppendUvarint(append(m, 5<<3), r.pages)
		entry(m)
	}
	return errors.Join(w.Flush(), f.Close()) // the first error of w stays
}
