package store

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
)

// extent is a run of blocks that follow each other in a pack, or of zeros, which are in
// none.
type extent struct {
	pack  int // in the root's list; -1 for zeros
	first int // block's number in the pack
	count int // of blocks, or of zero bytes
}

// file is what a root says of a file.
type file struct {
	path    string // slash-separated, relative to the checkpoint's directory
	mode    fs.FileMode
	size    int64
	extents []extent
}

// maxExtent bounds what one extent says, in blocks or bytes.
const maxExtent = 1 << 30

// appendFile encodes a file: its path, permissions and size, then the extents. The number
// of a pack is told as one more than it is, 0 are zeros.
func appendFile(out []byte, f *file) []byte {
	out = binary.AppendUvarint(out, uint64(len(f.path)))
	out = append(out, f.path...)
	out = binary.AppendUvarint(out, uint64(f.mode.Perm()))
	out = binary.AppendUvarint(out, uint64(f.size))
	out = binary.AppendUvarint(out, uint64(len(f.extents)))
	for _, e := range f.extents {
		out = binary.AppendUvarint(out, uint64(e.pack+1))
		if e.pack >= 0 {
			out = binary.AppendUvarint(out, uint64(e.first))
		}
		out = binary.AppendUvarint(out, uint64(e.count))
	}
	return out
}

const (
	maxFiles = 1 << 20
	maxPath  = 4096
)

// decodeFiles decodes all files. What it says of packs and blocks is checked by whoever
// has their indexes.
func decodeFiles(data []byte, packs int) ([]file, error) {
	d := newDecoder(data)
	var files []file
	seen := map[string]bool{}
	for len(d.data) > 0 {
		f := file{path: string(d.bytes(d.count(maxPath)))}
		f.mode = fs.FileMode(d.count(0o777))
		f.size = int64(d.uvarint())
		extents := d.count(len(data))
		if d.failed() || f.size < 0 {
			return nil, errShort
		}
		if !fs.ValidPath(f.path) || f.path == "." || path.Clean(f.path) != f.path || seen[f.path] || len(files) >= maxFiles {
			return nil, fmt.Errorf("the file name %q is bad or there twice", f.path)
		}
		seen[f.path] = true
		for range extents {
			e := extent{pack: d.count(packs) - 1}
			if e.pack >= 0 {
				e.first = d.count(maxPack)
			}
			if e.count = d.count(maxExtent); e.count == 0 || d.failed() {
				return nil, errShort
			}
			f.extents = append(f.extents, e)
		}
		files = append(files, f)
	}
	if d.failed() {
		return nil, errShort
	}
	return files, nil
}

// place is a block: the pack's number in a writer's list, and the block's in the pack.
type place struct{ pack, block int32 }

// run is what a writer knows of a part of a file: count blocks, the first of which is
// ref, or count zero bytes.
type run struct {
	ref   uint64
	count int
}

// A ref names a block while a checkpoint is written: one of a pack that was there before,
// by its place, or the number of a new one, whose place is not known yet.
const (
	refNew  = 1 << 63
	refZero = 1 << 62
)

func refOf(p place) uint64 { return uint64(p.pack)<<32 | uint64(p.block) }

func placeOf(ref uint64) place { return place{int32(ref >> 32), int32(ref)} }

// appendRun adds a block to runs, or zero bytes.
func appendRun(runs []run, ref uint64, count int) []run {
	if n := len(runs); n > 0 {
		last := &runs[n-1]
		switch {
		case last.count+count > maxExtent:
		case ref == refZero && last.ref == refZero, ref != refZero && last.ref != refZero && last.ref+uint64(last.count) == ref:
			last.count += count
			return runs
		}
	}
	return append(runs, run{ref, count})
}
