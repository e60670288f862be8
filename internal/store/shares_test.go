package store

import (
	"slices"
	"testing"
	"testing/fstest"
)

func TestACheckpointSaysWhatItSharesWithTheOneBefore(t *testing.T) {
	both(t, func(t *testing.T, encrypted bool) {
		s, _ := made(t, encrypted)
		elsewhere, memory, archive := random(1, 4<<20), random(2, 8<<20), random(3, 1<<20)
		first := put(t, s, fstest.MapFS{pagesFile: {Data: elsewhere}}, "another pod", "images")
		if want := (Shares{Memory: Share{Bytes: 4 << 20}}); first.Shares == nil || *first.Shares != want {
			t.Errorf("the first says %+v, and not %+v", first.Shares, want)
		}
		second := put(t, s, fstest.MapFS{pagesFile: {Data: memory}, "v.tar": {Data: archive}}, "pod", "images")
		if want := (Shares{first.ID, Share{Bytes: 8 << 20}, Share{Bytes: 1 << 20}}); *second.Shares != want {
			t.Errorf("one that has nothing in common says %+v, and not %+v", second.Shares, want)
		}
		// Pages of both, zeros, new ones of which one comes twice, and a file that is no other's.
		const kept, common, news = 1500, 100, 300
		third := fstest.MapFS{
			pagesFile: {Data: slices.Concat(elsewhere[:common*pageSize], make([]byte, 7*pageSize), memory[:kept*pageSize],
				random(4, news*pageSize), random(4, pageSize))},
			"v.tar": {Data: archive}, "new.tar": {Data: random(5, 300_000)},
		}
		want := Shares{second.ID,
			Share{Bytes: (common + 7 + kept + news + 1) * pageSize, Zeros: 7 * pageSize, Present: (common + kept) * pageSize, Previous: kept * pageSize},
			Share{Bytes: 1<<20 + 300_000, Present: 1 << 20, Previous: 1 << 20}}
		c := put(t, s, third, "pod", "images")
		if *c.Shares != want {
			t.Errorf("the third says %+v, and not %+v", *c.Shares, want)
		}
		if told, err := s.Describe(t.Context(), c.ID); err != nil || told.Shares == nil || *told.Shares != want {
			t.Errorf("it is described as %+v, %v", told.Shares, err)
		}
		// The one before is the latest that is there still.
		must(t, s.Delete(t.Context(), c.ID))
		if again := put(t, s, third, "pod", "images"); again.Shares.Previous != second.ID || again.Shares.Memory.Previous != kept*pageSize {
			t.Errorf("without the third: %+v, and the second is %s", *again.Shares, second.ID)
		}
	})
}

// A pack of which the checkpoint before needs little is not used: nothing of it is shared.
func TestWhatIsWrittenAgainIsNotShared(t *testing.T) {
	s, m := made(t, false)
	memory := random(1, 8<<20)
	put(t, s, fstest.MapFS{pagesFile: {Data: memory}}, "pod")
	tenth := len(memory) / pageSize / 10
	put(t, s, fstest.MapFS{pagesFile: {Data: slices.Concat(memory[:tenth*pageSize], random(2, 8<<20))}}, "pod")
	for id := range m.objects { // so that only the second is looked at
		if len(id) > len(prefixHints) && id[:len(prefixHints)] == prefixHints {
			h, err := s.readHints(t.Context(), "pod")
			must(t, err)
			delete(m.objects, id)
			latest, err := ParseID(h.Checkpoints[0])
			must(t, err)
			must(t, s.hint(t.Context(), []string{"pod"}, latest))
		}
	}
	c := put(t, s, fstest.MapFS{pagesFile: {Data: memory[:tenth*pageSize]}}, "pod")
	if c.Shares.Memory.Present != 0 || c.NewBytes < int64(tenth)*pageSize {
		t.Errorf("of %d bytes %d were present, and the store grew by %d", tenth*pageSize, c.Shares.Memory.Present, c.NewBytes)
	}
}

func TestARootThatSharesMoreThanThereIsIsRefused(t *testing.T) {
	for _, r := range []rootShares{
		{Previous: "x"}, {Memory: Share{Zeros: 1}}, {Files: Share{Present: 1}}, {Files: Share{Bytes: 9, Present: 4, Previous: 5}}, {Memory: Share{Bytes: -1, Present: -1, Previous: -1}},
		{Memory: Share{Bytes: 9, Zeros: 5, Present: 5}}, {Memory: Share{Zeros: -1}},
	} {
		if r.check() == nil {
			t.Errorf("%+v was let through", r)
		}
	}
}
