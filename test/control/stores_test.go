package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/stores"
)

// checkpointStore makes a CheckpointStore in a directory and waits until it is Ready.
func checkpointStore(t *testing.T, change func(*checkpointv1alpha1.CheckpointStore)) *checkpointv1alpha1.CheckpointStore {
	t.Helper()
	must(t, once())
	s := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{GenerateName: "store-"}, Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: checkpointv1alpha1.CheckpointStoreTypeDirectory, Directory: &checkpointv1alpha1.DirectoryStore{Path: filepath.Join(t.TempDir(), "store")}}}
	if change != nil {
		change(s)
	}
	must(t, shared.client.Create(t.Context(), s))
	cleanUp(t, s)
	storeIs(t, s, checkpointv1alpha1.ReasonStoreReady)
	return s
}

// cleanUp deletes an object with the test, whose own context has ended by then.
func cleanUp(t *testing.T, o client.Object) {
	t.Helper()
	t.Cleanup(func() {
		if err := client.IgnoreNotFound(shared.client.Delete(context.Background(), o)); err != nil {
			t.Error(err)
		}
	})
}

// barred puts a file where a store's directory is, until back is called. Both are done
// in one step: the controller, which looks at any moment, never finds nothing there, where
// opening a store makes its directory.
func barred(t *testing.T, s *checkpointv1alpha1.CheckpointStore) (back func()) {
	t.Helper()
	here := s.Spec.Directory.Path
	there := here + "-away"
	must(t, os.WriteFile(there, nil, 0o600))
	swap := func() {
		t.Helper()
		must(t, unix.Renameat2(unix.AT_FDCWD, here, unix.AT_FDCWD, there, unix.RENAME_EXCHANGE))
	}
	swap()
	return swap
}

// storeIs waits until the condition of a store has a reason.
func storeIs(t *testing.T, s *checkpointv1alpha1.CheckpointStore, reason string) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(s), s); err != nil {
			return err
		}
		if c := meta.FindStatusCondition(s.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady); c == nil || c.Reason != reason {
			return fmt.Errorf("CheckpointStore %s: %+v, want %s", s.Name, c, reason)
		}
		return nil
	}))
}

// toStore makes a PodCheckpoint that is to be kept in a store.
func toStore(t *testing.T, namespace, name, pod, in string) *checkpointv1alpha1.PodCheckpoint {
	t.Helper()
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod, StoreName: in}}
	must(t, shared.client.Create(t.Context(), c))
	return c
}

// completeInStore plays the agent that captures a checkpoint and stores it, with the
// rights that it has, and returns what it stored.
func completeInStore(t *testing.T, agent client.Client, c *checkpointv1alpha1.PodCheckpoint, pod *corev1.Pod) store.ID {
	t.Helper()
	var object checkpointv1alpha1.CheckpointStore
	must(t, agent.Get(t.Context(), client.ObjectKey{Name: c.Spec.StoreName}, &object))
	s, done, err := stores.Open(t.Context(), agent, systemNamespace, &object)
	must(t, err)
	defer done()
	var system corev1.Namespace
	must(t, agent.Get(t.Context(), client.ObjectKey{Name: metav1.NamespaceSystem}, &system))
	stored, err := s.Put(t.Context(), fstest.MapFS{"memory": {Data: []byte(strings.Repeat(c.Name, 1000))}}, store.PutOptions{Labels: map[string]string{
		checkpointv1alpha1.StoreLabelCluster: string(system.UID), checkpointv1alpha1.StoreLabelNamespace: c.Namespace,
		checkpointv1alpha1.StoreLabelName: c.Name, checkpointv1alpha1.StoreLabelUID: string(c.UID)}})
	must(t, err)
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
			return err
		}
		c.Status = readyStatus(pod)
		c.Status.Store = &checkpointv1alpha1.StoredCheckpoint{Name: object.Name, StoreID: s.ID(), CheckpointID: stored.ID.String(), NewBytes: stored.NewBytes}
		return agent.Status().Update(t.Context(), c)
	}))
	return stored.ID
}

func held(t *testing.T, s *checkpointv1alpha1.CheckpointStore, id store.ID) bool {
	t.Helper()
	opened, done, err := stores.Open(t.Context(), shared.client, systemNamespace, s)
	must(t, err)
	defer done()
	_, err = opened.Describe(t.Context(), id)
	if err != nil && !errors.Is(err, store.ErrMissing) {
		t.Fatal(err)
	}
	return err == nil
}

func gone(t *testing.T, c *checkpointv1alpha1.PodCheckpoint) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c.DeepCopy())
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("PodCheckpoint %s is still there (%v)", c.Name, err)
	}))
}

