package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/stores"
)

const thisCluster = "uid-of-kube-system"

// kept is a store in a directory with what looks after it.
type kept struct {
	*storekeeper
	release *storeRelease
	path    string
	told    *told
	clock   *clocktesting.FakePassiveClock
	writes  int // of its status
}

func keep(t *testing.T, change func(*checkpointv1alpha1.CheckpointStore), objects ...client.Object) *kept {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, checkpointv1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	k := &kept{path: filepath.Join(t.TempDir(), "store"), told: &told{}, clock: clocktesting.NewFakePassiveClock(time.Now().Add(24 * time.Hour))}
	object := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: checkpointv1alpha1.CheckpointStoreTypeDirectory, Directory: &checkpointv1alpha1.DirectoryStore{Path: k.path}}}
	if change != nil {
		change(object)
	}
	system := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system", UID: thisCluster}}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(append(objects, object, system)...).
		WithStatusSubresource(&checkpointv1alpha1.PodCheckpoint{}, &checkpointv1alpha1.CheckpointStore{}).
		WithInterceptorFuncs(interceptor.Funcs{SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			k.writes++
			return c.SubResource(sub).Patch(ctx, o, patch, opts...)
		}, SubResourceUpdate: func(context.Context, client.Client, string, client.Object, ...client.SubResourceUpdateOption) error {
			return errors.New("a CheckpointStore is written as a whole: what a newer controller has written there would be gone")
		}}).Build()
	metrics, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	opener := stores.Opener{Reader: c, Namespace: "stasis-system", Retry: backend.Policy{Total: time.Millisecond}}
	log := slog.New(slog.DiscardHandler)
	k.storekeeper = &storekeeper{client: c, live: c, clock: k.clock, events: k.told, metrics: metrics, log: log,
		config: StoreConfig{Open: opener, Every: 10 * time.Minute, Grace: time.Hour}}
	k.release = &storeRelease{client: c, live: c, open: opener, events: k.told, log: log}
	return k
}

func (k *kept) reconcile(t *testing.T) *checkpointv1alpha1.CheckpointStore {
	t.Helper()
	result, err := k.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Name: "s"}})
	if err != nil {
		t.Fatal(err)
	}
	if result.RequeueAfter <= 0 {
		t.Error("it is never looked at again")
	}
	return k.object(t)
}

func (k *kept) object(t *testing.T) *checkpointv1alpha1.CheckpointStore {
	t.Helper()
	var object checkpointv1alpha1.CheckpointStore
	if err := k.client.Get(t.Context(), types.NamespacedName{Name: "s"}, &object); err != nil {
		t.Fatal(err)
	}
	return &object
}

// open opens the store as an agent does.
func (k *kept) open(t *testing.T) *store.Store {
	t.Helper()
	s, done, err := k.config.Open.Open(t.Context(), k.object(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { done() })
	return s
}

// put stores a checkpoint as an agent does.
func (k *kept) put(t *testing.T, labels map[string]string) store.Checkpoint {
	t.Helper()
	c, err := k.open(t).Put(t.Context(), fstest.MapFS{"file": {Data: []byte(fmt.Sprint("of ", t.Name(), labels))}}, store.PutOptions{Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (k *kept) holds(t *testing.T, id store.ID) bool {
	t.Helper()
	_, err := k.open(t).Describe(t.Context(), id)
	if err != nil && !errors.Is(err, store.ErrMissing) {
		t.Fatal(err)
	}
	return err == nil
}

func labelsOf(cluster, namespace, name, uid string) map[string]string {
	return map[string]string{"cluster": cluster, "namespace": namespace, "name": name, "uid": uid, "pod": "p"}
}

// inStore is a PodCheckpoint that is Ready in the store.
func inStore(name string, uid types.UID, storeID, id string) *checkpointv1alpha1.PodCheckpoint {
	done := metav1.NewTime(born)
	return &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, UID: uid, Finalizers: []string{checkpointv1alpha1.FinalizerStore}},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "p", StoreName: "s"},
		Status: checkpointv1alpha1.PodCheckpointStatus{CompletionTime: &done,
			Store:      &checkpointv1alpha1.StoredCheckpoint{Name: "s", StoreID: storeID, CheckpointID: id, NewBytes: 100},
			Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "CheckpointCompleted"}}},
	}
}

