package stores

import (
	"errors"
	"fmt"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/open"
)

// ErrReplaced says that the store at an object's place is not the one that was there.
var ErrReplaced = errors.New("another store is at this place")

// invalidError says which field of the object is wrong.
type invalidError struct {
	field string
	err   error
}

func (e *invalidError) Error() string { return e.field + ": " + e.err.Error() }
func (e *invalidError) Unwrap() error { return e.err }

// credentialsError and keyError say so of the fields that name Secrets.
type (
	credentialsError invalidError
	keyError         invalidError
)

func (e *credentialsError) Error() string { return e.field + ": " + e.err.Error() }
func (e *credentialsError) Unwrap() error { return e.err }
func (e *keyError) Error() string         { return e.field + ": " + e.err.Error() }
func (e *keyError) Unwrap() error         { return e.err }

// unreadError says that the API server did not give a Secret: it may be right.
type unreadError struct{ error }

func (e *unreadError) Unwrap() error { return e.error }

// fields are those of an object by what open.Config calls them.
var fields = map[checkpointv1alpha1.CheckpointStoreType]string{
	checkpointv1alpha1.CheckpointStoreTypeDirectory: "spec.directory.",
	checkpointv1alpha1.CheckpointStoreTypeS3:        "spec.s3.",
	checkpointv1alpha1.CheckpointStoreTypeGCS:       "spec.gcs.",
	checkpointv1alpha1.CheckpointStoreTypeAzure:     "spec.azure.",
	checkpointv1alpha1.CheckpointStoreTypeRegistry:  "spec.registry.",
}

// explain says of an error which field of the object it comes of.
func (o Opener) explain(object *checkpointv1alpha1.CheckpointStore, err error) error {
	var wrong *open.FieldError
	switch {
	case errors.As(err, &wrong):
		switch wrong.Field {
		case "credentials":
			if object.Spec.CredentialsSecretName == "" {
				return &credentialsError{"spec.credentialsSecretName", fmt.Errorf("is required: %w", err)}
			}
			return &credentialsError{"spec.credentialsSecretName", fmt.Errorf("the Secret %s/%s: %w", o.Namespace, object.Spec.CredentialsSecretName, err)}
		case "ca":
			return &invalidError{"spec.caBundle", err}
		case "insecure", "kind":
			return &invalidError{"spec", err}
		}
		field := wrong.Field
		if field == "bucket" && object.Spec.Azure != nil {
			field = "container"
		}
		return &invalidError{fields[object.Spec.Type] + field, err}
	case errors.Is(err, backend.ErrDenied) && object.Spec.CredentialsSecretName != "":
		return fmt.Errorf("by Secret %s/%s: %w", o.Namespace, object.Spec.CredentialsSecretName, err)
	case errors.Is(err, store.ErrKey):
		if object.Spec.EncryptionSecretName == nil {
			return &keyError{"spec.encryptionSecretName", fmt.Errorf("is not set: %w", err)}
		}
		return &keyError{"spec.encryptionSecretName", fmt.Errorf("the Secret %s/%s: %w", o.Namespace, *object.Spec.EncryptionSecretName, err)}
	}
	return err
}

// Reason says of an error with a store what a condition Ready has for a reason.
func Reason(err error) string {
	var (
		unread      *unreadError
		credentials *credentialsError
		key         *keyError
		invalid     *invalidError
	)
	switch {
	case errors.As(err, &unread):
		return checkpointv1alpha1.ReasonStoreUnreachable
	case errors.Is(err, ErrReplaced):
		return checkpointv1alpha1.ReasonStoreReplaced
	case errors.As(err, &credentials), errors.Is(err, backend.ErrDenied):
		return checkpointv1alpha1.ReasonCredentialsInvalid
	case errors.As(err, &key), errors.Is(err, store.ErrKey):
		return checkpointv1alpha1.ReasonKeyInvalid
	case errors.As(err, &invalid), errors.Is(err, backend.ErrInvalid):
		return checkpointv1alpha1.ReasonStoreInvalid
	case errors.Is(err, store.ErrCorrupt):
		return checkpointv1alpha1.ReasonStoreCorrupt
	case errors.Is(err, backend.ErrFull):
		return checkpointv1alpha1.ReasonStoreFull
	}
	return checkpointv1alpha1.ReasonStoreUnreachable
}
