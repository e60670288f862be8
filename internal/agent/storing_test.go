package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	checkpointstore "podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// storedPCP asks for a checkpoint that is kept in the store s.
func storedPCP() *v1alpha1.PodCheckpoint {
	pcp := makePCP()
	pcp.Spec.StoreName = "s"
	return pcp
}

func storeObject() *v1alpha1.CheckpointStore {
	return &v1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "s", UID: "store-uid"},
		Status: v1alpha1.CheckpointStoreStatus{ClusterID: "cluster-uid"}}
}

// memoryStore makes a store that the harness opens, as long as it is up.
func (h *harness) memoryStore() (up *atomic.Bool) {
	h.Helper()
	b := backendtest.Memory()
	if err := checkpointstore.Create(h.Context(), b, nil); err != nil {
		h.Fatal(err)
	}
	up = &atomic.Bool{}
	up.Store(true)
	h.opens = func(ctx context.Context, of *v1alpha1.CheckpointStore, _ func(error)) (*checkpointstore.Store, func() error, error) {
		if !up.Load() {
			return nil, nil, os.ErrDeadlineExceeded
		}
		s, err := checkpointstore.Open(ctx, b, nil)
		return s, b.Close, err
	}
	return up
}

func (h *harness) eventually(what string, ok func() bool) {
	h.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			h.Fatalf("not within a minute: %s", what)
		}
	}
}

func (h *harness) isReady() bool { return ready(h.get("cp")) }

