package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// Store is an open store. Its methods may be called from many goroutines.
type Store struct {
	backend backend.Backend
	keys    *keys  // nil if it is not encrypted
	id      string // of the store
	wrapped []string
	codec   *codec
	now     func() time.Time
}

// Key encrypts a store's data key: 32 bytes, and a name that says which it is, such as
// "2026-11".
type Key struct {
	Name string
	Key  []byte
}

func (k Key) check() error {
	if len(k.Key) != keySize {
		return fmt.Errorf("key %q is of %d bytes, and %d are needed", k.Name, len(k.Key), keySize)
	}
	return nil
}

// head is the object that makes a backend a store.
type head struct {
	Format    int       `json:"format"`
	ID        string    `json:"id"` // random
	Encrypted bool      `json:"encrypted"`
	Created   time.Time `json:"created"`
	// Sum is of the same object with an empty Sum, as sha256:HEX.
	Sum string `json:"sum"`
}

func (h head) sum() string {
	h.Sum = ""
	return sumOf(h)
}

func sumOf(v any) string {
	sum := sha256.Sum256(plainJSON(v))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// plainJSON encodes what is not sealed. Whoever reads it encodes it again and compares:
// encoding/json reads several spellings alike.
func plainJSON(v any) []byte {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(err) // of structs that have nothing that could fail
	}
	return append(data, '\n')
}

func readPlainJSON(name string, object []byte, into any) error {
	if err := json.Unmarshal(object, into); err != nil {
		return corrupt(name, "%v", err)
	}
	if !bytes.Equal(object, plainJSON(into)) {
		return corrupt(name, "it is not spelt as it was written")
	}
	return nil
}

// wrapped is a store's data key, encrypted by another.
type wrapped struct {
	Name string `json:"name"` // of the key that opens it
	Salt []byte `json:"salt"`
	Data []byte `json:"data"` // AES-256-GCM, by a key that comes of the other and the salt
	Sum  string `json:"sum"`  // as in head; so that what was changed is not taken for another key's
}

func (w wrapped) sum() string {
	w.Sum = ""
	return sumOf(w)
}

// ErrExists says that there is a store already.
var ErrExists = errors.New("there is a store already")

// Create makes a store of a backend that has none. With a key it is encrypted. Only one
// process may do so at a time.
func Create(ctx context.Context, b backend.Backend, key *Key) error {
	if _, err := b.Read(ctx, nameStore, 0, -1); err == nil {
		return ErrExists
	} else if !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("look whether there is a store: %w", err)
	}
	random := make([]byte, 16)
	rand.Read(random) // never fails
	h := head{Format: FormatVersion, ID: hex.EncodeToString(random), Encrypted: key != nil, Created: time.Now().UTC().Truncate(time.Second)}
	h.Sum = h.sum()
	if key != nil {
		data := make([]byte, keySize)
		rand.Read(data) // never fails
		if err := wrap(ctx, b, h.ID, data, *key); err != nil {
			return err
		}
	}
	if err := b.Put(ctx, nameStore, plainJSON(h), nil); err != nil {
		return fmt.Errorf("write %s: %w", nameStore, err)
	}
	return nil
}

