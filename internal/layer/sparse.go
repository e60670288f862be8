package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Files with holes are written as GNU tar writes them, in its format 1.0 (GNU tar
// manual, "Storing Sparse Files"): an entry whose content is a map of where there are
// data, and then those. GNU tar and Go's archive/tar read it.
const (
	paxSparse = "GNU.sparse."
	// MaxSparse bounds the size of a file with holes, which costs nothing to claim.
	MaxSparse = 1 << 40
	// smallestHole is what is worth an entry in the map.
	smallestHole = 16 << 10
	// maxExtents keeps the map below the 1 MiB that readers take.
	maxExtents = 32 << 10
	block      = 512 // of a tar
)

// ErrTooSparse says that a file with holes is larger than MaxSparse.
var ErrTooSparse = fmt.Errorf("a file with holes of more than %d TiB", MaxSparse>>40)

// extent is a part of a file that is not a hole.
type extent struct{ offset, length int64 }

// extentsOf lists what of a file of a size holds data. A file system that cannot
// tell has no holes.
func extentsOf(f *os.File, size int64) ([]extent, error) {
	var found []extent
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole until its end
		} else if err != nil {
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
				return []extent{{0, size}}, nil
			}
			return nil, err
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		if data = min(data, size); data < size {
			found = append(found, extent{data, min(hole, size) - data})
		}
		at = hole
	}
	return atMost(found, size, maxExtents), nil
}

// atMost leaves out the smaller holes until so many extents are left.
func atMost(found []extent, size int64, most int) []extent {
	for least := int64(smallestHole); ; least *= 4 {
		if joined := join(found, size, least); len(joined) <= most {
			return joined
		}
	}
}

// join leaves out the holes that are smaller than least.
func join(found []extent, size, least int64) (joined []extent) {
	for _, e := range found {
		if n := len(joined); n > 0 && e.offset-(joined[n-1].offset+joined[n-1].length) < least {
			joined[n-1].length = e.offset + e.length - joined[n-1].offset
			continue
		}
		if e.offset < least {
			e = extent{0, e.offset + e.length}
		}
		joined = append(joined, e)
	}
	if n := len(joined); n > 0 && size-(joined[n-1].offset+joined[n-1].length) < least {
		joined[n-1].length = size - joined[n-1].offset
	}
	if len(joined) == 0 && size < least {
		return []extent{{0, size}}
	}
	return joined
}

// whole says whether the extents are all of a file.
func whole(extents []extent, size int64) bool {
	return size == 0 || len(extents) == 1 && extents[0] == extent{0, size}
}

// addSparse writes a regular file with holes.
func (t *writer) addSparse(h *tar.Header, c content) error {
	if h.Size > MaxSparse {
		return fmt.Errorf("%w: it claims %d bytes", ErrTooSparse, h.Size)
	}
	extents := c.extents
	if n := len(extents); n == 0 || extents[n-1].offset+extents[n-1].length < h.Size {
		extents = append(slices.Clip(extents), extent{h.Size, 0}) // GNU tar takes the size from the last
	}
	var where bytes.Buffer
	fmt.Fprintf(&where, "%d\n", len(extents))
	stored := int64(0)
	for _, e := range extents {
		fmt.Fprintf(&where, "%d\n%d\n", e.offset, e.length)
		stored += e.length
	}
	pad(&where)
	stored += int64(where.Len())
	// tar.Writer ignores records of this name. So both blocks are written past it,
	// while it is between two entries.
	if err := t.tar.Flush(); err != nil {
		return err
	}
	records := maps.Clone(h.PAXRecords)
	if records == nil {
		records = map[string]string{}
	}
	maps.Copy(records, map[string]string{
		paxSparse + "major": "1", paxSparse + "minor": "0",
		paxSparse + "name": h.Name, paxSparse + "realsize": strconv.FormatInt(h.Size, 10),
		"size": strconv.FormatInt(stored, 10),
		"uid":  strconv.Itoa(h.Uid), "gid": strconv.Itoa(h.Gid),
		"mtime": paxTime(h.ModTime), "atime": paxTime(h.AccessTime), "ctime": paxTime(h.ChangeTime),
	})
	var head bytes.Buffer
	told := paxRecords(records)
	base := path.Base(h.Name)
	head.Write(ustar("PaxHeaders.0/"+base, 'x', 0o644, int64(len(told)), h.ModTime))
	head.WriteString(told)
	pad(&head)
	head.Write(ustar("GNUSparseFile.0/"+base, tar.TypeReg, h.Mode, stored, h.ModTime))
	if _, err := t.out.Write(append(head.Bytes(), where.Bytes()...)); err != nil {
		return err
	}
	err := c.read(func(e extent, r io.Reader) error {
		if _, err := io.CopyN(t.out, untilEnded{r, t.ended}, e.length); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", e.length, e.offset, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = t.out.Write(make([]byte, -stored&(block-1)))
	return err
}

// pad fills the last block with zeros.
func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&(block-1))) }

func paxTime(t time.Time) string {
	return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond())
}

// paxRecords formats records, each with its own length before it.
func paxRecords(records map[string]string) string {
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(records)) {
		rest := " " + key + "=" + records[key] + "\n"
		size := len(rest)
		for size < len(rest)+len(strconv.Itoa(size)) {
			size = len(rest) + len(strconv.Itoa(size))
		}
		b.WriteString(strconv.Itoa(size) + rest)
	}
	return b.String()
}

// ustar is a header block. What does not fit, its pax records say.
func ustar(name string, kind byte, mode, size int64, modified time.Time) []byte {
	b := make([]byte, block)
	octal := func(at, digits int, value int64) {
		if value < 0 || value >= 1<<(3*digits) {
			value = 0
		}
		copy(b[at:], fmt.Sprintf("%0*o", digits, value))
	}
	copy(b[:100], name)
	octal(100, 7, mode&0o7777)
	octal(108, 7, 0)
	octal(116, 7, 0)
	octal(124, 11, size)
	octal(136, 11, modified.Unix())
	copy(b[148:], "        ")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	octal(148, 6, sum)
	b[154] = 0
	return b
}

// counted counts what is read of an archive.
type counted struct {
	from io.Reader
	n    int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.n += int64(n)
	return n, err
}

// fill writes an entry's content. The holes of a sparse one are left out: those are
// what costs nothing of the archive to read.
func fill(ctx context.Context, f *os.File, content *tar.Reader, archive *counted, h *tar.Header) error {
	sparse := isSparse(h)
	if sparse && h.Size > MaxSparse {
		return fmt.Errorf("%w: it claims %d bytes", ErrTooSparse, h.Size)
	}
	var zeros [4 << 10]byte
	buffer := make([]byte, 256<<10)
	for at := int64(0); ; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		before := archive.n
		n, err := content.Read(buffer)
		for part := buffer[:n]; len(part) > 0; {
			size := len(part)
			if sparse {
				size = min(size, len(zeros))
			}
			if !sparse || archive.n != before && !bytes.Equal(part[:size], zeros[:size]) {
				if _, err := f.WriteAt(part[:size], at); err != nil {
					return err
				}
			}
			part, at = part[size:], at+int64(size)
		}
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	if !sparse {
		return nil
	}
	return f.Truncate(h.Size)
}

func isSparse(h *tar.Header) bool {
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, paxSparse) {
			return true
		}
	}
	return false
}
