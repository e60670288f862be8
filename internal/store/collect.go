package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// What makes it safe to remove packs while others write:
//
//   - A writer shows its lease first, then lists what is condemned, and uses no pack of
//     these. What it uses it has found in the store after that.
//   - The collector condemns a pack that no root uses, and notes then which writers are
//     alive. Later, when all of these have ended, it lists the writers once more, reads all
//     roots, and removes the pack only if still none uses it.
//
// So a pack that a writer found is condemned after its lease was shown, if at all, and
// stays until the writer's root is there. No clock takes part but for the lease of a
// writer that died (lease.go). Roots are written last and removed first: a root that is
// there has all its packs.
//
// A mark stays as long as its pack, also when a root uses the pack after all. Taken back,
// it could be by a collector that knows of a root that is gone again, while another is
// about to remove the pack by that mark: a writer in between would find it. Such a pack
// is not used by further checkpoints, and goes with those that do.

// condemnation says that a pack was seen without use.
type condemnation struct {
	At time.Time `json:"at"`
	// Writers are the leases that were shown at a time when the pack had been condemned
	// already; Noted that they have been listed.
	Writers []string `json:"writers,omitempty"`
	Noted   bool     `json:"noted"`
}

// Collection is what a collection found and did.
type Collection struct {
	Checkpoints int
	Packs       int   // that are there, with those removed
	Bytes       int64 // of all packs
	Writers     int   // that are alive
	// Condemned were seen without use, now or before, and stay for now.
	Condemned      int
	CondemnedBytes int64
	Removed        int
	RemovedBytes   int64
}

// CollectOptions say how a collection goes.
type CollectOptions struct {
	// DryRun finds and changes nothing.
	DryRun bool
	// Grace is how long a pack stays condemned at least. It is not needed for what is
	// said above; whoever deletes a checkpoint by mistake has it to notice.
	Grace time.Duration
	// Pause is made between two requests that remove something, to leave the store to
	// others.
	Pause time.Duration
}

// Collect removes what no checkpoint uses: packs in their second collection, when all
// who wrote in the first have ended. Two at a time do no harm.
func (s *Store) Collect(ctx context.Context, o CollectOptions) (Collection, error) {
	var c Collection
	writers, err := s.writing(ctx)
	if err != nil {
		return c, err
	}
	c.Writers = len(writers)
	before, err := s.condemnations(ctx)
	if err != nil {
		return c, err
	}
	// Packs before roots: what is written meanwhile is not in the list, or used.
	packs, err := s.packSizes(ctx)
	if err != nil {
		return c, err
	}
	used, roots, err := s.used(ctx)
	if err != nil {
		return c, err
	}
	c.Checkpoints, c.Packs = roots, len(packs)
	var condemn []ID
	for _, id := range slices.SortedFunc(maps.Keys(packs), compareIDs) {
		size := packs[id]
		c.Bytes += size
		mark, marked := before[id]
		switch {
		case used[id]:
			if marked && mark.Noted && !o.DryRun {
				if err := s.mark(ctx, id, condemnation{At: s.now().UTC()}); err != nil { // its grace begins anew
					return c, err
				}
			}
			continue
		case !marked || !mark.Noted || mark.At.IsZero():
			condemn = append(condemn, id)
		case s.now().Sub(mark.At) >= o.Grace && !slices.ContainsFunc(mark.Writers, func(w string) bool { return writers[w] }):
			if err := s.removePack(ctx, id, o); err != nil {
				return c, err
			}
			c.Removed++
			c.RemovedBytes += size
			continue
		}
		c.Condemned++
		c.CondemnedBytes += size
	}
	if o.DryRun {
		return c, nil
	}
	for id := range before {
		if _, there := packs[id]; !there {
			if err := s.unmark(ctx, id); err != nil { // it was removed, and its mark not
				return c, err
			}
		}
	}
	if err := s.condemn(ctx, condemn); err != nil {
		return c, err
	}
	return c, s.forgetHints(ctx)
}

func compareIDs(a, b ID) int { return slices.Compare(a[:], b[:]) }

func (s *Store) removePack(ctx context.Context, id ID, o CollectOptions) error {
	if o.DryRun {
		return nil
	}
	name := prefixPacks + id.String()
	if err := s.backend.Delete(ctx, name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if err := s.unmark(ctx, id); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(o.Pause):
		return nil
	}
}

