package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// A pack is: frames, one after the other; the index; the trailer. The index lists frames
// and blocks in order. The trailer is the salt, the size of the index and a magic number.
// The pack's ID is the digest of index and trailer; the frames are checked by the IDs of
// their blocks, or by their tags where the store is encrypted.

const (
	packMagic   = "STASPAK1"
	trailerSize = saltSize + 4 + len(packMagic)
	// partIndex is the number of the index, as a sealed part; frames have theirs from 0 on.
	partIndex = 1 << 63
)

// Flags of a frame.
const (
	frameZstd  = 1 << iota // else its bytes are the blocks'
	framePages             // all its blocks have the size of a page
	frameFlags = 1<<iota - 1
)

// frame is a part of a pack.
type frame struct {
	flags  byte
	stored int // bytes in the pack
	offset int64
	first  int // its first block's number in the pack
	sizes  []int
}

// size is the frame's blocks' together, in bytes.
func (f *frame) size() int {
	sum := 0
	for _, n := range f.sizes {
		sum += n
	}
	return sum
}

// packIndex is what a pack says of its blocks.
type packIndex struct {
	id     ID
	salt   []byte
	sealer *sealer
	frames []frame
	ids    []ID // of its blocks, by their number
}

func (p *packIndex) name() string { return prefixPacks + p.id.String() }

// sizes of the pack's blocks, by their number.
func (p *packIndex) sizes() []int {
	var all []int
	for i := range p.frames {
		all = append(all, p.frames[i].sizes...)
	}
	return all
}

// packBuilder makes a pack in memory.
type packBuilder struct {
	index packIndex
	data  []byte
}

func newPackBuilder(k *keys, buffer []byte) *packBuilder {
	salt := randomSalt()
	return &packBuilder{index: packIndex{salt: salt, sealer: k.sealer(salt, "pack")}, data: buffer[:0]}
}

// add appends a frame, encoded but not sealed, of the blocks of these sizes and IDs. It
// returns the first block's number.
func (p *packBuilder) add(flags byte, encoded []byte, sizes []int, ids []ID) int {
	first, offset := len(p.index.ids), len(p.data)
	p.data = p.index.sealer.seal(p.data, uint64(len(p.index.frames)), encoded)
	p.index.frames = append(p.index.frames, frame{flags: flags, stored: len(p.data) - offset, offset: int64(offset), first: first, sizes: sizes})
	p.index.ids = append(p.index.ids, ids...)
	return first
}

// finish appends the index and returns the whole pack.
func (p *packBuilder) finish() []byte {
	offset := len(p.data)
	p.data = p.index.sealer.seal(p.data, partIndex, p.index.encode())
	size := len(p.data) - offset
	p.data = append(p.data, p.index.salt...)
	p.data = binary.BigEndian.AppendUint32(p.data, uint32(size))
	p.data = append(p.data, packMagic...)
	p.index.id = sha256.Sum256(p.data[offset:])
	return p.data
}

func (p *packIndex) encode() []byte {
	out := binary.AppendUvarint(nil, uint64(len(p.frames)))
	for i := range p.frames {
		f := &p.frames[i]
		out = append(out, f.flags)
		out = binary.AppendUvarint(out, uint64(f.stored))
		out = binary.AppendUvarint(out, uint64(len(f.sizes)))
		for j, size := range f.sizes {
			if f.flags&framePages == 0 {
				out = binary.AppendUvarint(out, uint64(size))
			}
			out = append(out, p.ids[f.first+j][:]...)
		}
	}
	return out
}

