package store

import (
	"errors"
	"fmt"

	"podstasis.dev/stasis/internal/store/backend"
)

// FormatVersion is the version of everything in a store (docs/format.md).
const FormatVersion = 1

// Names of objects. What follows the slash is an ID, or random.
const (
	nameStore       = "store.json"
	prefixKeys      = "keys/"
	prefixPacks     = "packs/"
	prefixRoots     = "checkpoints/"
	prefixLeases    = "writers/"
	prefixCondemned = "condemned/"
	prefixHints     = "hints/"
)

const (
	pageSize  = 4096      // of a block of memory, in bytes
	maxBlock  = 128 << 10 // of any block
	frameSize = 64 << 10  // blocks are added to a frame until it has this
	packSize  = 16 << 20  // frames are added to a pack until it has this
	slabSize  = 1 << 20   // of a file, that one worker takes at a time

	packBlocks = 1 << 16 // or until it has so many blocks

	maxFrame     = frameSize + maxBlock
	maxPack      = packSize + 4*slabSize
	maxPackIndex = 8 << 20
)

var (
	// ErrCorrupt says that an object is not what was written: it was changed, cut, or put
	// under another's name.
	ErrCorrupt = errors.New("the store's data are corrupt")
	// ErrMissing says that a checkpoint, or a part of one, is not in the store.
	ErrMissing = errors.New("the store does not hold it")
	// ErrKey says that none of the keys at hand opens the store.
	ErrKey = errors.New("no key opens the store")
)

// corrupt names the object.
func corrupt(name, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrCorrupt, name, fmt.Sprintf(format, args...))
}

// missing makes a backend's answer this package's.
func missing(name string, err error) error {
	if errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("%w: %s", ErrMissing, name)
	}
	return fmt.Errorf("read %s: %w", name, err)
}
