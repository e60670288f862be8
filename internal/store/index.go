package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"

	"podstasis.dev/stasis/internal/store/backend"
)

// Pack is an object that holds blocks.
type Pack struct {
	ID   ID
	Size int64 // of the object, in bytes
}

func (p Pack) name() string { return prefixPacks + p.ID.String() }

// indexTail is what is read of a pack's end at first: the index of most packs is smaller.
const indexTail = 256 << 10

// readIndex reads the index of a pack.
func (s *Store) readIndex(ctx context.Context, of Pack) (*packIndex, error) {
	if of.Size < int64(trailerSize) || of.Size > maxPack+maxPackIndex {
		return nil, corrupt(of.name(), "it is of %d bytes, and cannot be a pack", of.Size)
	}
	for tail := min(indexTail, of.Size); ; {
		data, err := s.readPart(ctx, of.name(), of.Size-tail, tail)
		if err != nil {
			return nil, err
		}
		p, err := openIndex(s.keys, of, data)
		short, ok := err.(*shortTail)
		if !ok {
			return p, err
		}
		if int64(short.need) > of.Size {
			return nil, corrupt(of.name(), "it is of %d bytes and says that its index is of more", of.Size)
		}
		tail = int64(short.need)
	}
}

// readPart reads length bytes of an object that has to be so long.
func (s *Store) readPart(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	data, err := s.backend.Read(ctx, name, offset, length)
	if errors.Is(err, backend.ErrInvalid) {
		return nil, corrupt(name, "it is shorter than it was")
	} else if err != nil {
		return nil, missing(name, err)
	}
	if int64(len(data)) != length {
		return nil, fmt.Errorf("read %s: %d bytes came, and %d were asked for", name, len(data), length)
	}
	return data, nil
}

// maxIndexed bounds the indexes that are kept, by their blocks, each some 40 bytes.
const maxIndexed = 1 << 18

// indexes keeps what was read of late.
type indexes struct {
	s *Store

	mu     sync.Mutex
	order  list.List // of *packIndex, the latest first
	of     map[ID]*list.Element
	blocks int
}

func newIndexes(s *Store) *indexes { return &indexes{s: s, of: map[ID]*list.Element{}} }

func (x *indexes) read(ctx context.Context, of Pack) (*packIndex, error) {
	x.mu.Lock()
	if e := x.of[of.ID]; e != nil {
		x.order.MoveToFront(e)
		x.mu.Unlock()
		return e.Value.(*packIndex), nil
	}
	x.mu.Unlock()
	p, err := x.s.readIndex(ctx, of)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.of[of.ID] == nil {
		x.of[of.ID] = x.order.PushFront(p)
		x.blocks += len(p.ids)
	}
	for x.blocks > maxIndexed && x.order.Len() > 1 {
		last := x.order.Remove(x.order.Back()).(*packIndex)
		delete(x.of, last.id)
		x.blocks -= len(last.ids)
	}
	return p, nil
}