func TestACheckpointThatItsStoreHasNoPlaceForIsRefused(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	try := func(in string) error {
		return shared.client.Create(t.Context(), &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "c-"},
			Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name, StoreName: in}}, client.DryRunAll)
	}
	refused(t, try("none"), apierrors.IsForbidden, `CheckpointStore "none" does not exist`)
	others := checkpointStore(t, func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.Namespaces = []string{"other"} })
	refused(t, try(others.Name), apierrors.IsForbidden, `is not for namespace "`+ns+`"`)

	s := checkpointStore(t, nil)
	must(t, try(s.Name))
	completeInStore(t, agent, toStore(t, ns, "c", pod.Name, s.Name), pod)
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(s), s); err != nil {
			return err
		}
		if len(s.Status.Namespaces) != 1 || s.Status.Namespaces[0].Name != ns || s.Status.Checkpoints != 1 {
			return fmt.Errorf("usage %+v", s.Status)
		}
		return nil
	}))
	for _, bound := range []struct {
		set   func(*resource.Quantity)
		words string
	}{
		{func(q *resource.Quantity) { s.Spec.Capacity = q }, `CheckpointStore "` + s.Name + `" is full`},
		{func(q *resource.Quantity) { s.Spec.NamespaceCapacity = q }, `the 1 checkpoints of namespace "` + ns + `" take`},
	} {
		one := resource.MustParse("1")
		for _, q := range []*resource.Quantity{&one, nil} {
			before := s.DeepCopy()
			bound.set(q)
			must(t, shared.client.Patch(t.Context(), s, client.MergeFrom(before)))
			if q == nil {
				must(t, try(s.Name))
			} else {
				refused(t, try(s.Name), apierrors.IsForbidden, bound.words)
			}
		}
	}
}

func TestAStoreThatIsAwayIsNoReasonToRefuseACheckpoint(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	pod := source(t, ns, on)
	away := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{GenerateName: "away-"}, Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: checkpointv1alpha1.CheckpointStoreTypeDirectory, Directory: &checkpointv1alpha1.DirectoryStore{Path: filepath.Join(t.TempDir(), "not", "mounted")}}}
	must(t, shared.client.Create(t.Context(), away))
	cleanUp(t, away)
	storeIs(t, away, checkpointv1alpha1.ReasonStoreUnreachable)
	c := toStore(t, ns, "c", pod.Name, away.Name)
	if !slices.Contains(c.Finalizers, checkpointv1alpha1.FinalizerStore) {
		t.Errorf("finalizers %q", c.Finalizers)
	}
}

func TestADeletedCheckpointIsRemovedFromItsStoreFirst(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	s := checkpointStore(t, nil)
	c := toStore(t, ns, "c", pod.Name, s.Name)
	if !slices.Contains(c.Finalizers, checkpointv1alpha1.FinalizerStore) {
		t.Fatalf("finalizers %q", c.Finalizers)
	}
	id := completeInStore(t, agent, c, pod)
	back := barred(t, s)
	must(t, shared.client.Delete(t.Context(), c))
	if text := event(t, ns, c.UID, checkpointv1alpha1.EventDeletionDelayed); !strings.Contains(text, checkpointv1alpha1.ReasonStoreUnreachable) {
		t.Errorf("event %q", text)
	}
	back()
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c))
	// Its next try is half a minute away: a change of the object brings it sooner.
	must(t, shared.client.Patch(t.Context(), c.DeepCopy(), client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"again":"now"}}}`))))
	gone(t, c)
	if held(t, s, id) {
		t.Error("the store still has it")
	}
}

func TestACheckpointWhoseStoreIsGoneCanBeDeleted(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	s := checkpointStore(t, nil)
	c := toStore(t, ns, "c", pod.Name, s.Name)
	completeInStore(t, agent, c, pod)
	must(t, shared.client.Delete(t.Context(), s))
	must(t, shared.client.Delete(t.Context(), c))
	gone(t, c)
	if text := event(t, ns, c.UID, checkpointv1alpha1.EventLeftInStore); !strings.Contains(text, s.Name) {
		t.Errorf("event %q", text)
	}
}

func TestRetentionDeletesWithTheRightsOfTheController(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	one := int32(1)
	s := checkpointStore(t, func(s *checkpointv1alpha1.CheckpointStore) {
		s.Spec.Retention = &checkpointv1alpha1.CheckpointRetention{MaxPerPod: &one}
	})
	older := toStore(t, ns, "older", pod.Name, s.Name)
	id := completeInStore(t, agent, older, pod)
	time.Sleep(1100 * time.Millisecond) // times in a status are of seconds
	later := toStore(t, ns, "later", pod.Name, s.Name)
	completeInStore(t, agent, later, pod)
	gone(t, older)
	if held(t, s, id) {
		t.Error("the store still has it")
	}
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(later), later))
	// Of others, the policy lets the controller delete none.
	local := checkpoint(t, ns, "local", pod.Name)
	complete(t, agent, local, pod)
	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	token, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), "stasis-controller", tokenRequest(), metav1.CreateOptions{})
	must(t, err)
	refused(t, withToken(t, token.Status.Token).Delete(t.Context(), local), apierrors.IsForbidden, "only PodCheckpoints that are Ready in a store")
}

func TestTheStoresThatTheDocumentsShowAreTaken(t *testing.T) {
	must(t, once())
	shown := map[string]*checkpointv1alpha1.CheckpointStore{"config/samples": sample[checkpointv1alpha1.CheckpointStore](t, "checkpointstore.yaml")}
	text, err := os.ReadFile("../../docs/stores.md")
	must(t, err)
	for i, block := range strings.Split(string(text), "```yaml\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		for _, document := range strings.Split(block, "---\n") {
			s := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{GenerateName: "shown-"}}
			if strings.Contains(document, "kind: Secret") {
				continue
			}
			must(t, yaml.UnmarshalStrict([]byte(document), s))
			shown[fmt.Sprintf("docs/stores.md, %d", i)] = s
		}
	}
	kinds := map[checkpointv1alpha1.CheckpointStoreType]bool{}
	for where, s := range shown {
		kinds[s.Spec.Type] = true
		if err := shared.client.Create(t.Context(), s, client.DryRunAll); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	if len(kinds) != 5 {
		t.Errorf("the kinds %v are shown, and not all five", kinds)
	}
}
