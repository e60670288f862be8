// Package stores opens the checkpoint stores that CheckpointStore objects describe, for
// agents and controller alike. It is what knows both an object of the API and a store.
package stores

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/open"
)

// keySize is that of an encryption key, in bytes.
const keySize = 32

// Opener opens stores. Reader needs no right but to get single Secrets of Namespace.
type Opener struct {
	Reader client.Reader
	// Namespace is where Stasis is installed, and where the Secrets are.
	Namespace string
	// Retry says how long a request is tried again.
	Retry backend.Policy
}

// Open opens the store of an object as an agent does, which has time.
func Open(ctx context.Context, reader client.Reader, namespace string, object *checkpointv1alpha1.CheckpointStore) (*store.Store, func() error, error) {
	return Opener{Reader: reader, Namespace: namespace}.Open(ctx, object)
}

// Open opens the store of an object, and returns what gives its connections back. Where
// the object's status has a storeID, the store has to be that one. Reason says what kind
// of error it was.
func (o Opener) Open(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) (*store.Store, func() error, error) {
	b, keys, err := o.connect(ctx, object)
	if err != nil {
		return nil, nil, fmt.Errorf("CheckpointStore %q: %w", object.Name, err)
	}
	s, err := store.Open(ctx, b, keys)
	if err == nil && object.Status.StoreID != "" && s.ID() != object.Status.StoreID {
		err = fmt.Errorf("%w: %s is there, and it was %s: restore what was there, or create another CheckpointStore", ErrReplaced, s.ID(), object.Status.StoreID)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("CheckpointStore %q: open the store: %w", object.Name, errors.Join(o.explain(object, err), b.Close()))
	}
	return s, b.Close, nil
}

// Create makes the store of an object whose place has none, and opens it. Only one
// process may do so at a time. An object with a storeID had its store already.
func (o Opener) Create(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) (*store.Store, func() error, error) {
	if id := object.Status.StoreID; id != "" {
		return nil, nil, fmt.Errorf("CheckpointStore %q: %w: there is none, and it was %s: restore what was there, or create another CheckpointStore", object.Name, ErrReplaced, id)
	}
	b, keys, err := o.connect(ctx, object)
	if err != nil {
		return nil, nil, fmt.Errorf("CheckpointStore %q: %w", object.Name, err)
	}
	var key *store.Key
	if len(keys) > 0 {
		key = &keys[len(keys)-1]
	}
	if err := store.Create(ctx, b, key); err != nil && !errors.Is(err, store.ErrExists) {
		return nil, nil, fmt.Errorf("CheckpointStore %q: make the store: %w", object.Name, errors.Join(o.explain(object, err), b.Close()))
	}
	if err := b.Close(); err != nil {
		return nil, nil, fmt.Errorf("CheckpointStore %q: %w", object.Name, err)
	}
	return o.Open(ctx, object)
}

// Rotate has a store opened by the primary key of its Secret, and by no other. It says
// whether that was not so before.
func (o Opener) Rotate(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, s *store.Store) (bool, error) {
	keys, err := o.keys(ctx, object)
	if err != nil {
		return false, fmt.Errorf("CheckpointStore %q: %w", object.Name, err)
	}
	if len(keys) == 0 {
		return false, nil
	}
	primary := keys[len(keys)-1]
	if by := s.WrappedBy(); len(by) == 1 && by[0] == primary.Name {
		return false, nil
	}
	if err := s.Rotate(ctx, keys, primary); err != nil {
		return false, fmt.Errorf("CheckpointStore %q: have it opened by key %q: %w", object.Name, primary.Name, err)
	}
	return true, nil
}

func (o Opener) connect(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) (backend.Backend, []store.Key, error) {
	config, err := o.config(ctx, object)
	if err != nil {
		return nil, nil, err
	}
	keys, err := o.keys(ctx, object)
	if err != nil {
		return nil, nil, err
	}
	if err := config.Validate(); err != nil {
		return nil, nil, o.explain(object, err)
	}
	b, err := open.Open(ctx, config)
	if err != nil {
		return nil, nil, o.explain(object, err)
	}
	return backend.Retrying(b, o.Retry), keys, nil
}