// decodeIndex reads an index; size is that of all its frames.
func decodeIndex(data []byte, size int64) (*packIndex, error) {
	d := newDecoder(data)
	p := &packIndex{}
	frames := d.count(maxPack)
	for range frames {
		f := frame{flags: d.byte(), stored: d.count(maxFrame + maxFrame/8), offset: 0, first: len(p.ids)}
		if f.flags&^byte(frameFlags) != 0 {
			return nil, fmt.Errorf("a frame has the unknown flags %x", f.flags)
		}
		blocks := d.count(maxFrame)
		if blocks == 0 || blocks > len(d.data)/len(ID{}) {
			return nil, errShort
		}
		f.sizes = make([]int, blocks)
		sum := 0
		for j := range f.sizes {
			f.sizes[j] = pageSize
			if f.flags&framePages == 0 {
				f.sizes[j] = d.count(maxBlock)
			}
			if f.sizes[j] == 0 {
				return nil, fmt.Errorf("a block is empty")
			}
			sum += f.sizes[j]
			p.ids = append(p.ids, ID(d.bytes(len(ID{}))))
		}
		if d.failed() || sum > maxFrame {
			return nil, errShort
		}
		if n := len(p.frames); n > 0 {
			f.offset = p.frames[n-1].offset + int64(p.frames[n-1].stored)
		}
		p.frames = append(p.frames, f)
	}
	if d.failed() || len(d.data) > 0 {
		return nil, errShort
	}
	end := int64(0)
	if n := len(p.frames); n > 0 {
		end = p.frames[n-1].offset + int64(p.frames[n-1].stored)
	}
	if end != size {
		return nil, fmt.Errorf("its frames are %d bytes, and %d were expected", end, size)
	}
	return p, nil
}

// openIndex reads the index of a pack from the pack's last bytes.
func openIndex(k *keys, of Pack, tail []byte) (*packIndex, error) {
	name := of.name()
	if len(tail) < trailerSize {
		return nil, corrupt(name, "it is of %d bytes, and cannot be a pack", len(tail))
	}
	trailer := tail[len(tail)-trailerSize:]
	if string(trailer[saltSize+4:]) != packMagic {
		return nil, corrupt(name, "it does not end as a pack does")
	}
	stored := int(binary.BigEndian.Uint32(trailer[saltSize:]))
	if stored > maxPackIndex {
		return nil, corrupt(name, "it says that its index is of %d bytes, more than %d", stored, maxPackIndex)
	}
	if stored+trailerSize > len(tail) {
		return nil, &shortTail{stored + trailerSize}
	}
	if ID(sha256.Sum256(tail[len(tail)-trailerSize-stored:])) != of.ID {
		return nil, corrupt(name, "its index has another digest than its name")
	}
	salt := bytes.Clone(trailer[:saltSize])
	sealer := k.sealer(salt, "pack")
	data, err := sealer.open(partIndex, tail[len(tail)-trailerSize-stored:len(tail)-trailerSize])
	if err != nil {
		return nil, corrupt(name, "its index was not sealed with this store's key, or was changed")
	}
	p, err := decodeIndex(data, of.Size-int64(stored+trailerSize))
	if err != nil {
		return nil, corrupt(name, "its index: %v", err)
	}
	p.id, p.salt, p.sealer = of.ID, salt, sealer
	return p, nil
}

// shortTail says how many bytes of a pack's end are needed.
type shortTail struct{ need int }

func (e *shortTail) Error() string { return fmt.Sprintf("%d bytes are needed", e.need) }

// blocksOf decodes a frame: its blocks' bytes, one after the other, checked.
func (s *Store) blocksOf(p *packIndex, number int, stored, buffer []byte) ([]byte, error) {
	f := &p.frames[number]
	encoded, err := p.sealer.open(uint64(number), stored)
	if err != nil {
		return nil, corrupt(p.name(), "frame %d was changed", number)
	}
	raw := encoded
	if f.flags&frameZstd != 0 {
		if raw, err = s.codec.decode(encoded, buffer, f.size()); err != nil {
			return nil, corrupt(p.name(), "frame %d: %v", number, err)
		}
	}
	if len(raw) != f.size() {
		return nil, corrupt(p.name(), "frame %d is of %d bytes, and %d were expected", number, len(raw), f.size())
	}
	if s.keys == nil { // else the tag says it
		rest := raw
		for i, size := range f.sizes {
			if s.keys.id(rest[:size]) != p.ids[f.first+i] {
				return nil, corrupt(p.name(), "block %d, in frame %d, was changed", f.first+i, number)
			}
			rest = rest[size:]
		}
	}
	return raw, nil
}
