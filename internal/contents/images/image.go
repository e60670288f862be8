// Package images reads the images of CRIU: a magic number, then protocol buffers,
// each after its length. The images may come from anywhere; what is read of them all
// is bounded, and no more than one entry is held at a time.
//
// The messages are those that go-criu generates. Its decoder is not used: it wants
// files with names, holds whole images and allocates what a length field says. The
// two messages that can be large, core and mm, are taken apart field by field.
package images

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"google.golang.org/protobuf/proto"
)

var (
	// ErrFormat says that a file is not what CRIU writes.
	ErrFormat = errors.New("not a CRIU image")
	// ErrTooMuch says that more is there than is read.
	ErrTooMuch = errors.New("larger than what is read")
)

// Magic is the number that the second four bytes of an image are.
type Magic uint32

// Kinds of images, as criu/include/magic.h numbers them.
const (
	PSTree      Magic = 0x50273030
	Core        Magic = 0x55053847
	IDs         Magic = 0x54432030
	MM          Magic = 0x57492820
	Pagemap     Magic = 0x56084025
	FDInfo      Magic = 0x56213732
	Files       Magic = 0x56303138
	FS          Magic = 0x51403912
	Mounts      Magic = 0x55563928
	MemfdInodes Magic = 0x48453499
	Remaps      Magic = 0x59133954
	TCPStream   Magic = 0x51465506
	IPCNSShm    Magic = 0x46283044
	IPCNSMsg    Magic = 0x55453737
	IPCNSSem    Magic = 0x59573019
)

// Common is how every image of those kinds begins.
const Common = 0x54564319

// maxEntry bounds one entry. The largest, mm, holds up to 65530 mappings of some 60 bytes.
const maxEntry = 8 << 20

// maxMessage bounds what is decoded as a whole. The largest are lists of numbers:
// 65536 groups, the threads of a process.
const maxMessage = 1 << 20

// entryCost is what an entry counts besides its bytes, so that many that are empty do
// not take for ever.
const entryCost = 64

// Source is a directory of images. It is used by one goroutine.
type Source struct {
	fsys fs.FS
	left int64 // bytes that may still be read
}

// New reads at most limit bytes of all images in fsys together, each entry counting 64
// more than it has.
func New(fsys fs.FS, limit int64) *Source { return &Source{fsys: fsys, left: limit} }

// Left is how many bytes may still be read.
func (s *Source) Left() int64 { return s.left }

// Entries calls each with every entry of an image, which holds until it returns.
func (s *Source) Entries(ctx context.Context, name string, magic Magic, each func(entry []byte) error) (err error) {
	f, err := s.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
	}()
	r := bufio.NewReaderSize(f, 32<<10)
	var head [8]byte
	if err := s.full(r, head[:]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(head[:4]) != Common || Magic(binary.LittleEndian.Uint32(head[4:])) != magic {
		return fmt.Errorf("%w: it begins with %x", ErrFormat, head)
	}
	var buf []byte
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := r.Peek(1); err == io.EOF {
			return nil
		}
		s.left -= entryCost
		if err := s.full(r, head[:4]); err != nil {
			return err
		}
		size := int64(binary.LittleEndian.Uint32(head[:4]))
		if size > maxEntry {
			return fmt.Errorf("%w: an entry of %d bytes", ErrTooMuch, size)
		}
		if buf, err = s.entry(r, buf, size); err != nil {
			return err
		}
		if err := each(buf); err != nil {
			return err
		}
	}
}

// errFirst ends the reading of an image of which the first entry is wanted.
var errFirst = errors.New("the first entry has been read")

// First calls each with the first entry of an image. What is behind it may be no
// entry: of a TCP stream it is the contents of its queues.
func (s *Source) First(ctx context.Context, name string, magic Magic, each func(entry []byte) error) error {
	err := s.Entries(ctx, name, magic, func(entry []byte) error {
		if err := each(entry); err != nil {
			return err
		}
		return errFirst
	})
	if errors.Is(err, errFirst) {
		return nil
	}
	return err
}

// entry reads size bytes, and allocates no more than are there.
func (s *Source) entry(r io.Reader, buf []byte, size int64) ([]byte, error) {
	if int64(cap(buf)) >= size {
		buf = buf[:size]
		return buf, s.full(r, buf)
	}
	const step = 256 << 10
	buf = buf[:0]
	for int64(len(buf)) < size {
		n := min(size-int64(len(buf)), step)
		buf = append(buf, make([]byte, n)...)
		if err := s.full(r, buf[int64(len(buf))-n:]); err != nil {
			return nil, err
		}
	}
	return buf, nil
}

func (s *Source) full(r io.Reader, p []byte) error {
	if s.left -= int64(len(p)); s.left < 0 {
		s.left = 0
		return fmt.Errorf("%w of all images", ErrTooMuch)
	}
	if _, err := io.ReadFull(r, p); err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: it ends too early", ErrFormat)
	} else if err != nil {
		return err
	}
	return nil
}

// open opens a regular file.
func (s *Source) open(name string) (fs.File, error) {
	f, err := s.fsys.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w: not a regular file", name, ErrFormat)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Messages calls each with every entry of an image as a message, which holds until
// it returns.
func Messages[T any, P interface {
	*T
	proto.Message
}](ctx context.Context, s *Source, name string, magic Magic, each func(P) error) error {
	return s.Entries(ctx, name, magic, func(entry []byte) error {
		m := P(new(T))
		if err := Decode(entry, m); err != nil {
			return err
		}
		return each(m)
	})
}

// Decode decodes a message. Fields that are missing have their zero value.
func Decode(b []byte, m proto.Message) error {
	if len(b) > maxMessage {
		return fmt.Errorf("%w: a message of %d bytes", ErrTooMuch, len(b))
	}
	if err := (proto.UnmarshalOptions{AllowPartial: true, DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return fmt.Errorf("%w: %s", ErrFormat, err)
	}
	return nil
}