// config makes a backend's configuration of an object and its Secret.
func (o Opener) config(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) (open.Config, error) {
	spec := &object.Spec
	c := open.Config{Kind: open.Kind(spec.Type), CA: spec.CABundle, Insecure: spec.Insecure}
	none := func(member string) error {
		return &invalidError{"spec." + member, fmt.Errorf("is required with the type %s", spec.Type)}
	}
	switch spec.Type {
	case checkpointv1alpha1.CheckpointStoreTypeDirectory:
		if spec.Directory == nil {
			return c, none("directory")
		}
		c.Path = spec.Directory.Path
	case checkpointv1alpha1.CheckpointStoreTypeS3:
		if spec.S3 == nil {
			return c, none("s3")
		}
		c.Bucket, c.Prefix, c.Region, c.Endpoint, c.PathStyle = spec.S3.Bucket, spec.S3.Prefix, spec.S3.Region, spec.S3.Endpoint, spec.S3.PathStyle
	case checkpointv1alpha1.CheckpointStoreTypeGCS:
		if spec.GCS == nil {
			return c, none("gcs")
		}
		c.Bucket, c.Prefix, c.Endpoint = spec.GCS.Bucket, spec.GCS.Prefix, spec.GCS.Endpoint
	case checkpointv1alpha1.CheckpointStoreTypeAzure:
		if spec.Azure == nil {
			return c, none("azure")
		}
		c.Account, c.Bucket, c.Prefix, c.Endpoint = spec.Azure.Account, spec.Azure.Container, spec.Azure.Prefix, spec.Azure.Endpoint
	case checkpointv1alpha1.CheckpointStoreTypeRegistry:
		if spec.Registry == nil {
			return c, none("registry")
		}
		c.Repository = spec.Registry.Repository
	default:
		return c, &invalidError{"spec.type", fmt.Errorf("%q is not known to this Stasis", spec.Type)}
	}
	if spec.CredentialsSecretName != "" {
		secret, err := o.secret(ctx, spec.CredentialsSecretName)
		if err != nil {
			return c, &credentialsError{"spec.credentialsSecretName", err}
		}
		c.Credentials = secret.Data
	}
	return c, nil
}

// keys reads an object's encryption keys, sorted by name: the last is the primary one.
// There are none where it is not encrypted.
func (o Opener) keys(ctx context.Context, object *checkpointv1alpha1.CheckpointStore) ([]store.Key, error) {
	if object.Spec.EncryptionSecretName == nil {
		return nil, nil
	}
	const field = "spec.encryptionSecretName"
	secret, err := o.secret(ctx, *object.Spec.EncryptionSecretName)
	if err != nil {
		return nil, &keyError{field, err}
	}
	if len(secret.Data) == 0 {
		return nil, &keyError{field, fmt.Errorf("the Secret %s/%s has no entry; each of them is a key of %d bytes", o.Namespace, secret.Name, keySize)}
	}
	var keys []store.Key
	for name, key := range secret.Data {
		if len(key) != keySize {
			return nil, &keyError{field, fmt.Errorf("entry %q of Secret %s/%s has %d bytes; a key has exactly %d, such as of `head -c %d /dev/urandom`",
				name, o.Namespace, secret.Name, len(key), keySize, keySize)}
		}
		keys = append(keys, store.Key{Name: name, Key: key})
	}
	slices.SortFunc(keys, func(a, b store.Key) int { return strings.Compare(a.Name, b.Name) })
	return keys, nil
}

func (o Opener) secret(ctx context.Context, name string) (*corev1.Secret, error) {
	var secret corev1.Secret
	err := o.Reader.Get(ctx, client.ObjectKey{Namespace: o.Namespace, Name: name}, &secret)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("there is no Secret %q in namespace %q: create it there", name, o.Namespace)
	}
	if err != nil {
		return nil, &unreadError{fmt.Errorf("read Secret %s/%s: %w", o.Namespace, name, err)}
	}
	return &secret, nil
}
