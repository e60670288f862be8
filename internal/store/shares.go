package store

import (
	"context"
	"errors"
)

// Shares say what of a checkpoint its store had when it was written.
type Shares struct {
	// Previous is the checkpoint that it was compared with: the latest of what Alike names
	// first that there was one of. It may have been deleted since. The zero value: none.
	Previous ID
	Memory   Share // of files that hold captured pages
	Files    Share // of all others
}

// Share is of the bytes of some files.
type Share struct {
	Bytes int64 `json:"bytes"` // all
	Zeros int64 `json:"zeros"` // in blocks of zeros, which take nothing
	// Present were in the store, and were not written again. What an interrupted attempt of
	// the same checkpoint wrote was not; of what comes twice in it, the second is neither
	// present nor written.
	Present int64 `json:"present"`
	// Previous are those of Present that are kept once for both: the previous checkpoint
	// consists of these blocks, too.
	Previous int64 `json:"previous"`
}

func (s Share) check() error {
	if s.Zeros < 0 || s.Previous < 0 || s.Present < s.Previous || s.Bytes < s.Present || s.Bytes-s.Present < s.Zeros {
		return errors.New("what it shares is more than there is")
	}
	return nil
}

// rootShares is how a root says it.
type rootShares struct {
	Previous string `json:"previous,omitempty"`
	Memory   Share  `json:"memory"`
	Files    Share  `json:"files"`
}

func (r *rootShares) check() error {
	if r.Previous != "" {
		if _, err := ParseID(r.Previous); err != nil {
			return err
		}
	}
	return errors.Join(r.Memory.check(), r.Files.check())
}

func (r *rootShares) describe() *Shares {
	if r == nil {
		return nil
	}
	s := &Shares{Memory: r.Memory, Files: r.Files}
	s.Previous, _ = ParseID(r.Previous) // checked, or empty
	return s
}

// maxPackBlocks bounds the number of a block: an index has no room for more.
const maxPackBlocks = maxPackIndex / len(ID{})

// blockSet are blocks of a pack, by their numbers: a bit each.
type blockSet []uint64

func (b blockSet) has(n int) bool { return n/64 < len(b) && b[n/64]&(1<<(n%64)) != 0 }

func (b blockSet) add(first, count int) blockSet {
	if need := (first+count+63)/64 - len(b); need > 0 {
		b = append(b, make(blockSet, need)...)
	}
	for n := first; n < first+count; n++ {
		b[n/64] |= 1 << (n % 64)
	}
	return b
}

// consists are the blocks that the files of a checkpoint consist of, by their packs.
func (s *Store) consists(ctx context.Context, r *root) (map[ID]blockSet, error) {
	files, err := s.files(ctx, newIndexes(s), r)
	if err != nil {
		return nil, err
	}
	packs := r.packs()
	of := map[ID]blockSet{}
	for i := range files {
		for _, e := range files[i].extents {
			if e.pack < 0 {
				continue
			}
			if e.first+e.count > maxPackBlocks {
				return nil, corrupt(packs[e.pack].name(), "it cannot have a block %d", e.first+e.count-1)
			}
			id := packs[e.pack].ID
			of[id] = of[id].add(e.first, e.count)
		}
		files[i].extents = nil
	}
	return of, nil
}
