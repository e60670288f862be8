package registration

import (
	"encoding/base64"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/yaml"
)

var moment = time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)

func registrar(objects ...client.Object) (*Registrar, *clocktesting.FakeClock) {
	clock := clocktesting.NewFakeClock(moment)
	return &Registrar{Client: fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(objects...).Build(),
		Namespace: "stasis-system", Service: "stasis-apiserver", Clock: clock, Log: slog.New(slog.DiscardHandler)}, clock
}

func system() *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "stasis-system"}}
}

func read(t *testing.T, c client.Client) *unstructured.Unstructured {
	t.Helper()
	entry := empty()
	err := c.Get(t.Context(), client.ObjectKey{Name: Name}, entry)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return entry
}

func bundle(entry *unstructured.Unstructured) string {
	text, _, _ := unstructured.NestedString(entry.Object, "spec", "caBundle")
	b, _ := base64.StdEncoding.DecodeString(text)
	return string(b)
}

func TestTheEntryThatIsMadeIsTheOneThatIsInstalled(t *testing.T) {
	content, err := os.ReadFile("../../../config/apiservice/apiservice.yaml")
	if err != nil {
		t.Fatal(err)
	}
	installed := &unstructured.Unstructured{}
	content, err = yaml.YAMLToJSON(content)
	if err != nil {
		t.Fatal(err)
	}
	if err := installed.UnmarshalJSON(content); err != nil {
		t.Fatal(err)
	}
	r, _ := registrar(system())
	made := r.entry("")
	if diff := cmp.Diff(installed.Object["spec"], made.Object["spec"]); diff != "" {
		t.Errorf("spec (-config +made):\n%s", diff)
	}
	if installed.GetName() != made.GetName() || installed.GroupVersionKind() != made.GroupVersionKind() {
		t.Errorf("%s %s, want %s %s", made.GroupVersionKind(), made.GetName(), installed.GroupVersionKind(), installed.GetName())
	}
}

func TestTheEntryIsMadeAgainAndTrustsTheAuthorities(t *testing.T) {
	r, _ := registrar(system())
	for _, authorities := range []string{"first", "second"} {
		if err := r.Keep(t.Context(), []byte(authorities)); err != nil {
			t.Fatal(err)
		}
		if got := bundle(read(t, r.Client)); got != authorities {
			t.Errorf("it trusts %q, want %q", got, authorities)
		}
	}
	// What others keep there stays.
	if err := r.Keep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got := bundle(read(t, r.Client)); got != "second" {
		t.Errorf("it trusts %q", got)
	}
}

func TestNoEntryIsMadeWhileStasisIsBeingRemoved(t *testing.T) {
	now := metav1.NewTime(moment)
	leaving := system()
	leaving.DeletionTimestamp, leaving.Finalizers = &now, []string{"kubernetes"}
	for name, objects := range map[string][]client.Object{"namespace gone": nil, "namespace going": {leaving}} {
		t.Run(name, func(t *testing.T) {
			r, _ := registrar(objects...)
			if err := r.Keep(t.Context(), []byte("a")); err != nil {
				t.Fatal(err)
			}
			if read(t, r.Client) != nil {
				t.Error("made")
			}
		})
	}
}

func TestTheEntryGoesWithTheNamespaceAndNotWithAReplica(t *testing.T) {
	now := metav1.NewTime(moment)
	leaving := system()
	leaving.DeletionTimestamp, leaving.Finalizers = &now, []string{"kubernetes"}
	for name, tc := range map[string]struct {
		namespace *corev1.Namespace
		kept      bool
	}{"a replica ends": {system(), true}, "Stasis is removed": {leaving, false}} {
		t.Run(name, func(t *testing.T) {
			r, _ := registrar(tc.namespace)
			if err := r.Client.Create(t.Context(), r.entry("")); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the other replica finds it gone
				if err := r.Withdraw(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if kept := read(t, r.Client) != nil; kept != tc.kept {
				t.Errorf("kept: %v", kept)
			}
		})
	}
}

func TestAnEntryThatIsTakenAwayAgainAndAgainDoesNotComeBackAtOnce(t *testing.T) {
	r, clock := registrar(system())
	keep := func() bool {
		t.Helper()
		if err := r.Keep(t.Context(), []byte("a")); err != nil {
			t.Fatal(err)
		}
		return read(t, r.Client) != nil
	}
	if !keep() {
		t.Fatal("not made")
	}
	if err := r.Client.Delete(t.Context(), read(t, r.Client)); err != nil {
		t.Fatal(err)
	}
	if keep() {
		t.Error("made again at once")
	}
	clock.Step(restored)
	if !keep() {
		t.Error("never made again")
	}
}

func TestAnEntryIsTakenAwayOnlyWhenItHasLedNowhereForAWhile(t *testing.T) {
	for name, tc := range map[string]struct {
		condition, status string
		age               time.Duration
		kept              bool
	}{
		"served":                         {"Available", "True", time.Hour, true},
		"nobody knows":                   {"Available", "Unknown", time.Hour, true},
		"not served for a moment":        {"Available", "False", patience - time.Second, true},
		"not served":                     {"Available", "False", patience, false},
		"something else is not the case": {"Other", "False", time.Hour, true},
	} {
		t.Run(name, func(t *testing.T) {
			r, clock := registrar(system())
			entry := r.entry("")
			entry.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": tc.condition, "status": tc.status,
				"lastTransitionTime": moment.Add(-tc.age).Format(time.RFC3339)}}}
			if err := r.Client.Create(t.Context(), entry); err != nil {
				t.Fatal(err)
			}
			g := &Guard{Client: r.Client, Clock: clock, Log: slog.New(slog.DiscardHandler)}
			if err := g.Look(t.Context()); err != nil {
				t.Fatal(err)
			}
			if kept := read(t, r.Client) != nil; kept != tc.kept {
				t.Errorf("kept: %v", kept)
			}
		})
	}
}
