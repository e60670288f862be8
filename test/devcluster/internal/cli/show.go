package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// show copies a log, or its last lines, and goes on with what is added when it is to follow.
func show(ctx context.Context, out io.Writer, log io.ReadSeeker, lines int, follow bool) error {
	if lines > 0 {
		if err := seekLines(log, lines); err != nil {
			return fmt.Errorf("reading a log: %w", err)
		}
	}
	for {
		if _, err := io.Copy(out, log); err != nil {
			return fmt.Errorf("reading a log: %w", err)
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// seekLines moves to the start of the last n lines.
func seekLines(log io.ReadSeeker, n int) error {
	end, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	block := make([]byte, 64<<10)
	newlines := 0
	for at := end; at > 0; {
		size := min(at, int64(len(block)))
		at -= size
		if _, err := log.Seek(at, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.ReadFull(log, block[:size]); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		for part := block[:size]; ; {
			i := bytes.LastIndexByte(part, '\n')
			if i < 0 {
				break
			}
			if at+int64(i) != end-1 { // the end of the last line starts no further one
				if newlines++; newlines == n {
					_, err := log.Seek(at+int64(i)+1, io.SeekStart)
					return err
				}
			}
			part = part[:i]
		}
	}
	_, err = log.Seek(0, io.SeekStart)
	return err
}