func (k *kept) create(t *testing.T, objects ...client.Object) {
	t.Helper()
	for _, o := range objects {
		if err := k.client.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
}

func (k *kept) exists(t *testing.T, name string) bool {
	t.Helper()
	c, err := get[checkpointv1alpha1.PodCheckpoint](t.Context(), k.client, types.NamespacedName{Namespace: "n", Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return c != nil && c.DeletionTimestamp == nil
}

func expectReady(t *testing.T, object *checkpointv1alpha1.CheckpointStore, status metav1.ConditionStatus, reason string, words ...string) {
	t.Helper()
	c := meta.FindStatusCondition(object.Status.Conditions, "Ready")
	if c == nil || c.Status != status || c.Reason != reason {
		t.Fatalf("condition %+v, want %s %s", c, status, reason)
	}
	for _, word := range words {
		if !strings.Contains(c.Message, word) {
			t.Errorf("%q does not say %q", c.Message, word)
		}
	}
}

func expectTold(t *testing.T, told *told, want ...string) {
	t.Helper()
	if len(*told) != len(want) {
		t.Fatalf("events %q, want %q", *told, want)
	}
	for i, w := range want {
		if !strings.HasPrefix((*told)[i], w) {
			t.Errorf("event %q, want %q", (*told)[i], w)
		}
	}
	*told = nil
}

func TestAStoreIsMadeWhereThereIsNoneAndToldOfOnce(t *testing.T) {
	k := keep(t, nil)
	object := k.reconcile(t)
	expectReady(t, object, "True", "StoreReady")
	if object.Status.StoreID == "" || object.Status.LastCollectionTime == nil {
		t.Errorf("status %+v", object.Status)
	}
	expectTold(t, k.told, "Normal StoreReady store "+object.Status.StoreID)
	writes := k.writes
	if again := k.reconcile(t); again.Status.StoreID != object.Status.StoreID || k.writes != writes {
		t.Errorf("it was made or written again: %+v, %d writes", again.Status, k.writes-writes)
	}
	expectTold(t, k.told)
}

func TestAStoreThatIsAwayIsToldOfOnceAndWhenItIsBack(t *testing.T) {
	k := keep(t, nil)
	k.reconcile(t)
	*k.told = nil
	away := filepath.Dir(k.path) + "-away"
	if err := os.Rename(filepath.Dir(k.path), away); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		expectReady(t, k.reconcile(t), "False", "StoreUnreachable", filepath.Dir(k.path)+" does not exist")
	}
	expectTold(t, k.told, "Warning StoreUnreachable ")
	if got := testutil.ToFloat64(k.metrics.stores.ready.WithLabelValues("s")); got != 0 {
		t.Errorf("stasis_store_ready %v", got)
	}
	if err := os.Rename(away, filepath.Dir(k.path)); err != nil {
		t.Fatal(err)
	}
	expectReady(t, k.reconcile(t), "True", "StoreReady")
	expectTold(t, k.told, "Normal StoreReady ")
}

func TestAStoreThatWasReplacedIsNotUsedNorMadeAgain(t *testing.T) {
	for name, replace := range map[string]func(t *testing.T, k *kept){
		"by none": func(*testing.T, *kept) {},
		"by another": func(t *testing.T, k *kept) {
			if _, _, err := k.config.Open.Create(t.Context(), &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Spec: k.object(t).Spec}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := keep(t, nil)
			id := k.reconcile(t).Status.StoreID
			if err := os.RemoveAll(k.path); err != nil {
				t.Fatal(err)
			}
			replace(t, k)
			object := k.reconcile(t)
			expectReady(t, object, "False", "StoreReplaced", id)
			if object.Status.StoreID != id {
				t.Errorf("its identity became %s", object.Status.StoreID)
			}
			if _, err := os.Stat(filepath.Join(k.path, "store.json")); name == "by none" && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a store was made: %v", err)
			}
		})
	}
}

