package lazy

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"sync"
)

// maxOrder bounds how many blocks are kept that were asked for, 4 MiB for each 64: what
// a process touches first, not all that it does.
const maxOrder = 4096

// order is the order in which blocks are asked for. It is kept for the next restore of
// the same checkpoint, which streams these blocks first. Nothing depends on it: what it
// says are numbers of blocks, and those that are none are left out.
type order struct {
	file string
	last []blockID

	mu    sync.Mutex
	seen  map[blockID]bool
	asked []blockID
}

// readOrder reads what an earlier restore has left: pairs of little-endian u32, the file's
// number in the plan and the block's.
func readOrder(p *Plan) *order {
	o := &order{file: p.Order, seen: map[blockID]bool{}}
	if o.file == "" {
		return o
	}
	f, err := os.Open(o.file)
	if err != nil {
		return o
	}
	defer f.Close()
	buf := make([]byte, 8*maxOrder)
	n := 0
	for n < len(buf) {
		k, err := f.Read(buf[n:])
		if n += k; err != nil {
			break
		}
	}
	for buf = buf[:n]; len(buf) >= 8; buf = buf[8:] {
		id := blockID{int(binary.LittleEndian.Uint32(buf)), int(binary.LittleEndian.Uint32(buf[4:]))}
		if id.file < len(p.Processes) {
			o.last = append(o.last, id)
		}
	}
	return o
}

// take returns what an earlier restore asked for, once.
func (o *order) take() []blockID {
	last := o.last
	o.last = nil
	return last
}

// note takes note of a block that somebody waits for.
func (o *order) note(id blockID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.asked) < maxOrder && !o.seen[id] {
		o.seen[id] = true
		o.asked = append(o.asked, id)
	}
}

// write keeps it, after what the restore before asked for: those blocks were there
// before anybody could ask for them.
func (o *order) write(before []blockID) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.file == "" {
		return nil
	}
	var out []byte
	for _, id := range append(before, o.asked...) {
		if len(out) < 8*maxOrder {
			out = binary.LittleEndian.AppendUint32(out, uint32(id.file))
			out = binary.LittleEndian.AppendUint32(out, uint32(id.block))
		}
	}
	if err := os.MkdirAll(filepath.Dir(o.file), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(o.file), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(out)
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), o.file)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}
