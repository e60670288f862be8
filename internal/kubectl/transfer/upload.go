package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Destination is where an archive is written to.
type Destination interface {
	// Offset asks how many bytes are there.
	Offset(ctx context.Context) (int64, error)
	// Put sends length bytes that belong at first, and returns how many are there
	// after it, from the beginning.
	Put(ctx context.Context, first, length int64, part io.Reader) (int64, error)
}

// Upload sends an archive, from where the destination is.
func Upload(ctx context.Context, from io.ReaderAt, length int64, to Destination, policy Policy) error {
	window, patience := newWindow(), newPatience(&policy)
	offset := int64(-1) // unknown
	for offset < length {
		begun := policy.Now()
		there, err := uploadStep(ctx, from, length, offset, window, to, &policy)
		if err != nil {
			window.broke()
			offset = -1
			if err := patience.failed(ctx, err); err != nil {
				return err
			}
			continue
		}
		if there < 0 || there > length {
			return fmt.Errorf("the server says that it has %d bytes of %d", there, length)
		}
		if there > offset {
			patience.success()
			if offset >= 0 {
				window.moved(there-offset, policy.Now().Sub(begun))
			}
		} else if err := patience.failed(ctx, errNothingTaken); err != nil {
			return err
		}
		offset = there
		policy.Progress(offset, length)
	}
	return nil
}

var errNothingTaken = errors.New("the server has taken nothing of the part that was sent")

// uploadStep asks how much is there, where that is not known, or sends a part.
func uploadStep(ctx context.Context, from io.ReaderAt, length, offset int64, window *window, to Destination, policy *Policy) (int64, error) {
	w := watch(ctx)
	defer w.end()
	if offset < 0 {
		there, err := to.Offset(w.ctx)
		return there, w.why(err)
	}
	part := window.next(length - offset)
	sent := offset
	there, err := to.Put(w.ctx, offset, part, counted{io.NewSectionReader(from, offset, part), func(n int) {
		if n > 0 {
			w.moved()
			sent += int64(n)
			policy.Progress(sent, length)
		}
	}})
	return there, w.why(err)
}