func TestKeysAreRotatedWhenTheSecretHasALaterOne(t *testing.T) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "stasis-system", Name: "keys"}, Data: map[string][]byte{"2026-10": make([]byte, 32)}}
	name := "keys"
	k := keep(t, func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.EncryptionSecretName = &name }, secret)
	expectReady(t, k.reconcile(t), "True", "StoreReady")
	c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
	*k.told = nil
	later := []byte(strings.Repeat("k", 32))
	secret.Data["2026-11"] = later
	if err := k.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	k.reconcile(t)
	k.reconcile(t)
	expectTold(t, k.told, "Normal KeyRotated")
	secret.Data = map[string][]byte{"2026-11": later}
	if err := k.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	expectReady(t, k.reconcile(t), "True", "StoreReady")
	if !k.holds(t, c.ID) {
		t.Error("the checkpoint is gone")
	}
	secret.Data = map[string][]byte{"2026-10": make([]byte, 32)}
	if err := k.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	expectReady(t, k.reconcile(t), "False", "KeyInvalid", "Secret stasis-system/keys", "2026-11")
}

func TestUsageIsToldPerNamespaceOfThisClusterAndOfAllTogether(t *testing.T) {
	k := keep(t, nil)
	k.reconcile(t)
	a := k.put(t, labelsOf(thisCluster, "a", "1", "u1"))
	b := k.put(t, labelsOf(thisCluster, "a", "2", "u2"))
	k.put(t, labelsOf(thisCluster, "b", "1", "u3"))
	k.put(t, labelsOf("another", "a", "1", "u4"))
	status := k.reconcile(t).Status
	if status.Checkpoints != 4 || status.LogicalBytes < 4*a.LogicalBytes/2 || status.StoredBytes < a.NewBytes+b.NewBytes || status.Stored == "" {
		t.Errorf("status %+v", status)
	}
	want := []checkpointv1alpha1.NamespaceUsage{{Name: "a", Checkpoints: 2, StoredBytes: a.NewBytes + b.NewBytes}}
	if len(status.Namespaces) != 2 || status.Namespaces[0] != want[0] || status.Namespaces[1].Name != "b" {
		t.Errorf("namespaces %+v, want %+v and b", status.Namespaces, want)
	}
	if got := testutil.ToFloat64(k.metrics.stores.ofNamespace.WithLabelValues("s", "a")); got != float64(want[0].StoredBytes) {
		t.Errorf("stasis_store_namespace_stored_bytes %v", got)
	}
	if err := k.client.Delete(t.Context(), k.object(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Name: "s"}}); err != nil {
		t.Fatal(err)
	}
	if n := testutil.CollectAndCount(k.metrics.stores.stored) + testutil.CollectAndCount(k.metrics.stores.ofNamespace); n != 0 {
		t.Errorf("%d metrics are left of a store that is gone", n)
	}
}

