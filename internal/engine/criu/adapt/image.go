package adapt

import (
	"encoding/binary"

	"podstasis.dev/stasis/internal/contents/images"
)

// image is one of CRIU's, as it is written: two magic numbers, then entries, each
// after its length.
type image []byte

func newImage(magic images.Magic) image {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, images.Common), uint32(magic))
}

func (i *image) add(entry []byte) {
	*i = append(binary.LittleEndian.AppendUint32(*i, uint32(len(entry))), entry...)
}
