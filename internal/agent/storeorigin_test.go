package agent

import (
	"context"
	"errors"
	"os"
	"podstasis.dev/stasis/internal/pages"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	checkpointstore "podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// inStore has copies fetched from a store, and else from a node.
type inStore struct {
	node *fakeOrigin
	open openStores
	h    *harness
}

func (s *inStore) of(pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) (origin, error) {
	s.node.For(pod)
	return &storeOrigin{origin: s.node, live: s.h.client, open: s.open, in: *pcp.Status.Store, name: pcp.Name}, nil
}

// storeIt puts a checkpoint into a store, and returns where its objects are, and what
// opens it.
func (e *elsewhere) storeIt(t *testing.T) (backend.Backend, openStores) {
	t.Helper()
	b := backendtest.Memory()
	if err := checkpointstore.Create(t.Context(), b, nil); err != nil {
		t.Fatal(err)
	}
	s, err := checkpointstore.Open(t.Context(), b, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Put(t.Context(), os.DirFS(e.dir), checkpointstore.PutOptions{ManifestDigest: e.digest})
	if err != nil {
		t.Fatal(err)
	}
	e.pcp.Status.Store = &v1alpha1.StoredCheckpoint{Name: "s", StoreID: s.ID(), CheckpointID: c.ID.String()}
	return b, func(ctx context.Context, _ *v1alpha1.CheckpointStore, _ func(error)) (*checkpointstore.Store, func() error, error) {
		s, err := checkpointstore.Open(ctx, b, nil)
		return s, b.Close, err
	}
}

// damagePacks changes a bit in each pack.
func damagePacks(t *testing.T, b backend.Backend) {
	t.Helper()
	for o, err := range b.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		data, err := b.Read(t.Context(), o.Name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)/2] ^= 1
		if err := b.Put(t.Context(), o.Name, data, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestACheckpointComesFromItsStoreAndFromItsNodeWhereThatFails(t *testing.T) {
	away := errors.New("nobody answers")
	for name, test := range map[string]struct {
		store, node error
		damage      bool
		asked       int    // how often the store may be
		news        string // told of the fetch
		reason      string // of a refusal
		words       []string
	}{
		"the store has it": {news: "have come from CheckpointStore s: 3Mi in ", asked: 2, node: away},
		"the store is away": {store: away, asked: 1,
			news: "have come from node node-2: 3Mi in ", words: []string{"CheckpointStore s could not give them: nobody answers"}},
		"the store is damaged": {damage: true, asked: 2,
			news: "have come from node node-2: 3Mi in ", words: []string{"CheckpointStore s could not give them: ", "packs/"}},
		"neither is there": {store: away, node: away, asked: 1, reason: v1alpha1.EventCheckpointFetchFailed,
			words: []string{"neither from CheckpointStore s (nobody answers) nor from node node-2 (nobody answers)"}},
		"one is damaged, the other away": {damage: true, node: away, asked: 2, reason: v1alpha1.EventCheckpointDataCorrupt, words: []string{"packs/", "nor from node node-2 (nobody answers)"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newElsewhere(t, 3<<20)
			b, open := e.storeIt(t)
			if test.damage {
				damagePacks(t, b)
			}
			from := &fakeOrigin{dir: e.dir, open: func(context.Context, int, string, int64) error { return test.node }}
			c, h := newTestCopies(t, from, storeObject())
			asked := 0
			c.origins = &inStore{node: from, h: h, open: func(ctx context.Context, of *v1alpha1.CheckpointStore, waiting func(error)) (*checkpointstore.Store, func() error, error) {
				asked++
				if test.store != nil {
					return nil, nil, test.store
				}
				return open(ctx, of, waiting)
			}}
			said := ""
			c.tell = func(_ context.Context, _ podRef, message string) error {
				said = message
				return nil
			}
			dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
			if test.reason != "" {
				if reasonOf(err) != test.reason {
					t.Fatalf("got %v, want %s", err, test.reason)
				}
				said = err.Error()
			} else if err != nil {
				t.Fatal(err)
			} else {
				whole(t, dir, e)
			}
			for _, want := range append(test.words, test.news) {
				if !strings.Contains(said, want) {
					t.Errorf("said %q, and not %q", said, want)
				}
			}
			// The Pod waits: what has failed is not tried again and again.
			if asked > test.asked {
				t.Errorf("the store was opened %d times", asked)
			}
		})
	}
}
