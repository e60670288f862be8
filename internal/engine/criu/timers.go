package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A timerfd with an interval that has expired and that nobody has read is not armed:
// the kernel arms it again when it is read (timerfd_create(2)). CRIU writes it down as
// one that is disarmed, and restored so it would never expire again. Any such timer
// whose interval is shorter than the time between the freeze and CRIU's look is one of
// them. So what it has left is put into CRIU's image: as little as there is.

const (
	filesImage    = "files.img"
	maxFilesImage = 256 << 20
	imageHead     = 8 // two magic numbers
	// Fields of CRIU's messages file_entry and timerfd_entry, and the type of varints.
	fieldTimer                                                       = 12
	fieldTicks, fieldSeconds, fieldNanoseconds, fieldEvery, fieldAnd = 5, 7, 8, 9, 10
	typeVarint, typeFixed64, typeBytes, typeFixed32                  = 0, 1, 2, 5
)

var errFilesImage = errors.New(filesImage + " is not as CRIU writes it")

// armTimers changes CRIU's image of files in a directory.
func armTimers(dir string) error {
	name := filepath.Join(dir, filesImage)
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.Size() > maxFilesImage {
		return fmt.Errorf("%w: it is of %d bytes", errFilesImage, info.Size())
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	out, changed, err := withTimersArmed(data)
	if err != nil || !changed {
		return err
	}
	return os.WriteFile(name, out, info.Mode().Perm())
}

// withTimersArmed goes through the image's entries, each with its size before it.
func withTimersArmed(data []byte) (out []byte, changed bool, err error) {
	if len(data) < imageHead {
		return nil, false, errFilesImage
	}
	out, data = append(out, data[:imageHead]...), data[imageHead:]
	for len(data) > 0 {
		if len(data) < 4 || uint64(binary.LittleEndian.Uint32(data)) > uint64(len(data)-4) {
			return nil, false, errFilesImage
		}
		entry := data[4 : 4+binary.LittleEndian.Uint32(data)]
		data = data[4+len(entry):]
		var armed []byte
		err := eachField(entry, func(f protoField) error {
			if f.number != fieldTimer || f.kind != typeBytes {
				armed = append(armed, f.raw...)
				return nil
			}
			timer, did, err := rearmed(f.content)
			changed = changed || did
			armed = binary.AppendUvarint(armed, fieldTimer<<3|typeBytes)
			armed = append(binary.AppendUvarint(armed, uint64(len(timer))), timer...)
			return err
		})
		if err != nil {
			return nil, false, err
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(armed))), armed...)
	}
	return out, changed, nil
}

// rearmed gives a timer that has expired a nanosecond, unless it has something left or
// no interval.
func rearmed(entry []byte) (out []byte, changed bool, err error) {
	values := map[uint64]uint64{}
	err = eachField(entry, func(f protoField) error {
		values[f.number] = f.value
		if f.number != fieldNanoseconds {
			out = append(out, f.raw...)
		}
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	if values[fieldTicks] == 0 || values[fieldSeconds] != 0 || values[fieldNanoseconds] != 0 || values[fieldEvery] == 0 && values[fieldAnd] == 0 {
		return entry, false, nil
	}
	return append(out, fieldNanoseconds<<3|typeVarint, 1), true, nil
}

// protoField is a field of a protocol buffer.
type protoField struct {
	number, kind uint64
	value        uint64 // of a varint
	content      []byte // of bytes
	raw          []byte // all of it
}

// eachField goes through a protocol buffer's fields. stasis-runtime, which this
// package is part of, has no library for them.
func eachField(data []byte, fn func(protoField) error) error {
	for len(data) > 0 {
		key, n := binary.Uvarint(data)
		if n <= 0 {
			return errFilesImage
		}
		f := protoField{number: key >> 3, kind: key & 7}
		size := n
		switch f.kind {
		case typeVarint:
			value, m := binary.Uvarint(data[n:])
			if m <= 0 {
				return errFilesImage
			}
			f.value, size = value, n+m
		case typeBytes:
			length, m := binary.Uvarint(data[n:])
			if m <= 0 || length > uint64(len(data)-n-m) {
				return errFilesImage
			}
			f.content, size = data[n+m:n+m+int(length)], n+m+int(length)
		case typeFixed64:
			size = n + 8
		case typeFixed32:
			size = n + 4
		default:
			return errFilesImage
		}
		if size > len(data) {
			return errFilesImage
		}
		f.raw, data = data[:size], data[size:]
		if err := fn(f); err != nil {
			return err
		}
	}
	return nil
}