func TestACheckpointThatCannotBeReadIsToldOfAndTheOthersCount(t *testing.T) {
	k := keep(t, nil)
	k.reconcile(t)
	k.put(t, labelsOf(thisCluster, "a", "1", "u1"))
	broken := k.put(t, labelsOf(thisCluster, "a", "2", "u2"))
	*k.told = nil
	path := filepath.Join(k.path, "checkpoints", broken.ID.String())
	if err := os.WriteFile(path, []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	k.clock.SetTime(k.clock.Now().Add(time.Hour))
	object := k.reconcile(t)
	expectReady(t, object, "True", "StoreReady")
	if object.Status.Checkpoints != 2 || object.Status.Namespaces[0].Checkpoints != 1 {
		t.Errorf("status %+v", object.Status)
	}
	expectTold(t, k.told, "Warning CheckpointsUnusable 1 checkpoints", "Warning CollectionFailed")
	k.reconcile(t)
	expectTold(t, k.told)
}

func TestWhatNothingUsesGoesAfterItsGrace(t *testing.T) {
	k := keep(t, nil)
	k.reconcile(t)
	c := k.put(t, labelsOf("another", "a", "1", "u1"))
	if err := k.open(t).Delete(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	k.config.Grace = 0 // of the store's own clock
	var sizes []int64
	for range 3 {
		sizes = append(sizes, k.reconcile(t).Status.StoredBytes)
		k.clock.SetTime(k.clock.Now().Add(11 * time.Minute))
	}
	if !(sizes[0] > 0 && sizes[2] == 0) {
		t.Errorf("stored bytes %v", sizes)
	}
	if n := testutil.ToFloat64(k.metrics.stores.collections.WithLabelValues("s", "ok")); n != 3 {
		t.Errorf("%v collections in three intervals", n)
	}
}

func TestOnlyThisClustersOrphansAreDeletedAndOnlyAfterAnHour(t *testing.T) {
	k := keep(t, nil)
	storeID := k.reconcile(t).Status.StoreID
	owned := k.put(t, labelsOf(thisCluster, "n", "owned", "u1"))
	orphan := k.put(t, labelsOf(thisCluster, "n", "gone", "u2"))
	replaced := k.put(t, labelsOf(thisCluster, "n", "owned", "of-an-earlier-one"))
	foreign := k.put(t, labelsOf("another", "n", "gone", "u2"))
	unlabelled := k.put(t, map[string]string{"by": "somebody"})
	failed := k.put(t, labelsOf(thisCluster, "n", "failed", "u5"))
	coming := k.put(t, labelsOf(thisCluster, "n", "coming", "u6"))
	of := func(name string, uid types.UID, conditions ...metav1.Condition) *checkpointv1alpha1.PodCheckpoint {
		c := inStore(name, uid, storeID, owned.ID.String())
		if len(conditions) > 0 {
			c.Status.Store, c.Status.Conditions = nil, conditions
		}
		return c
	}
	k.create(t, of("owned", "u1"), of("failed", "u5", metav1.Condition{Type: "Ready", Status: "False", Reason: "CheckpointFailed"}),
		of("coming", "u6", metav1.Condition{Type: "Ready", Status: "False", Reason: "CheckpointInProgress"}))
	step := func(d time.Duration) {
		k.clock.SetTime(k.clock.Now().Add(d))
		k.reconcile(t)
	}
	step(11 * time.Minute)
	step(50 * time.Minute)
	for _, c := range []store.Checkpoint{owned, orphan, replaced, foreign, unlabelled, failed, coming} {
		if !k.holds(t, c.ID) {
			t.Fatalf("%v was deleted within the hour", c.Labels)
		}
	}
	*k.told = nil
	step(11 * time.Minute)
	for _, c := range []store.Checkpoint{owned, foreign, unlabelled, coming} {
		if !k.holds(t, c.ID) {
			t.Errorf("%v was deleted", c.Labels)
		}
	}
	for _, c := range []store.Checkpoint{orphan, replaced, failed} {
		if k.holds(t, c.ID) {
			t.Errorf("%v is still there", c.Labels)
		}
	}
	expectTold(t, k.told, "Normal OrphanDeleted", "Normal OrphanDeleted", "Normal OrphanDeleted")
}

func TestAnOrphanWhosePodCheckpointIsBackIsNoOrphan(t *testing.T) {
	k := keep(t, nil)
	storeID := k.reconcile(t).Status.StoreID
	c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
	k.clock.SetTime(k.clock.Now().Add(11 * time.Minute))
	k.reconcile(t)
	k.create(t, inStore("c", "u", storeID, c.ID.String()))
	k.clock.SetTime(k.clock.Now().Add(2 * time.Hour))
	k.reconcile(t)
	if len(k.stores["s"].orphans) != 0 || !k.holds(t, c.ID) {
		t.Error("it is taken for one")
	}
}

// leaving deletes a PodCheckpoint in the store and has the release look at it.
func (k *kept) leave(t *testing.T, name string) time.Duration {
	t.Helper()
	var c checkpointv1alpha1.PodCheckpoint
	key := types.NamespacedName{Namespace: "n", Name: name}
	if err := k.client.Get(t.Context(), key, &c); err != nil {
		t.Fatal(err)
	}
	if c.DeletionTimestamp == nil {
		if err := k.client.Delete(t.Context(), &c); err != nil {
			t.Fatal(err)
		}
	}
	result, err := k.release.Reconcile(t.Context(), reconcile.Request{NamespacedName: key})
	if err != nil {
		t.Fatal(err)
	}
	return result.RequeueAfter
}

func (k *kept) isGone(t *testing.T, name string) bool {
	t.Helper()
	c, err := get[checkpointv1alpha1.PodCheckpoint](t.Context(), k.client, types.NamespacedName{Namespace: "n", Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return c == nil
}

func TestADeletedCheckpointGoesFromItsStoreBeforeItGoes(t *testing.T) {
	k := keep(t, nil)
	storeID := k.reconcile(t).Status.StoreID
	c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
	object := inStore("c", "u", storeID, c.ID.String())
	object.Finalizers = append(object.Finalizers, checkpointv1alpha1.FinalizerData)
	k.create(t, object)
	if again := k.leave(t, "c"); again != 0 || k.isGone(t, "c") || !k.holds(t, c.ID) {
		t.Fatal("its node has not let it go, and it was deleted")
	}
	var now checkpointv1alpha1.PodCheckpoint
	if err := k.client.Get(t.Context(), client.ObjectKeyFromObject(object), &now); err != nil {
		t.Fatal(err)
	}
	now.Finalizers = []string{checkpointv1alpha1.FinalizerStore}
	if err := k.client.Update(t.Context(), &now); err != nil {
		t.Fatal(err)
	}
	if k.leave(t, "c"); !k.isGone(t, "c") || k.holds(t, c.ID) {
		t.Error("it is still there")
	}
}

func TestAStoreThatIsAwayDelaysADeletionAndSaysWhy(t *testing.T) {
	k := keep(t, nil)
	storeID := k.reconcile(t).Status.StoreID
	c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
	k.create(t, inStore("c", "u", storeID, c.ID.String()))
	*k.told = nil
	if err := os.Rename(k.path, k.path+"-away"); err != nil {
		t.Fatal(err)
	}
	// A directory in its place is no store, and another store is not the one it is in.
	if again := k.leave(t, "c"); again <= 0 || k.isGone(t, "c") {
		t.Fatal("it went without its data")
	}
	expectTold(t, k.told, "Warning DeletionDelayed it cannot be deleted from its store (StoreUnreachable); trying again every 30s: ")
	if err := errors.Join(os.RemoveAll(k.path), os.Rename(k.path+"-away", k.path)); err != nil {
		t.Fatal(err)
	}
	if k.leave(t, "c"); !k.isGone(t, "c") || k.holds(t, c.ID) {
		t.Error("it is still there")
	}
}

func TestACheckpointWhoseStoreIsGoneIsLetGoAndWhatStaysIsNamed(t *testing.T) {
	for name, gone := range map[string]func(t *testing.T, k *kept){
		"gone": func(t *testing.T, k *kept) {
			if err := k.client.Delete(t.Context(), k.object(t)); err != nil {
				t.Fatal(err)
			}
		},
		"being deleted": func(t *testing.T, k *kept) {
			object := k.object(t)
			object.Finalizers = []string{"example.com/other"}
			if err := errors.Join(k.client.Update(t.Context(), object), k.client.Delete(t.Context(), object)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := keep(t, nil)
			storeID := k.reconcile(t).Status.StoreID
			c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
			k.create(t, inStore("c", "u", storeID, c.ID.String()))
			*k.told = nil
			gone(t, k)
			if k.leave(t, "c"); !k.isGone(t, "c") {
				t.Error("it is held for ever")
			}
			expectTold(t, k.told, `Warning LeftInStore CheckpointStore "s" is gone, and with it the way to checkpoint `+c.ID.String()[:16]+"… in store "+storeID)
		})
	}
}

func TestADeletedCheckpointThatNeverWasInAStoreIsLetGo(t *testing.T) {
	k := keep(t, nil)
	c := inStore("c", "u", "", "")
	c.Status = checkpointv1alpha1.PodCheckpointStatus{}
	k.create(t, c)
	if k.leave(t, "c"); !k.isGone(t, "c") {
		t.Error("it is held")
	}
}

// from is a Pod that is made of a checkpoint.
func from(name, checkpoint, uid, node string, phase corev1.PodPhase, restoring corev1.ConditionStatus) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, Annotations: map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: checkpoint}},
		Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
	if uid != "" {
		pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = uid
	}
	if restoring != "" {
		pod.Status.Conditions = []corev1.PodCondition{{Type: checkpointv1alpha1.PodConditionRestoring, Status: restoring}}
	}
	return pod
}

// memory says how far the memory of a Pod has come.
func memory(pod *corev1.Pod, status corev1.ConditionStatus, reason string) *corev1.Pod {
	pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: checkpointv1alpha1.PodConditionMemoryRestored, Status: status, Reason: reason})
	return pod
}

