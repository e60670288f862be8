package lazy

import (
	"math"
	"math/bits"
	"slices"
	"sync"
)

const (
	pageSize  = 4096
	chunkBits = 16 // a chunk is 64 KiB of addresses
	chunkSize = 1 << chunkBits
	inChunk   = chunkSize / pageSize
)

// missing are the pages that an address space has not been given yet: of which address,
// and where each is in the file of pages. What is in it may be given; what is not is
// there already, or is zero.
//
// The addresses are those that the pages have now: processes move memory. Several threads
// may use it.
type missing struct {
	mu     sync.Mutex
	chunks map[uint64]*chunk // by address / chunkSize
	order  []uint64          // keys of chunks, or what was one, in the order of streaming
	pages  int               // how many are missing
}

type chunk struct {
	set  uint16 // which of its pages are missing
	page [inChunk]uint32
}

// newMissing makes the set of a process's runs, which are in order of their addresses.
// Of much memory it is made chunk by chunk, not page by page: processes wait for it.
func newMissing(runs []Run) *missing {
	most := uint64(0) // chunks; neighbours may share one
	for _, r := range runs {
		if r.Pages > 0 {
			most += (r.Start+r.Pages*pageSize-1)>>chunkBits - r.Start>>chunkBits + 1
		}
	}
	m := &missing{chunks: make(map[uint64]*chunk, most), order: make([]uint64, 0, most)}
	slab := make([]chunk, 0, most)
	for _, r := range runs {
		for i := uint64(0); i < r.Pages; {
			address := r.Start + i*pageSize
			key := address >> chunkBits
			c := m.chunks[key]
			if c == nil {
				slab = append(slab, chunk{})
				c = &slab[len(slab)-1]
				m.chunks[key], m.order = c, append(m.order, key)
			}
			for bit := address >> 12 % inChunk; bit < inChunk && i < r.Pages; bit++ {
				c.set |= 1 << bit
				c.page[bit] = uint32(r.Page + i)
				i++
			}
		}
		m.pages += int(r.Pages)
	}
	return m
}

func (m *missing) add(address uint64, page uint32) {
	key, bit := address>>chunkBits, address>>12%inChunk
	c := m.chunks[key]
	if c == nil {
		c = &chunk{}
		m.chunks[key] = c
		m.order = append(m.order, key)
	}
	if c.set&(1<<bit) == 0 {
		m.pages++
	}
	c.set |= 1 << bit
	c.page[bit] = page
}

// at says which page of the file belongs to an address, if it is missing.
func (m *missing) at(address uint64) (page uint32, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pageAt(address)
}

func (m *missing) pageAt(address uint64) (page uint32, ok bool) {
	c := m.chunks[address>>chunkBits]
	bit := address >> 12 % inChunk
	if c == nil || c.set&(1<<bit) == 0 {
		return 0, false
	}
	return c.page[bit], true
}

// empty says whether nothing is missing of a whole chunk.
func (m *missing) empty(address uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.chunks[address>>chunkBits] == nil
}

// left is how many pages are missing.
func (m *missing) left() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pages
}

// firstOf is the first address of a chunk that is missing, if one is.
func (m *missing) firstOf(key uint64) (address uint64, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.chunks[key]
	if c == nil {
		return 0, false
	}
	return key<<chunkBits + uint64(bits.TrailingZeros16(c.set))*pageSize, true
}

// take returns the keys of chunks in the order of streaming. Next time it returns those
// that came about meanwhile; where there are none, all that are left.
func (m *missing) take() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := m.order
	m.order = nil
	if len(keys) == 0 {
		for key := range m.chunks {
			keys = append(keys, key)
		}
	}
	return keys
}

// all calls with every page that is missing.
func (m *missing) all(call func(address uint64, page uint32)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, c := range m.chunks {
		for set := c.set; set != 0; set &= set - 1 {
			bit := bits.TrailingZeros16(set)
			call(key<<chunkBits+uint64(bit)*pageSize, c.page[bit])
		}
	}
}

// drop takes the pages of addresses out, and returns how many that were.
func (m *missing) drop(start, end uint64) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dropAll(start, end)
}

func (m *missing) dropAll(start, end uint64) int {
	before := m.pages
	m.each(start, end, func(key uint64, c *chunk, bits uint16) {
		m.clear(key, c, bits)
	})
	return before - m.pages
}

func (m *missing) clear(key uint64, c *chunk, set uint16) {
	m.pages -= bits.OnesCount16(c.set & set)
	c.set &^= set
	if c.set == 0 {
		delete(m.chunks, key)
	}
}

// each calls with every chunk that has addresses of a range, and the bits of its pages
// that are in the range. A range may be larger than all memory: there are programs that
// reserve such.
func (m *missing) each(start, end uint64, call func(key uint64, c *chunk, bits uint16)) {
	if end <= start {
		return
	}
	first, last := start>>chunkBits, (end-1)>>chunkBits
	within := func(key uint64) uint16 {
		set := uint16(math.MaxUint16)
		if key == first {
			set &= math.MaxUint16 << (start >> 12 % inChunk)
		}
		if key == last {
			set &= math.MaxUint16 >> (inChunk - 1 - (end-1)>>12%inChunk)
		}
		return set
	}
	if last-first > uint64(len(m.chunks)) {
		for key, c := range m.chunks {
			if key >= first && key <= last {
				call(key, c, within(key))
			}
		}
		return
	}
	for key := first; ; key++ {
		if c := m.chunks[key]; c != nil {
			call(key, c, within(key))
		}
		if key == last {
			return
		}
	}
}

// move follows pages that were moved to other addresses. What was missing there is gone.
func (m *missing) move(from, to, size uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	type moved struct {
		address uint64
		page    uint32
	}
	var all []moved
	m.each(from, from+size, func(key uint64, c *chunk, set uint16) {
		for bit := range uint64(inChunk) {
			if c.set&set&(1<<bit) != 0 {
				all = append(all, moved{key<<chunkBits + bit*pageSize, c.page[bit]})
			}
		}
		m.clear(key, c, set)
	})
	m.dropAll(to, to+size)
	slices.SortFunc(all, func(a, b moved) int { return int(int64(a.address) - int64(b.address)) })
	for _, p := range all {
		m.add(p.address-from+to, p.page)
	}
}

// clone is the set of a process that was forked.
func (m *missing) clone() *missing {
	m.mu.Lock()
	defer m.mu.Unlock()
	other := &missing{chunks: make(map[uint64]*chunk, len(m.chunks)), order: slices.Clone(m.order), pages: m.pages}
	copies := make([]chunk, 0, len(m.chunks))
	for key, c := range m.chunks {
		copies = append(copies, *c)
		other.chunks[key] = &copies[len(copies)-1]
	}
	return other
}

// run is how many pages from an address on are missing and follow each other in the
// file too, most at most.
func (m *missing) run(address uint64, most int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	first, ok := m.pageAt(address)
	if !ok {
		return 0
	}
	n := 1
	for n < most {
		page, ok := m.pageAt(address + uint64(n)*pageSize)
		if !ok || page != first+uint32(n) {
			break
		}
		n++
	}
	return n
}
