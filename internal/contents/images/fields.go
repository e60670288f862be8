package images

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field is one field of a message: a number, or bytes.
type Field struct {
	Number int32
	Kind   protowire.Type
	Value  uint64 // of a number
	Bytes  []byte // of a string, bytes or a message
}

// Fields calls each with the fields of a message, without holding any.
func Fields(b []byte, each func(Field) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: %s", ErrFormat, protowire.ParseError(n))
		}
		b = b[n:]
		f := Field{Number: int32(number), Kind: kind}
		switch kind {
		case protowire.VarintType:
			f.Value, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			f.Bytes, n = protowire.ConsumeBytes(b)
		default:
			// No field that is asked for is of another type.
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return fmt.Errorf("%w: %s", ErrFormat, protowire.ParseError(n))
		}
		b = b[n:]
		if err := each(f); err != nil {
			return err
		}
	}
	return nil
}
