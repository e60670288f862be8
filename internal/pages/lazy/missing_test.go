package lazy

import (
	"bytes"
	"math"
	"math/bits"
	"math/rand/v2"
	"testing"
)

// model is the same as a set, page by page.
type model map[uint64]uint32

func (m model) move(from, to, size uint64) {
	moved := model{}
	for a, p := range m {
		if a >= from && a < from+size {
			moved[a-from+to] = p
			delete(m, a)
		}
	}
	m.drop(to, to+size)
	for a, p := range moved {
		m[a] = p
	}
}

func (m model) drop(start, end uint64) {
	for a := range m {
		if a >= start && a < end {
			delete(m, a)
		}
	}
}

func TestWhatIsMissingFollowsWhatProcessesDo(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const base, span = 0x7f0000001000, 400
	for range 200 {
		var runs []Run
		want := model{}
		for at, page := uint64(0), uint64(0); at < span; {
			n := 1 + r.Uint64N(30)
			runs = append(runs, Run{base + at*pageSize, n, page})
			for i := range n {
				want[base+(at+i)*pageSize] = uint32(page + i)
			}
			at, page = at+n+r.Uint64N(9), page+n
		}
		m := newMissing(runs)
		for range 30 {
			from, n := base+r.Uint64N(span)*pageSize, (1+r.Uint64N(100))*pageSize
			switch r.IntN(5) {
			case 0:
				m.drop(from, from+n)
				want.drop(from, from+n)
			case 1:
				to := base + (span+r.Uint64N(2*span))*pageSize // where mremap puts it, there is nothing of it before
				m.move(from, to, n)
				want.move(from, to, n)
			case 2:
				m.drop(from, 1<<56) // a reservation larger than all memory
				want.drop(from, 1<<56)
			case 3:
				m = m.clone()
			}
			if len(want) != m.pages {
				t.Fatalf("%d pages are missing, and %d should be", m.pages, len(want))
			}
			for a := uint64(base - pageSize); a < base+4*span*pageSize; a += pageSize {
				page, ok := m.at(a)
				if other, there := want[a]; ok != there || page != other {
					t.Fatalf("at %x: page %d %v, and it should be %d %v", a, page, ok, other, there)
				}
			}
		}
	}
}

func TestAForkedSetIsOnesOwn(t *testing.T) {
	m := newMissing([]Run{{0x10000, 16, 0}, {0x20000, 3, 16}})
	child := m.clone()
	m.drop(0x10000, 0x18000)
	if child.pages != 19 || m.pages != 11 {
		t.Errorf("%d and %d", child.pages, m.pages)
	}
	if n := child.run(0x10000, 100); n != 19 {
		t.Errorf("a run of %d", n)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte{eventFault, 8: 1, 16: 0x12}, false)
	f.Add(bytes.Repeat([]byte{eventRemap, 0xff, 0, 0x10}, 8), true)
	f.Add([]byte{eventUnmap, 9: 0x10, 18: 0xff}, true)
	f.Fuzz(func(t *testing.T, data []byte, forked bool) {
		var b [messageBytes]byte
		copy(b[:], data)
		m := decodeMessage(&b)
		if m.event != b[0] {
			t.Fatalf("event %x of %x", m.event, b)
		}
		if m.event == eventFork {
			if m.a > math.MaxUint32 {
				t.Errorf("%x is no file", m.a)
			}
			return
		}
		sp := &space{missing: newMissing([]Run{{0x10000, 40, 3}, {1 << 40, 7, 50}, {maxAddress - 8*pageSize, 8, 60}})}
		if forked {
			sp.missing = sp.missing.clone()
		}
		before := sp.missing.pages
		err := sp.note(m)
		known := m.event == eventFault || m.event == eventRemap || m.event == eventRemove || m.event == eventUnmap
		if known != (err == nil) {
			t.Errorf("event %x: %v", m.event, err)
		}
		count := 0
		for key, c := range sp.missing.chunks {
			if c.set == 0 {
				t.Errorf("the chunk at %x is empty, and there", key<<chunkBits)
			}
			count += bits.OnesCount16(c.set)
		}
		if count != sp.missing.pages || count > before {
			t.Errorf("%d pages are missing, %d are counted, before %d", count, sp.missing.pages, before)
		}
	})
}
