package admission

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestAStoreWithoutAPlaceSaysWhichHowFullAndWhatToDo(t *testing.T) {
	mebibytes := func(n int64) *resource.Quantity { return resource.NewQuantity(n<<20, resource.BinarySI) }
	with := func(change func(*checkpointv1alpha1.CheckpointStore)) *checkpointv1alpha1.CheckpointStore {
		s := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Status: checkpointv1alpha1.CheckpointStoreStatus{StoredBytes: 100 << 20,
			Namespaces: []checkpointv1alpha1.NamespaceUsage{{Name: "m", Checkpoints: 9, StoredBytes: 90 << 20}, {Name: "n", Checkpoints: 2, StoredBytes: 10 << 20}}}}
		change(s)
		return s
	}
	for name, tc := range map[string]struct {
		store *checkpointv1alpha1.CheckpointStore
		words []string // none: it has a place
	}{
		"no bounds":                {with(func(*checkpointv1alpha1.CheckpointStore) {}), nil},
		"none of that name":        {nil, []string{`CheckpointStore "s" does not exist`}},
		"being deleted":            {with(func(s *checkpointv1alpha1.CheckpointStore) { s.DeletionTimestamp = &metav1.Time{} }), []string{`"s" is being deleted`}},
		"for its namespace":        {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.Namespaces = []string{"m", "n"} }), nil},
		"for others":               {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.Namespaces = []string{"m"} }), []string{`"s" is not for namespace "n"`, "spec.namespaces"}},
		"room":                     {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.Capacity = mebibytes(101) }), nil},
		"full":                     {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.Capacity = mebibytes(100) }), []string{`"s" is full`, "100Mi", "delete checkpoints"}},
		"room in the namespace":    {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.NamespaceCapacity = mebibytes(11) }), nil},
		"the namespace's is full":  {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.NamespaceCapacity = mebibytes(10) }), []string{`the 2 checkpoints of namespace "n" take 10Mi`, `"s"`, "spec.namespaceCapacity is 10Mi"}},
		"another namespace's only": {with(func(s *checkpointv1alpha1.CheckpointStore) { s.Spec.NamespaceCapacity = mebibytes(50) }), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := noPlace(tc.store, "s", "n")
			if (got == "") != (tc.words == nil) {
				t.Fatalf("%q", got)
			}
			for _, w := range tc.words {
				if !strings.Contains(got, w) {
					t.Errorf("%q does not say %q", got, w)
				}
			}
		})
	}
}