func TestACheckpointIsReadyWhenItIsInItsStore(t *testing.T) {
	h := newHarness(t, makePod(), storedPCP(), storeObject())
	h.memoryStore()
	h.run("cp")
	h.eventually("it is Ready", h.isReady)
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "stored in s with")
	in := pcp.Status.Store
	if in == nil || in.Name != "s" || in.NewBytes == 0 || in.StoreID == "" {
		t.Fatalf("it is stored in %+v", in)
	}
	s, _, err := h.opens(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	id, err := checkpointstore.ParseID(in.CheckpointID)
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Describe(t.Context(), id)
	if err != nil || c.ManifestDigest != pcp.Status.ManifestDigest || c.Labels["namespace"] != "ns" || c.Labels["name"] != "cp" ||
		c.Labels["uid"] != string(pcpUID) || c.Labels["cluster"] != "cluster-uid" || c.Labels["podUID"] != string(podUID) || c.Labels["node"] != testNode {
		t.Errorf("the store says %+v, %v", c, err)
	}
	dir := t.TempDir()
	if err := s.Get(t.Context(), id, dir, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.Verify(t.Context(), dir, pcp.Status.ManifestDigest); err != nil {
		t.Errorf("what is in the store: %v", err)
	}
	h.eventually("the record goes", func() bool { return len(h.files()) == 1 })
	h.expectFiles(dataOfCP)
	if left, err := os.ReadDir(filepath.Join(h.dir, storingDir)); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestAStoreThatIsAwayDelaysNothingButReady(t *testing.T) {
	h := newHarness(t, makePod(), storedPCP(), storeObject())
	up := h.memoryStore()
	up.Store(false)
	h.run("cp")
	h.eventually("it says why it waits", func() bool {
		c := readyCondition(h.get("cp"))
		return c != nil && c.Reason == v1alpha1.ReasonCheckpointInProgress && len(c.Message) > 10 && c.Message[:8] == "Captured"
	})
	h.expectReady("cp", v1alpha1.ReasonCheckpointInProgress, "not stored in CheckpointStore s yet")
	h.eventually("others have their turn", func() bool { return len(h.ops.storing.turns) == 0 })
	if h.condition(v1alpha1.PodConditionCheckpointing) == "True" {
		t.Error("the Pod still says that it is being checkpointed")
	}
	// An agent that starts anew goes on.
	h.ops.storing.end()
	h.ops.storing.all.Wait()
	h.start()
	if h.isReady() {
		t.Error("it is Ready")
	}
	up.Store(true)
	h.run("cp")
	h.eventually("it is Ready", h.isReady)
	if n := h.cri.calls(); n != 1 {
		t.Errorf("the Pod was checkpointed %d times", n)
	}
}

// The store's own patience is longer than a user's.
func TestAStoreThatDoesNotAnswerIsToldOfWhileItIsAskedAgain(t *testing.T) {
	h := newHarness(t, makePod(), storedPCP(), storeObject())
	h.opens = func(ctx context.Context, _ *v1alpha1.CheckpointStore, waiting func(error)) (*checkpointstore.Store, func() error, error) {
		waiting(errors.New("nobody answers"))
		<-ctx.Done()
		return nil, nil, ctx.Err()
	}
	h.run("cp")
	h.eventually("it says why it waits", func() bool {
		c := readyCondition(h.get("cp"))
		return c != nil && c.Reason == v1alpha1.ReasonCheckpointInProgress && strings.Contains(c.Message, "Captured, and not stored in CheckpointStore s yet") && strings.Contains(c.Message, "nobody answers")
	})
}

func TestACheckpointThatIsDeletedIsNotStoredOn(t *testing.T) {
	h := newHarness(t, makePod(), storedPCP(), storeObject())
	h.memoryStore().Store(false)
	h.run("cp")
	h.eventually("it is being stored", func() bool {
		h.ops.storing.mu.Lock()
		defer h.ops.storing.mu.Unlock()
		return len(h.ops.storing.jobs) == 1
	})
	if err := h.client.Delete(t.Context(), h.get("cp")); err != nil {
		t.Fatal(err)
	}
	h.reconcile(t.Context(), "cp")
	h.eventually("nothing is kept", func() bool { h.reconcile(t.Context(), "cp"); return len(h.files()) == 0 })
	if !h.ops.storing.stop(types.UID(pcpUID)) {
		t.Error("it is still being stored")
	}
}

func TestAJournalOfWhatIsStoredIsReadBack(t *testing.T) {
	s, err := openStore(filepath.Join(t.TempDir(), "stasis"))
	if err != nil {
		t.Fatal(err)
	}
	j := &storeJournal{store: s, uid: "u"}
	a, b := checkpointstore.Pack{ID: checkpointstore.ID{1}, Size: 7}, checkpointstore.Pack{ID: checkpointstore.ID{2}, Size: 8}
	for _, err := range []error{j.AddPack(a), j.AddPack(b), j.SetRoot(checkpointstore.ID{3})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	packs, root, err := (&storeJournal{store: s, uid: "u"}).Read()
	if err != nil || len(packs) != 2 || packs[0] != a || packs[1] != b || root == nil || *root != (checkpointstore.ID{3}) {
		t.Errorf("%v, %v, %v", packs, root, err)
	}
}

func TestAJournalThatNobodyCanReadKeepsNothingFromBeingStored(t *testing.T) {
	s, err := openStore(filepath.Join(t.TempDir(), "stasis"))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{", `{"packs":[{"id":"x","size":1}]}`, `{"root":"x"}`} {
		if err := os.WriteFile(s.storingPath("u"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		j := &storeJournal{store: s, uid: "u"}
		if packs, root, err := j.Read(); err != nil || len(packs) != 0 || root != nil {
			t.Errorf("%q: %v, %v, %v", text, packs, root, err)
		}
		if err := j.SetRoot(checkpointstore.ID{3}); err != nil {
			t.Fatal(err)
		}
		if _, root, err := j.Read(); err != nil || root == nil {
			t.Errorf("%q, and then a root: %v, %v", text, root, err)
		}
	}
}

func TestACheckpointThatIsStoredSaysWhatItSharesWithTheOneBefore(t *testing.T) {
	second := storedPCP()
	second.Name, second.UID = "cp2", "uid-of-cp2"
	h := newHarness(t, makePod(), storedPCP(), second, storeObject())
	h.memoryStore()
	memory := make([]byte, 3*4096)
	h.cri.before = func(_ context.Context, in *runtimeapi.CheckpointPodRequest) error {
		memory[4096]++ // the second page is another each time
		return os.WriteFile(filepath.Join(in.OutputPath, "pages-1.img"), memory, 0o600)
	}
	memory[0] = 1
	h.run("cp")
	h.eventually("the first is Ready", h.isReady)
	first := h.get("cp").Status.Store
	if want := (&v1alpha1.StoredShare{Bytes: 3 * 4096, ZeroBytes: 4096}); first.Previous != nil || !reflect.DeepEqual(first.Memory, want) || first.Files == nil || first.Files.PresentBytes != 0 || first.Files.Bytes < 4096 {
		t.Errorf("the first: %+v, memory %+v, files %+v", first, first.Memory, first.Files)
	}
	h.run("cp2")
	h.eventually("the second is Ready", func() bool { return ready(h.get("cp2")) })
	in := h.get("cp2").Status.Store
	if want := (&v1alpha1.PreviousCheckpoint{CheckpointID: first.CheckpointID, Name: "cp", PodName: "app"}); !reflect.DeepEqual(in.Previous, want) {
		t.Errorf("before the second is %+v, and not %+v", in.Previous, want)
	}
	if want := (&v1alpha1.StoredShare{Bytes: 3 * 4096, ZeroBytes: 4096, PresentBytes: 4096, PreviousBytes: 4096}); !reflect.DeepEqual(in.Memory, want) {
		t.Errorf("the second's memory: %+v, and not %+v", in.Memory, want)
	}
}

func TestACheckpointThatWasSharedWithIsNamedOnlyIfItIsOfThisCluster(t *testing.T) {
	h := newHarness(t)
	h.memoryStore()
	s, _, err := h.opens(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	put := func(labels map[string]string) (checkpointstore.Checkpoint, *v1alpha1.StoredCheckpoint) {
		t.Helper()
		c, err := s.Put(t.Context(), fstest.MapFS{"a": {Data: []byte("a")}}, checkpointstore.PutOptions{Labels: labels, Alike: []string{"pod"}})
		if err != nil {
			t.Fatal(err)
		}
		in := &v1alpha1.StoredCheckpoint{}
		if err := sayShares(t.Context(), in, s, c); err != nil {
			t.Fatal(err)
		}
		return c, in
	}
	mine := map[string]string{"cluster": "1", "namespace": "ns", "name": "mine", "pod": "app"}
	first, _ := put(mine)
	for name, tc := range map[string]struct {
		labels map[string]string
		named  string
	}{
		"this cluster's": {mine, "mine"},
		"another's":      {map[string]string{"cluster": "2", "namespace": "ns", "name": "theirs"}, ""},
	} {
		if err := s.Delete(t.Context(), first.ID); err != nil {
			t.Fatal(err)
		}
		before, _ := put(tc.labels)
		var in *v1alpha1.StoredCheckpoint
		if first, in = put(mine); in.Previous == nil || in.Previous.CheckpointID != before.ID.String() || in.Previous.Name != tc.named {
			t.Errorf("after %s: %+v", name, in.Previous)
		}
	}
	gone := first
	gone.Shares = &checkpointstore.Shares{Previous: checkpointstore.ID{9}}
	in := &v1alpha1.StoredCheckpoint{}
	if err := sayShares(t.Context(), in, s, gone); err != nil || in.Previous == nil || in.Previous.Name != "" {
		t.Errorf("after one that is gone: %+v, %v", in.Previous, err)
	}
	if nameIn("a\nb") != "" || nameIn("web-1") != "web-1" {
		t.Error("a label that is no name is taken for one")
	}
}

func TestAnOutcomeThatCouldNotBeWrittenIsToldOnceAllTheSame(t *testing.T) {
	h := newHarness(t, makePod(), storedPCP(), storeObject())
	up := h.memoryStore()
	up.Store(false)
	h.run("cp")
	h.ops.storing.end()
	h.ops.storing.all.Wait()
	rec, err := h.store.readRecord(pcpUID)
	if err != nil || rec == nil {
		t.Fatalf("the record: %v, %v", rec, err)
	}
	up.Store(true)
	path := h.store.recordPath(pcpUID)
	if err := errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "in the way"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := h.ops.storing.put(t.Context(), rec); err == nil || rec.Status.Store != nil {
		t.Fatalf("a record that cannot be written: %v, %+v", err, rec.Status.Store)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := h.ops.storing.put(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	again, err := h.store.readRecord(pcpUID)
	if err != nil || again.Status.Store == nil {
		t.Fatalf("the record says %+v, %v", again, err)
	}
	if m := readyCondition(&v1alpha1.PodCheckpoint{Status: again.Status}).Message; strings.Count(m, "stored in s with") != 1 {
		t.Errorf("it says %q", m)
	}
}
