// Package pagestest makes CRIU's page maps, for tests.
package pagestest

import (
	"encoding/binary"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"google.golang.org/protobuf/proto"

	"podstasis.dev/stasis/internal/contents/images"
)

// Flags of a Run.
const (
	Lazy    = 1 << 1 // it may be given while its process runs
	Present = 1 << 2 // it is in the file of pages
)

// Run is so many pages from an address on.
type Run struct {
	At, Pages uint64
	Flags     uint32
}

// Map encodes the page map of a process whose pages are in file pages-ID.img.
func Map(t testing.TB, id uint32, runs ...Run) []byte {
	t.Helper()
	out := binary.LittleEndian.AppendUint32(nil, images.Common)
	out = binary.LittleEndian.AppendUint32(out, uint32(images.Pagemap))
	add := func(m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(b))), b...)
	}
	add(&pagemap.PagemapHead{PagesId: &id})
	for _, r := range runs {
		add(&pagemap.PagemapEntry{Vaddr: &r.At, NrPages: &r.Pages, CompatNrPages: proto.Uint32(uint32(r.Pages)), Flags: &r.Flags})
	}
	return out
}