// refusal gives the reason of the condition that a Pod is not being restored.
func refusal(pod *corev1.Pod, reason string) *corev1.Pod {
	pod.Status.Conditions[0].Reason = reason
	return pod
}

const comes = checkpointv1alpha1.ReasonMemoryComing

func TestACheckpointStaysInItsStoreWhilePodsAreRestoredFromIt(t *testing.T) {
	for name, tc := range map[string]struct {
		pod  *corev1.Pod
		uses bool
		how  string // it is used; empty: it is being restored from it
	}{
		"on its node":                   {pod: from("r", "c", "u", "node", corev1.PodPending, ""), uses: true},
		"half restored":                 {pod: from("r", "c", "u", "node", corev1.PodRunning, "True"), uses: true},
		"restored":                      {pod: from("r", "c", "u", "node", corev1.PodRunning, "False")},
		"restored, without a word":      {pod: from("r", "c", "u", "node", corev1.PodRunning, "")},
		"given up":                      {pod: from("r", "c", "u", "node", corev1.PodFailed, "True")},
		"waiting for a node":            {pod: from("r", "c", "u", "", corev1.PodPending, "")},
		"of an earlier one of its name": {pod: from("r", "c", "other", "node", corev1.PodPending, "")},
		"of another":                    {pod: from("r", "d", "u", "node", corev1.PodPending, "")},
		"without its memory":            {pod: memory(from("r", "c", "u", "node", corev1.PodRunning, ""), "False", comes), uses: true, how: "still being given memory of it"},
		"half, and without its memory":  {pod: memory(from("r", "c", "u", "node", corev1.PodRunning, "True"), "False", comes), uses: true},
		"refused, it is being deleted":  {pod: refusal(from("r", "c", "u", "node", corev1.PodPending, "False"), checkpointv1alpha1.EventCheckpointNotReady)},
		"refused, for now":              {pod: refusal(from("r", "c", "u", "node", corev1.PodPending, "False"), checkpointv1alpha1.EventCheckpointFetching), uses: true},
		"whole":                         {pod: memory(from("r", "c", "u", "node", corev1.PodRunning, ""), "True", checkpointv1alpha1.ReasonMemoryRestored)},
		"without memory that was lost":  {pod: memory(from("r", "c", "u", "node", corev1.PodRunning, ""), "False", checkpointv1alpha1.ReasonMemoryLost)},
		"ended without its memory":      {pod: memory(from("r", "c", "u", "node", corev1.PodFailed, ""), "False", comes)},
	} {
		t.Run(name, func(t *testing.T) {
			k := keep(t, nil, tc.pod)
			storeID := k.reconcile(t).Status.StoreID
			c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
			k.create(t, inStore("c", "u", storeID, c.ID.String()))
			*k.told = nil
			again := k.leave(t, "c")
			if held := again > 0 && !k.isGone(t, "c") && k.holds(t, c.ID); held != tc.uses {
				t.Errorf("held %v, want %v", held, tc.uses)
			}
			if tc.uses {
				expectTold(t, k.told, `Normal DeletionDelayed Pod "r" is `+cmp.Or(tc.how, "being restored from it"))
			}
		})
	}
}

