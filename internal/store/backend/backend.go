// Package backend is where a checkpoint store keeps its objects: a directory, object
// storage, an OCI registry. It knows nothing of what is in them.
package backend

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
)

// MaxObject bounds an object, in bytes. A store cuts what is larger.
const MaxObject = 64 << 20

var (
	// ErrNotFound says that there is no object of that name.
	ErrNotFound = errors.New("no such object in the store")
	// ErrDenied says that the credentials are missing, wrong or not enough. Trying again
	// does not help.
	ErrDenied = errors.New("the store refuses access")
	// ErrFull says that there is no room for the object, by the device or by a quota.
	ErrFull = errors.New("the store is full")
	// ErrNoStore says that what should hold the objects is not there: the directory, the
	// bucket. It never stands for a single object that is missing.
	ErrNoStore = errors.New("there is no store at this place")
	// ErrInvalid says that the call cannot be served by any store: a bad name, a size
	// beyond MaxObject, a range beyond the object's end.
	ErrInvalid = errors.New("not a valid request to a store")
)

// Object is what a store knows of an object.
type Object struct {
	Name string
	Size int64 // in bytes
}

// Backend keeps objects under names. Its methods may be called from many goroutines,
// and many processes on many nodes work with one store at the same time.
//
// What was written is seen by every Read and List that begins after Put has returned,
// and what was deleted by none.
//
// No name is also the part before the slash of another.
//
// An error is one of this package's, or the context's, or else is worth another try.
type Backend interface {
	// Put stores an object, whole or not at all, also if the process is killed in the
	// middle. One of that name is replaced. It is durable when Put returns. refs names
	// objects, all stored before, that the object is of no use without: a backend that
	// removes by itself what nothing refers to keeps them while this one is there.
	Put(ctx context.Context, name string, data []byte, refs []string) error
	// Read reads length bytes of an object, from an offset on; a negative offset counts
	// from the end. It returns exactly so many bytes, or an error. A length of -1 is
	// all that there is from the offset on. Whole objects are compared with what the
	// store knows of their digest, where it does; parts are not.
	Read(ctx context.Context, name string, offset, length int64) ([]byte, error)
	// List goes through the objects whose names begin with prefix, in any order. What is
	// put or deleted meanwhile may be listed or not. It ends after the first error.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]
	// Delete deletes an object. One that is not there is no error.
	Delete(ctx context.Context, name string) error
	// Close gives connections back.
	Close() error
}

// validName has one slash at most: "packs/0a1b…", "store.json".
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,99}(/[a-z0-9][a-z0-9.-]{0,99})?$`)

// CheckName says whether an object may be called so. Names that pass are safe as paths
// below a directory, as keys of object storage and, with the slash replaced, as tags of
// a registry.
func CheckName(name string) error {
	if !validName.MatchString(name) || len(name) > 120 {
		return fmt.Errorf("%w: the object name %q", ErrInvalid, name)
	}
	return nil
}

// CheckPut says whether these arguments of Put can be served.
func CheckPut(name string, data []byte, refs []string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if len(data) > MaxObject {
		return fmt.Errorf("%w: the object %s has %d bytes, more than %d", ErrInvalid, name, len(data), MaxObject)
	}
	for _, ref := range refs {
		if err := CheckName(ref); err != nil {
			return fmt.Errorf("what %s refers to: %w", name, err)
		}
	}
	return nil
}

// CheckRead says whether these arguments of Read can be served for some size of object.
func CheckRead(name string, offset, length int64) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if length < -1 || length > MaxObject {
		return fmt.Errorf("%w: %d bytes of the object %s", ErrInvalid, length, name)
	}
	return nil
}

// Range resolves offset and length, as Read is given them, in an object of this size.
func Range(name string, size, offset, length int64) (from, n int64, err error) {
	from = offset
	if offset < 0 {
		from = size + offset
	}
	n = length
	if length < 0 {
		n = size - from
	}
	if from < 0 || from > size || n > size-from {
		return 0, 0, fmt.Errorf("%w: %d bytes from %d on of the object %s, which has %d", ErrInvalid, length, offset, name, size)
	}
	if n > MaxObject {
		return 0, 0, fmt.Errorf("%w: the object %s has %d bytes, more than %d", ErrInvalid, name, size, MaxObject)
	}
	return from, n, nil
}
