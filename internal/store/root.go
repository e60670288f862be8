package store

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// Checkpoint is what a store says of a checkpoint that it holds.
type Checkpoint struct {
	ID      ID
	Created time.Time
	// Labels are the writer's: whose checkpoint it is.
	Labels map[string]string
	// ManifestDigest is of the checkpoint's manifest, as sha256:HEX.
	ManifestDigest string
	LogicalBytes   int64 // of its files
	// NewBytes is what the store grew by when it was written, with indexes and root.
	NewBytes int64
	Files    int
	Shares   *Shares // nil where it was written before that was counted
}

// root is a checkpoint's own object. It is small: what grows with the checkpoint is the
// list of files, which is kept as blocks itself.
type root struct {
	Format         int               `json:"format"`
	Created        time.Time         `json:"created"`
	Labels         map[string]string `json:"labels,omitempty"`
	ManifestDigest string            `json:"manifestDigest"`
	LogicalBytes   int64             `json:"logicalBytes"`
	NewBytes       int64             `json:"newBytes"` // without the root
	Files          int               `json:"files"`
	Packs          []byte            `json:"packs"` // their IDs, one after the other
	PackSizes      []int64           `json:"packSizes"`
	PackUsed       []int             `json:"packUsed"` // how many of a pack's blocks it consists of, with repetitions
	// Map are the extents of the encoded list of files, MapBytes its size.
	Map      [][3]int `json:"map"` // pack, first block, number of blocks
	MapBytes int64    `json:"mapBytes"`

	Shares *rootShares `json:"shares,omitempty"`
}

const (
	maxRootPacks = 1 << 20
	maxMapBytes  = 1 << 30
)

func (r *root) packs() []Pack {
	all := make([]Pack, len(r.PackSizes))
	for i := range all {
		all[i] = Pack{ID(r.Packs[i*len(ID{}):]), r.PackSizes[i]}
	}
	return all
}

func (r *root) mapFile() *file {
	f := &file{path: "its list of files", size: r.MapBytes}
	for _, e := range r.Map {
		f.extents = append(f.extents, extent{e[0], e[1], e[2]})
	}
	return f
}

func decodeRoot(data []byte) (*root, error) {
	var r root
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, err
	}
	if r.Format != FormatVersion {
		return nil, fmt.Errorf("it has format version %d, this Stasis reads version %d", r.Format, FormatVersion)
	}
	packs := len(r.PackSizes)
	if len(r.Packs) != packs*len(ID{}) || len(r.PackUsed) != packs || packs > maxRootPacks || r.MapBytes < 0 || r.MapBytes > maxMapBytes {
		return nil, errors.New("its list of packs or files has a wrong size")
	}
	for _, e := range r.Map {
		if e[0] < 0 || e[0] >= packs || e[1] < 0 || e[1] > maxPack || e[2] <= 0 || e[2] > maxExtent {
			return nil, errors.New("its list of files is nowhere")
		}
	}
	if r.Shares != nil {
		if err := r.Shares.check(); err != nil {
			return nil, err
		}
	}
	return &r, nil
}

// readRoot reads a checkpoint's root, which has to be what its ID says.
func (s *Store) readRoot(ctx context.Context, id ID) (*root, int64, error) {
	name := prefixRoots + id.String()
	object, err := s.backend.Read(ctx, name, 0, -1)
	if err != nil {
		return nil, 0, missing(name, err)
	}
	if ID(sha256.Sum256(object)) != id {
		return nil, 0, corrupt(name, "it has another digest than its name")
	}
	data, err := s.keys.openObject(prefixRoots, name, object)
	if err != nil {
		return nil, 0, err
	}
	r, err := decodeRoot(data)
	if err != nil {
		return nil, 0, corrupt(name, "%v", err)
	}
	return r, int64(len(object)), nil
}

func (r *root) describe(id ID, size int64) Checkpoint {
	return Checkpoint{
		ID: id, Created: r.Created, Labels: r.Labels, ManifestDigest: r.ManifestDigest,
		LogicalBytes: r.LogicalBytes, NewBytes: r.NewBytes + size, Files: r.Files, Shares: r.Shares.describe(),
	}
}

// Describe says what a checkpoint is.
func (s *Store) Describe(ctx context.Context, id ID) (Checkpoint, error) {
	r, size, err := s.readRoot(ctx, id)
	if err != nil {
		return Checkpoint{}, err
	}
	return r.describe(id, size), nil
}

// IDs lists all checkpoints.
func (s *Store) IDs(ctx context.Context) ([]ID, error) {
	var ids []ID
	for object, err := range s.named(ctx, prefixRoots) {
		if err != nil {
			return nil, err
		}
		ids = append(ids, object.ID)
	}
	return ids, nil
}

// Bytes is what all checkpoints take together, as the backend counts it: with what was
// deleted and not collected yet.
func (s *Store) Bytes(ctx context.Context) (int64, error) {
	var sum int64
	for _, prefix := range []string{prefixPacks, prefixRoots} {
		for object, err := range s.backend.List(ctx, prefix) {
			if err != nil {
				return 0, fmt.Errorf("list %s: %w", prefix, err)
			}
			sum += object.Size
		}
	}
	return sum, nil
}

// Packs are those that a checkpoint uses.
func (s *Store) Packs(ctx context.Context, id ID) ([]Pack, error) {
	r, _, err := s.readRoot(ctx, id)
	if err != nil {
		return nil, err
	}
	return r.packs(), nil
}

// named goes through the objects with a prefix, which are named by IDs. It ends after the
// first error.
func (s *Store) named(ctx context.Context, prefix string) iter.Seq2[Pack, error] {
	return func(yield func(Pack, error) bool) {
		for object, err := range s.backend.List(ctx, prefix) {
			if err != nil {
				yield(Pack{}, fmt.Errorf("list %s: %w", prefix, err))
				return
			}
			id, err := ParseID(object.Name[len(prefix):])
			if err != nil {
				yield(Pack{}, corrupt(object.Name, "its name is none of such an object: %v", err))
				return
			}
			if !yield(Pack{id, object.Size}, nil) {
				return
			}
		}
	}
}

// List describes all checkpoints. One that goes meanwhile is left out.
func (s *Store) List(ctx context.Context) ([]Checkpoint, error) {
	ids, err := s.IDs(ctx)
	if err != nil {
		return nil, err
	}
	var all []Checkpoint
	for _, id := range ids {
		c, err := s.Describe(ctx, id)
		if errors.Is(err, ErrMissing) {
			continue
		} else if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

// Delete removes a checkpoint. Its blocks stay until a collection finds that nothing
// else uses them. One that is not there is no error.
func (s *Store) Delete(ctx context.Context, id ID) error {
	name := prefixRoots + id.String()
	if err := s.backend.Delete(ctx, name); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}