// wrap writes a store's data key, encrypted by a key.
func wrap(ctx context.Context, b backend.Backend, store string, data []byte, key Key) error {
	if err := key.check(); err != nil {
		return err
	}
	w := wrapped{Name: key.Name, Salt: randomSalt()}
	w.Data = newKeys(key.Key, store).sealer(w.Salt, "data key "+w.Name).seal(nil, 0, data)
	w.Sum = w.sum()
	name := prefixKeys + hex.EncodeToString(w.Salt)
	if err := b.Put(ctx, name, plainJSON(w), nil); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// Option changes how an open store goes.
type Option func(*Store)

// WithClock has it go by another clock than the machine's.
func WithClock(now func() time.Time) Option { return func(s *Store) { s.now = now } }

// Open opens a store. One of the keys has to be one that it was encrypted by; no keys
// open a store that is not encrypted, and nothing else.
func Open(ctx context.Context, b backend.Backend, with []Key, options ...Option) (*Store, error) {
	object, err := b.Read(ctx, nameStore, 0, -1)
	if err != nil {
		return nil, missing(nameStore, err)
	}
	var h head
	if err := readPlainJSON(nameStore, object, &h); err != nil {
		return nil, err
	}
	if h.Sum != h.sum() {
		return nil, corrupt(nameStore, "its sum is another")
	}
	if h.Format != FormatVersion {
		return nil, fmt.Errorf("the store has format version %d, this Stasis reads version %d", h.Format, FormatVersion)
	}
	if h.Encrypted != (len(with) > 0) {
		if h.Encrypted {
			return nil, fmt.Errorf("%w: it is encrypted, and none was given", ErrKey)
		}
		return nil, fmt.Errorf("%w: keys were given, and it is not encrypted", ErrKey)
	}
	s := &Store{backend: b, id: h.ID, now: time.Now}
	for _, option := range options {
		option(s)
	}
	if s.codec, err = newCodec(); err != nil {
		return nil, err
	}
	if h.Encrypted {
		data, objects, err := s.unwrap(ctx, with)
		if err != nil {
			return nil, err
		}
		s.keys, s.wrapped = newKeys(data, h.ID), slices.Sorted(maps.Keys(objects))
	}
	return s, nil
}

// ID is the store's identity, which never changes.
func (s *Store) ID() string { return s.id }

// WrappedBy are the names of the keys that opened the store when it was opened here.
func (s *Store) WrappedBy() []string { return slices.Clone(s.wrapped) }

// unwrap finds the data key, and the names of the objects that hold it by the names of
// the keys that open them.
func (s *Store) unwrap(ctx context.Context, with []Key) (data []byte, objects map[string][]string, err error) {
	for _, key := range with {
		if err := key.check(); err != nil {
			return nil, nil, err
		}
	}
	objects = map[string][]string{}
	var known []string
	var closed error
	for object, err := range s.backend.List(ctx, prefixKeys) {
		if err != nil {
			return nil, nil, fmt.Errorf("list keys: %w", err)
		}
		stored, err := s.backend.Read(ctx, object.Name, 0, -1)
		if errors.Is(err, backend.ErrNotFound) {
			continue // it was taken away meanwhile
		} else if err != nil {
			return nil, nil, missing(object.Name, err)
		}
		var w wrapped
		if err := readPlainJSON(object.Name, stored, &w); err != nil {
			return nil, nil, err
		}
		if w.Sum != w.sum() {
			return nil, nil, corrupt(object.Name, "its sum is another")
		}
		if object.Name != prefixKeys+hex.EncodeToString(w.Salt) || len(w.Salt) != saltSize {
			return nil, nil, corrupt(object.Name, "its salt is another")
		}
		known = append(known, w.Name)
		objects[w.Name] = append(objects[w.Name], object.Name)
		for _, key := range with {
			if key.Name != w.Name {
				continue
			}
			opened, err := newKeys(key.Key, s.id).sealer(w.Salt, "data key "+w.Name).open(0, w.Data)
			if err != nil || len(opened) != keySize {
				// Whoever was killed while he made the store has left one of another identity.
				closed = fmt.Errorf("%w: key %q does not open %s: it is another key of that name, or the object was changed", ErrKey, key.Name, object.Name)
				continue
			}
			data = opened
		}
	}
	if data == nil && closed != nil {
		return nil, nil, closed
	}
	if data == nil {
		return nil, nil, fmt.Errorf("%w: it was encrypted by %s, and given was none of these", ErrKey, strings.Join(known, ", "))
	}
	return data, objects, nil
}

// Rotate has the store opened by one key, and by no other from then on. The data key
// stays, so that nothing is written again: whoever had both an old key and the wrapped
// data key can still read what they can get hold of.
func (s *Store) Rotate(ctx context.Context, with []Key, key Key) error {
	if s.keys == nil {
		return fmt.Errorf("%w: the store is not encrypted", ErrKey)
	}
	_, objects, err := s.unwrap(ctx, with)
	if err != nil {
		return err
	}
	// Before any other goes, one of this key has to be there, and to open the store.
	if data, _, err := s.unwrap(ctx, []Key{key}); err != nil && !errors.Is(err, ErrKey) {
		return err
	} else if !bytes.Equal(data, s.keys.data) {
		if err := wrap(ctx, s.backend, s.id, s.keys.data, key); err != nil {
			return err
		}
	}
	for name, old := range objects {
		for _, object := range old {
			if name == key.Name {
				continue
			}
			if err := s.backend.Delete(ctx, object); err != nil {
				return fmt.Errorf("delete %s: %w", object, err)
			}
		}
	}
	return nil
}
