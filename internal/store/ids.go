package store

import (
	"encoding/hex"
	"fmt"
)

// ID names a block by its content, a pack by its index, or a checkpoint by its root: 32
// bytes, in hexadecimal where it is shown.
type ID [32]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID reads what String wrote.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*len(id) {
		return id, fmt.Errorf("%q is not 64 hexadecimal digits", s)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil || id.String() != s {
		return id, fmt.Errorf("%q is not 64 hexadecimal digits", s)
	}
	return id, nil
}