// condemn marks packs, and then again with the writers that were alive when the marks
// had been made.
func (s *Store) condemn(ctx context.Context, packs []ID) error {
	if len(packs) == 0 {
		return nil
	}
	mark := condemnation{At: s.now().UTC()}
	for range 2 {
		for _, id := range packs {
			if err := s.mark(ctx, id, mark); err != nil {
				return err
			}
		}
		if mark.Noted {
			break
		}
		writers, err := s.writing(ctx)
		if err != nil {
			return err
		}
		mark.Writers, mark.Noted = slices.Sorted(maps.Keys(writers)), true
	}
	return nil
}

func (s *Store) mark(ctx context.Context, id ID, mark condemnation) error {
	data, err := json.Marshal(mark)
	if err != nil {
		return err
	}
	name := prefixCondemned + id.String()
	if err := s.backend.Put(ctx, name, s.keys.sealObject(prefixCondemned, data), nil); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// unmark takes back the mark of a pack that is not there any more.
func (s *Store) unmark(ctx context.Context, id ID) error {
	name := prefixCondemned + id.String()
	if err := s.backend.Delete(ctx, name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// condemned lists the packs that nobody may begin to use.
func (s *Store) condemned(ctx context.Context) (map[ID]bool, error) {
	ids := map[ID]bool{}
	for object, err := range s.named(ctx, prefixCondemned) {
		if err != nil {
			return nil, err
		}
		ids[object.ID] = true
	}
	return ids, nil
}

func (s *Store) condemnations(ctx context.Context) (map[ID]condemnation, error) {
	ids, err := s.condemned(ctx)
	if err != nil {
		return nil, err
	}
	marks := map[ID]condemnation{}
	for id := range ids {
		var mark condemnation
		err := s.readJSON(ctx, prefixCondemned, prefixCondemned+id.String(), &mark)
		switch {
		case errors.Is(err, ErrMissing): // another collector was faster
		case errors.Is(err, ErrCorrupt):
			marks[id] = condemnation{} // it is made again
		case err != nil:
			return nil, err
		default:
			marks[id] = mark
		}
	}
	return marks, nil
}

// packSizes lists all packs and their sizes.
func (s *Store) packSizes(ctx context.Context) (map[ID]int64, error) {
	packs := map[ID]int64{}
	for of, err := range s.named(ctx, prefixPacks) {
		if err != nil {
			return nil, err
		}
		packs[of.ID] = of.Size
	}
	return packs, nil
}

// used lists the packs that any root uses. A root that cannot be read ends the
// collection: nobody knows what it uses.
func (s *Store) used(ctx context.Context) (map[ID]bool, int, error) {
	ids, err := s.IDs(ctx)
	if err != nil {
		return nil, 0, err
	}
	used := map[ID]bool{}
	for _, id := range ids {
		r, _, err := s.readRoot(ctx, id)
		if errors.Is(err, ErrMissing) {
			continue // it was deleted meanwhile
		} else if err != nil {
			return nil, 0, fmt.Errorf("nothing is collected while a checkpoint cannot be read; delete it, or mend it: %w", err)
		}
		for _, of := range r.packs() {
			used[of.ID] = true
		}
	}
	return used, len(ids), nil
}

// forgetHints removes hints that name nothing that is there.
func (s *Store) forgetHints(ctx context.Context) error {
	ids, err := s.IDs(ctx)
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, id := range ids {
		there[id.String()] = true
	}
	for object, err := range s.backend.List(ctx, prefixHints) {
		if err != nil {
			return fmt.Errorf("list hints: %w", err)
		}
		var h hints
		err := s.readJSON(ctx, prefixHints, object.Name, &h)
		if errors.Is(err, ErrMissing) {
			continue
		} else if err != nil && !errors.Is(err, ErrCorrupt) {
			return err
		}
		if slices.ContainsFunc(h.Checkpoints, func(id string) bool { return there[id] }) {
			continue
		}
		if err := s.backend.Delete(ctx, object.Name); err != nil {
			return fmt.Errorf("delete %s: %w", object.Name, err)
		}
	}
	return nil
}