func TestRetentionDeletesWhatItSaysButNeverWhatIsUsedOrNotReady(t *testing.T) {
	one := int32(1)
	k := keep(t, func(s *checkpointv1alpha1.CheckpointStore) {
		s.Spec.Retention = &checkpointv1alpha1.CheckpointRetention{MaxPerPod: &one}
	})
	storeID := k.reconcile(t).Status.StoreID
	for i, name := range []string{"unready", "elsewhere", "waited-for", "restored-from", "without-memory", "old", "latest"} {
		id := k.put(t, labelsOf(thisCluster, "n", name, name)).ID.String()
		c := inStore(name, types.UID(name), storeID, id)
		done := metav1.NewTime(born.Add(time.Duration(i) * time.Minute))
		c.Status.CompletionTime = &done
		switch name {
		case "unready":
			c.Status.Conditions[0] = metav1.Condition{Type: "Ready", Status: "False", Reason: "CheckpointInProgress"}
		case "elsewhere":
			c.Status.Store.Name = "another"
		}
		k.create(t, c)
	}
	k.create(t, from("held", "waited-for", "", "", corev1.PodPending, ""), from("busy", "restored-from", "restored-from", "node", corev1.PodRunning, "True"),
		memory(from("hungry", "without-memory", "without-memory", "node", corev1.PodRunning, ""), "False", comes),
		from("done", "old", "old", "node", corev1.PodRunning, "False"))
	*k.told = nil
	k.reconcile(t)
	for _, name := range []string{"unready", "elsewhere", "waited-for", "restored-from", "without-memory", "latest"} {
		if !k.exists(t, name) {
			t.Errorf("%s was deleted", name)
		}
	}
	if k.exists(t, "old") {
		t.Error("old is still there")
	}
	expectTold(t, k.told, `Normal DeletedByRetention retention of CheckpointStore "s": there are maxPerPod 1 later ones of Pod "p"`)
	if got := testutil.ToFloat64(k.metrics.stores.retired.WithLabelValues("s")); got != 1 {
		t.Errorf("stasis_store_retention_deletions_total %v", got)
	}
}

func TestAFinishedDeletionIsSeenByTheNextCount(t *testing.T) {
	k := keep(t, nil)
	storeID := k.reconcile(t).Status.StoreID
	c := k.put(t, labelsOf(thisCluster, "n", "c", "u"))
	k.create(t, inStore("c", "u", storeID, c.ID.String()))
	if status := k.reconcile(t).Status; status.Checkpoints != 1 {
		t.Fatalf("status %+v", status)
	}
	k.leave(t, "c")
	if status := k.reconcile(t).Status; status.Checkpoints != 0 || slices.ContainsFunc(status.Namespaces, func(of checkpointv1alpha1.NamespaceUsage) bool { return of.Name == "n" }) {
		t.Errorf("status %+v", status)
	}
}
