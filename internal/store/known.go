package store

import "encoding/binary"

// maxKnown bounds how many blocks a writer knows of what the store holds already, each
// some 48 bytes: of pages, 6 GiB.
const maxKnown = 1 << 20 * 3 / 2

// known finds blocks by their IDs.
type known struct {
	ids   []ID
	refs  []uint64
	slots []uint32 // one more than the number in ids, by the first bits of the ID
}

func (k *known) find(id ID) (ref uint64, ok bool) {
	if len(k.slots) == 0 {
		return 0, false
	}
	for at := k.slot(id); ; at = (at + 1) & (len(k.slots) - 1) {
		n := k.slots[at]
		if n == 0 {
			return 0, false
		}
		if k.ids[n-1] == id {
			return k.refs[n-1], true
		}
	}
}

// add remembers a block that is not known yet.
func (k *known) add(id ID, ref uint64) {
	if len(k.slots) < 2*(len(k.ids)+1) {
		k.grow()
	}
	k.ids, k.refs = append(k.ids, id), append(k.refs, ref)
	k.put(len(k.ids))
}

func (k *known) put(n int) {
	at := k.slot(k.ids[n-1])
	for k.slots[at] != 0 {
		at = (at + 1) & (len(k.slots) - 1)
	}
	k.slots[at] = uint32(n)
}

func (k *known) grow() {
	k.slots = make([]uint32, max(1<<12, 2*len(k.slots)))
	for n := range k.ids {
		k.put(n + 1)
	}
}

func (k *known) slot(id ID) int {
	return int(binary.BigEndian.Uint64(id[:]) & uint64(len(k.slots)-1))
}
