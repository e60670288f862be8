package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// maxHints is how many checkpoints are remembered of what Alike names.
const maxHints = 8

// hints are the latest checkpoints of something, the newest first. They only help to
// find blocks: one that is lost, or written by two at a time, costs room.
type hints struct {
	Checkpoints []string `json:"checkpoints"`
}

// hintName does not tell, where the store is encrypted, what it is of.
func (s *Store) hintName(of string) string {
	return prefixHints + s.keys.id([]byte("hint\x00"+of)).String()
}

// alike are the latest checkpoints of these, those of the first before those of the next.
func (s *Store) alike(ctx context.Context, of []string) ([]ID, error) {
	var ids []ID
	for _, name := range of {
		h, err := s.readHints(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, text := range h.Checkpoints {
			if id, err := ParseID(text); err == nil && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

func (s *Store) readHints(ctx context.Context, of string) (hints, error) {
	var h hints
	err := s.readJSON(ctx, prefixHints, s.hintName(of), &h)
	if errors.Is(err, ErrMissing) || errors.Is(err, ErrCorrupt) {
		return hints{}, nil
	}
	h.Checkpoints = h.Checkpoints[:min(len(h.Checkpoints), maxHints)]
	return h, err
}

// hint puts a checkpoint first.
func (s *Store) hint(ctx context.Context, of []string, id ID) error {
	for _, name := range of {
		h, err := s.readHints(ctx, name)
		if err != nil {
			return err
		}
		h.Checkpoints = slices.Insert(slices.DeleteFunc(h.Checkpoints, func(other string) bool { return other == id.String() }), 0, id.String())
		h.Checkpoints = h.Checkpoints[:min(len(h.Checkpoints), maxHints)]
		data, err := json.Marshal(h)
		if err != nil {
			return err
		}
		object := s.hintName(name)
		if err := s.backend.Put(ctx, object, s.keys.sealObject(prefixHints, data), nil); err != nil {
			return fmt.Errorf("write %s: %w", object, err)
		}
	}
	return nil
}
