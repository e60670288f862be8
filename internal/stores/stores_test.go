package stores

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
)

const namespace = "stasis-system"

// onlyGet is the right that agents have: whatever else is asked for is not there.
type onlyGet struct{ client.Reader }

func (onlyGet) List(context.Context, client.ObjectList, ...client.ListOption) error {
	return errors.New("forbidden: list")
}

func opener(t *testing.T, secrets map[string]map[string][]byte) Opener {
	t.Helper()
	b := fake.NewClientBuilder()
	for name, data := range secrets {
		b.WithObjects(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Data: data})
	}
	return Opener{Reader: onlyGet{b.Build()}, Namespace: namespace, Retry: backend.Policy{Total: time.Millisecond}}
}

func inDirectory(path, encryption string) *checkpointv1alpha1.CheckpointStore {
	object := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: checkpointv1alpha1.CheckpointStoreTypeDirectory, Directory: &checkpointv1alpha1.DirectoryStore{Path: path}}}
	if encryption != "" {
		object.Spec.EncryptionSecretName = &encryption
	}
	return object
}

func key(letter string) []byte { return []byte(strings.Repeat(letter, 32)) }

// made creates a store and returns its ID.
func made(t *testing.T, o Opener, object *checkpointv1alpha1.CheckpointStore) string {
	t.Helper()
	s, done, err := o.Create(t.Context(), object)
	if err != nil {
		t.Fatal(err)
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
	return s.ID()
}

func TestAStoreIsMadeOnceAndOpenedByWhoMayOnlyGetSecrets(t *testing.T) {
	object := inDirectory(filepath.Join(t.TempDir(), "store"), "keys")
	o := opener(t, map[string]map[string][]byte{"keys": {"2026-10": key("a"), "2026-11": key("b")}})
	if _, _, err := o.Open(t.Context(), object); !errors.Is(err, store.ErrMissing) {
		t.Fatalf("an empty place: %v", err)
	}
	id := made(t, o, object)
	if again := made(t, o, object); again != id {
		t.Fatalf("made again: %s, then %s", id, again)
	}
	object.Status.StoreID = id
	s, done, err := Open(t.Context(), o.Reader, namespace, object)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if by := s.WrappedBy(); len(by) != 1 || by[0] != "2026-11" {
		t.Errorf("it is encrypted by %v, and not by the last key in the alphabet", by)
	}
}

func TestAStoreIsRotatedToTheLastKeyAndNoOtherOpensItAfter(t *testing.T) {
	object := inDirectory(filepath.Join(t.TempDir(), "store"), "keys")
	before := opener(t, map[string]map[string][]byte{"keys": {"1": key("a")}})
	made(t, before, object)
	o := opener(t, map[string]map[string][]byte{"keys": {"1": key("a"), "2": key("b")}})
	for _, want := range []bool{true, false} {
		s, done, err := o.Open(t.Context(), object)
		if err != nil {
			t.Fatal(err)
		}
		rotated, err := o.Rotate(t.Context(), object, s)
		if err != nil || rotated != want {
			t.Errorf("rotated: %v, %v; want %v", rotated, err, want)
		}
		done()
	}
	_, _, err := before.Open(t.Context(), object)
	if Reason(err) != checkpointv1alpha1.ReasonKeyInvalid || !strings.Contains(err.Error(), "Secret stasis-system/keys") {
		t.Errorf("the old key alone: %s: %v", Reason(err), err)
	}
}

func TestAnotherStoreAtThePlaceIsRefused(t *testing.T) {
	dir := t.TempDir()
	object, o := inDirectory(filepath.Join(dir, "one"), ""), opener(t, nil)
	made(t, o, object)
	object.Status.StoreID = strings.Repeat("0", 32)
	for name, open := range map[string]func(context.Context, *checkpointv1alpha1.CheckpointStore) (*store.Store, func() error, error){"open": o.Open, "create": o.Create} {
		if _, _, err := open(t.Context(), object); !errors.Is(err, ErrReplaced) || Reason(err) != checkpointv1alpha1.ReasonStoreReplaced {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is wrong is said by the names that users gave it.
func TestErrorsNameTheFieldTheSecretAndItsKey(t *testing.T) {
	name := func(s string) *string { return &s }
	s3 := func(secret string) checkpointv1alpha1.CheckpointStoreSpec {
		return checkpointv1alpha1.CheckpointStoreSpec{Type: checkpointv1alpha1.CheckpointStoreTypeS3, CredentialsSecretName: secret,
			S3: &checkpointv1alpha1.S3Store{Bucket: "bucket", Region: "r", Endpoint: "https://127.0.0.1:1"}}
	}
	plain := s3("whole")
	plain.S3 = &checkpointv1alpha1.S3Store{Bucket: "bucket", Region: "r", Endpoint: "http://127.0.0.1:1"}
	authority := s3("whole")
	authority.CABundle = []byte("no certificate")
	encrypted := func(secret string) checkpointv1alpha1.CheckpointStoreSpec {
		return checkpointv1alpha1.CheckpointStoreSpec{Type: checkpointv1alpha1.CheckpointStoreTypeDirectory,
			Directory: &checkpointv1alpha1.DirectoryStore{Path: filepath.Join(t.TempDir(), "s")}, EncryptionSecretName: name(secret)}
	}
	azure := checkpointv1alpha1.CheckpointStoreSpec{Type: checkpointv1alpha1.CheckpointStoreTypeAzure, CredentialsSecretName: "azure",
		Azure: &checkpointv1alpha1.AzureStore{Account: "account", Container: "a/b"}}
	for what, test := range map[string]struct {
		spec   checkpointv1alpha1.CheckpointStoreSpec
		reason string
		words  []string
	}{
		"no such Secret":             {s3("none"), checkpointv1alpha1.ReasonCredentialsInvalid, []string{`CheckpointStore "s"`, "spec.credentialsSecretName", `no Secret "none" in namespace "stasis-system"`}},
		"no Secret named":            {s3(""), checkpointv1alpha1.ReasonCredentialsInvalid, []string{"spec.credentialsSecretName: is required"}},
		"a Secret without a key":     {s3("half"), checkpointv1alpha1.ReasonCredentialsInvalid, []string{"Secret stasis-system/half", "no secret-access-key"}},
		"plain HTTP":                 {plain, checkpointv1alpha1.ReasonStoreInvalid, []string{"spec.s3.endpoint", "insecure"}},
		"certificates that are no":   {authority, checkpointv1alpha1.ReasonStoreInvalid, []string{"spec.caBundle"}},
		"a container's name":         {azure, checkpointv1alpha1.ReasonStoreInvalid, []string{"spec.azure.container", `"a/b"`}},
		"a member that is missing":   {checkpointv1alpha1.CheckpointStoreSpec{Type: "S3"}, checkpointv1alpha1.ReasonStoreInvalid, []string{"spec.s3: is required"}},
		"a type of the future":       {checkpointv1alpha1.CheckpointStoreSpec{Type: "Tape"}, checkpointv1alpha1.ReasonStoreInvalid, []string{`spec.type: "Tape"`}},
		"no Secret of keys":          {encrypted("none"), checkpointv1alpha1.ReasonKeyInvalid, []string{"spec.encryptionSecretName", `no Secret "none"`}},
		"a Secret of no keys":        {encrypted("empty"), checkpointv1alpha1.ReasonKeyInvalid, []string{"Secret stasis-system/empty has no entry"}},
		"a key of another size":      {encrypted("short"), checkpointv1alpha1.ReasonKeyInvalid, []string{`entry "k" of Secret stasis-system/short has 31 bytes`}},
		"a server that is not there": {s3("whole"), checkpointv1alpha1.ReasonStoreUnreachable, []string{"127.0.0.1:1"}},
		"no such directory": {checkpointv1alpha1.CheckpointStoreSpec{Type: "Directory", Directory: &checkpointv1alpha1.DirectoryStore{Path: "/not/there/at/all"}},
			checkpointv1alpha1.ReasonStoreUnreachable, []string{"/not/there/at does not exist"}},
	} {
		o := opener(t, map[string]map[string][]byte{
			"half": {"access-key-id": []byte("id")}, "whole": {"access-key-id": []byte("id"), "secret-access-key": []byte("private")},
			"empty": {}, "short": {"k": key("a")[1:]}, "azure": {"account-key": []byte("bm9uZQ==")}})
		_, _, err := o.Open(t.Context(), &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: test.spec})
		if err == nil {
			t.Errorf("%s: opened", what)
			continue
		}
		if Reason(err) != test.reason {
			t.Errorf("%s: %s, want %s: %v", what, Reason(err), test.reason, err)
		}
		for _, word := range test.words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q does not say %q", what, err, word)
			}
		}
		if strings.Contains(err.Error(), "private") {
			t.Errorf("%s: it tells the credentials: %v", what, err)
		}
	}
}

func TestASecretThatCouldNotBeReadMakesNothingInvalid(t *testing.T) {
	o := Opener{Reader: broken{}, Namespace: namespace}
	for _, object := range []*checkpointv1alpha1.CheckpointStore{inDirectory(t.TempDir(), "keys"), {Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: "Registry", Registry: &checkpointv1alpha1.RegistryStore{Repository: "r.example/x"}, CredentialsSecretName: "c"}}} {
		if _, _, err := o.Open(t.Context(), object); Reason(err) != checkpointv1alpha1.ReasonStoreUnreachable || !strings.Contains(err.Error(), "the API server is away") {
			t.Errorf("%s: %v", Reason(err), err)
		}
	}
}

type broken struct{ client.Reader }

func (broken) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("the API server is away")
}
