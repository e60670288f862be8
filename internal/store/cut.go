package store

import (
	"errors"
	"fmt"
	"io"
	"regexp"

	"github.com/restic/chunker"
)

// slab is a part of a file, at most some slabSize long, and where its blocks end.
type slab struct {
	data  []byte
	ends  []int
	pages bool
}

// ofPages says that a file holds captured pages, one after the other: CRIU's, or those
// of gVisor's sentry. A page that comes or goes in the middle moves all that follow by
// whole pages only, so each is a block.
var ofPages = regexp.MustCompile(`(^|/)(pages-[0-9]+|pages)\.img$`)

// cut reads a file and gives its slabs, in order. Each is valid until release is called.
func cut(name string, r io.Reader, take func() []byte, give func(slab) error) error {
	if ofPages.MatchString(name) {
		return cutPages(r, take, give)
	}
	return cutByContent(r, take, give)
}

func cutPages(r io.Reader, take func() []byte, give func(slab) error) error {
	for {
		s := slab{data: take()[:slabSize], pages: true}
		n, err := io.ReadFull(r, s.data)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		s.data = s.data[:n]
		for at := 0; at < n; {
			at = min(at+pageSize, n)
			s.ends = append(s.ends, at)
		}
		if given := give(s); given != nil || err != nil {
			return given
		}
	}
}

// What the content decides is where a block ends: where the last 64 bytes, as a
// polynomial over GF(2), leave a certain rest (Rabin's fingerprint). So blocks are found
// again behind what was inserted. On average they are of 32 KiB.
const (
	polynomial   = chunker.Pol(0x3DA3358B4DC173)
	minChunk     = 8 << 10
	averageChunk = 15 // bits
)

func cutByContent(r io.Reader, take func() []byte, give func(slab) error) error {
	c := chunker.NewWithBoundaries(r, polynomial, minChunk, maxBlock)
	c.SetAverageBits(averageChunk)
	s := slab{data: take()[:0]}
	for {
		// It appends to what it is given.
		chunk, err := c.Next(s.data[len(s.data):])
		if errors.Is(err, io.EOF) {
			return give(s)
		} else if err != nil {
			return fmt.Errorf("cut by content: %w", err)
		}
		s.data = s.data[:len(s.data)+len(chunk.Data)]
		s.ends = append(s.ends, len(s.data))
		if len(s.data)+maxBlock > slabSize {
			if err := give(s); err != nil {
				return err
			}
			s = slab{data: take()[:0]}
		}
	}
}
