package store

import "encoding/binary"

// maxKnown bounds how many blocks a writer knows of what the store holds already, each
// some 46 bytes: of pages, 6 GiB.
const maxKnown = 1 << 20 * 3 / 2

// known finds blocks by their IDs.
type known struct {
	count  int
	chunks [][]knownBlock // full but for the last: what grew by copying would be garbage
	slots  []uint32       // one more than the block's number, by the first bits of the ID
}

type knownBlock struct {
	id  ID
	ref uint64
}

const knownChunk = 1 << 12

func (k *known) block(n int) *knownBlock { return &k.chunks[n/knownChunk][n%knownChunk] }

func (k *known) find(id ID) (ref uint64, ok bool) {
	if len(k.slots) == 0 {
		return 0, false
	}
	for at := k.slot(id); ; at = (at + 1) & (len(k.slots) - 1) {
		n := k.slots[at]
		if n == 0 {
			return 0, false
		}
		if b := k.block(int(n - 1)); b.id == id {
			return b.ref, true
		}
	}
}

// add remembers a block that is not known yet.
func (k *known) add(id ID, ref uint64) {
	if k.count >= len(k.slots)/4*3 {
		k.grow()
	}
	if k.count%knownChunk == 0 {
		k.chunks = append(k.chunks, make([]knownBlock, 0, knownChunk))
	}
	last := &k.chunks[k.count/knownChunk]
	*last = append(*last, knownBlock{id, ref})
	k.count++
	k.put(k.count)
}

func (k *known) put(n int) {
	at := k.slot(k.block(n - 1).id)
	for k.slots[at] != 0 {
		at = (at + 1) & (len(k.slots) - 1)
	}
	k.slots[at] = uint32(n)
}

func (k *known) grow() {
	k.slots = make([]uint32, max(1<<12, 2*len(k.slots)))
	for n := range k.count {
		k.put(n + 1)
	}
}

func (k *known) slot(id ID) int {
	return int(binary.BigEndian.Uint64(id[:]) & uint64(len(k.slots)-1))
}
