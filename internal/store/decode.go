package store

import (
	"encoding/binary"
	"errors"
	"math"
)

var errShort = errors.New("it ends too early, or says too much")

// decoder takes numbers and bytes off a slice. After the first that is not there it
// gives zeros and has failed.
type decoder struct{ data []byte }

var ended = []byte{}

func newDecoder(data []byte) *decoder {
	d := &decoder{data}
	d.advance(0)
	return d
}

func (d *decoder) fail()        { d.data = nil }
func (d *decoder) failed() bool { return d.data == nil }

func (d *decoder) uvarint() uint64 {
	n, size := binary.Uvarint(d.data)
	if size <= 0 {
		d.fail()
		return 0
	}
	d.advance(size)
	return n
}

func (d *decoder) advance(size int) {
	if d.data = d.data[size:]; len(d.data) == 0 {
		d.data = ended // at the end, and not failed
	}
}

// count is a number of things, at most most.
func (d *decoder) count(most int) int {
	n := d.uvarint()
	if n > uint64(most) || n > math.MaxInt32 {
		d.fail()
		return 0
	}
	return int(n)
}

func (d *decoder) byte() byte {
	if len(d.data) == 0 {
		d.fail()
		return 0
	}
	b := d.data[0]
	d.advance(1)
	return b
}

// bytes always gives size bytes.
func (d *decoder) bytes(size int) []byte {
	if len(d.data) < size {
		d.fail()
		return make([]byte, size)
	}
	b := d.data[:size]
	d.advance(size)
	return b
}
