package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Source is where an archive is read from.
type Source interface {
	// Range reads the bytes first to last, both included, of the archive with this
	// tag. If it has another one by now the error is ErrChanged.
	Range(ctx context.Context, etag string, first, last int64) (io.ReadCloser, error)
}

// Sink takes an archive in order.
type Sink interface {
	io.Writer
	// Mark is called when a part is complete: what was written until now need not be
	// read again after a crash.
	Mark() error
}

// Download writes an archive to sink, from a place on. When it fails, what has been
// written is the archive's beginning.
func Download(ctx context.Context, from Source, object Object, offset int64, to Sink, policy Policy) error {
	window, patience := newWindow(), newPatience(&policy)
	buf := make([]byte, 256<<10)
	for offset < object.Size {
		begun := policy.Now()
		first := offset
		err := readPart(ctx, from, object, &offset, window.next(object.Size-offset), to, buf, &policy)
		if offset > first {
			patience.success()
		}
		if errors.Is(err, errSink) {
			return err
		}
		if err == nil || ctx.Err() != nil {
			if err := to.Mark(); err != nil {
				return err
			}
		}
		if err == nil {
			window.moved(offset-first, policy.Now().Sub(begun))
			continue
		}
		window.broke()
		if err := patience.failed(ctx, err); err != nil {
			return errors.Join(err, to.Mark())
		}
	}
	return nil
}

// errSink marks errors of the side that is written to: trying again does not help.
var errSink = errors.New("writing what has arrived")

// readPart reads one range and moves offset as far as it came.
func readPart(ctx context.Context, from Source, object Object, offset *int64, length int64, to io.Writer, buf []byte, policy *Policy) error {
	w := watch(ctx)
	defer w.end()
	body, err := from.Range(w.ctx, object.ETag, *offset, *offset+length-1)
	if err != nil {
		return w.why(err)
	}
	defer body.Close()
	for rest := length; rest > 0; {
		n, err := body.Read(buf[:min(int64(len(buf)), rest)])
		if n > 0 {
			w.moved()
			if _, err := to.Write(buf[:n]); err != nil {
				return fmt.Errorf("%w: %w", errSink, err)
			}
			*offset += int64(n)
			rest -= int64(n)
			policy.Progress(*offset, object.Size)
		}
		if rest == 0 {
			return nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return w.why(err)
		}
	}
	return nil
}
