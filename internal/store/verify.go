package store

import (
	"context"
	"errors"
)

// Verification is what a verification found.
type Verification struct {
	Checkpoints int
	Packs       int
	Bytes       int64 // that were read and found right
	// Problems name what is corrupt or missing. Each belongs to a checkpoint that cannot
	// be restored.
	Problems []Problem
}

// Problem is a fault of a checkpoint in the store.
type Problem struct {
	Checkpoint ID
	Err        error
}

// Verify reads all that these checkpoints, or all if none is named, consist of, each
// pack once. It returns an error only if it could not go on; faults are in what it
// returns. progress is told how many bytes have been read; it may be nil.
func (s *Store) Verify(ctx context.Context, ids []ID, progress func(int64)) (Verification, error) {
	var v Verification
	if len(ids) == 0 {
		var err error
		if ids, err = s.IDs(ctx); err != nil {
			return v, err
		}
	}
	packs := map[ID]error{} // what was found
	for _, id := range ids {
		v.Checkpoints++
		found, err := s.verify(ctx, id, packs, &v, progress)
		if err != nil {
			return v, err
		}
		for _, problem := range found {
			v.Problems = append(v.Problems, Problem{id, problem})
		}
	}
	return v, nil
}

// fault says whether an error is about the data, and not about reaching them.
func fault(err error) bool { return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrMissing) }

func (s *Store) verify(ctx context.Context, id ID, packs map[ID]error, v *Verification, progress func(int64)) (found []error, err error) {
	r, size, err := s.readRoot(ctx, id)
	if fault(err) {
		return []error{err}, nil
	} else if err != nil {
		return nil, err
	}
	v.Bytes += size
	for _, of := range r.packs() {
		known, ok := packs[of.ID]
		if !ok {
			known = s.verifyPack(ctx, of)
			if known != nil && !fault(known) {
				return nil, known
			}
			packs[of.ID] = known
			v.Packs++
			if known == nil {
				v.Bytes += of.Size
			}
			if progress != nil {
				progress(v.Bytes)
			}
		}
		if known != nil {
			found = append(found, known)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	files, err := s.files(ctx, newIndexes(s), r)
	if err == nil {
		_, err = (&getter{s: s, indexes: newIndexes(s), packs: r.packs()}).plan(ctx, files)
	}
	if fault(err) {
		return []error{err}, nil
	}
	return nil, err
}

func (s *Store) verifyPack(ctx context.Context, of Pack) error {
	p, err := s.readIndex(ctx, of)
	if err != nil {
		return err
	}
	numbers := make([]int, len(p.frames))
	for i := range numbers {
		numbers[i] = i
	}
	return s.read(ctx, p, numbers, func(f *frame, raw []byte) error {
		if s.keys == nil {
			return nil // blocksOf has
		}
		for i, size := range f.sizes {
			if s.keys.id(raw[:size]) != p.ids[f.first+i] {
				return corrupt(p.name(), "block %d has another ID than its index says", f.first+i)
			}
			raw = raw[size:]
		}
		return nil
	})
}
