package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Partial is a file that is being downloaded: TARGET.partial, and beside it
// TARGET.partial.json, which says of what it is a part and how much of it is safe.
// It survives a kill and a power failure; Finish gives it its name.
type Partial struct {
	target string
	data   *os.File
	hash   hash.Hash
	state  partialState
	at     int64 // written so far
}

type partialState struct {
	Of   string `json:"of"` // what is downloaded, as the caller names it
	ETag string `json:"etag"`
	Size int64  `json:"size"`
	Safe int64  `json:"safe"` // bytes that were fsynced
}

const (
	partialSuffix = ".partial"
	stateSuffix   = ".partial.json"
	maxStateBytes = 64 << 10
)

// OpenPartial goes on with what there is of a download, or begins it. of names what
// is downloaded. What belongs to another archive is thrown away; discarded says so.
// read is told how much of what is there has been read again, for the digest.
func OpenPartial(ctx context.Context, target, of string, object Object, read func(done, total int64)) (p *Partial, discarded bool, err error) {
	data, err := os.OpenFile(target+partialSuffix, os.O_RDWR|os.O_CREATE|noFollow, 0o600)
	if err != nil {
		return nil, false, err
	}
	p = &Partial{target: target, data: data, hash: sha256.New(), state: partialState{Of: of, ETag: object.ETag, Size: object.Size}}
	defer func() {
		if err != nil {
			_ = data.Close() // the error before it is the one to report
		}
	}()
	if info, err := data.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, false, errors.Join(err, fmt.Errorf("%s is not a regular file", data.Name()))
	}
	if err := lock(data); err != nil {
		return nil, false, fmt.Errorf("%s is being downloaded by another process: %w", target, err)
	}
	// The one who had the lock may just have given the file its final name.
	if err := stillThere(data); err != nil {
		return nil, false, err
	}
	before, err := readState(target + stateSuffix)
	if err != nil {
		return nil, false, err
	}
	discarded = before != nil && (before.Of != of || before.ETag != object.ETag || before.Size != object.Size)
	if before != nil && !discarded {
		p.state.Safe = before.Safe
	}
	return p, discarded, p.resume(ctx, read)
}

func stillThere(data *os.File) error {
	is, err := data.Stat()
	if err != nil {
		return err
	}
	if now, err := os.Lstat(data.Name()); err != nil || !os.SameFile(is, now) {
		return fmt.Errorf("%s is another file by now, try again: %w", data.Name(), errors.Join(err, fs.ErrExist))
	}
	return nil
}

func readState(path string) (*partialState, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxStateBytes))
	if err != nil {
		return nil, err
	}
	state := &partialState{}
	if json.Unmarshal(text, state) != nil || state.Safe < 0 || state.Safe > state.Size {
		return nil, nil // not ours, or half written: begin anew
	}
	return state, nil
}

// resume throws away what is not known to be safe and reads the rest again.
func (p *Partial) resume(ctx context.Context, read func(done, total int64)) error {
	info, err := p.data.Stat()
	if err != nil {
		return err
	}
	if info.Size() < p.state.Safe {
		p.state.Safe = 0 // somebody shortened it
	}
	if err := p.data.Truncate(p.state.Safe); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for p.at < p.state.Safe {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := p.data.Read(buf)
		if err != nil {
			return fmt.Errorf("reading %s: %w", p.data.Name(), err)
		}
		p.hash.Write(buf[:n])
		p.at += int64(n)
		read(p.at, p.state.Safe)
	}
	return nil
}

// Offset is how much is there.
func (p *Partial) Offset() int64 { return p.at }

// Write implements io.Writer.
func (p *Partial) Write(b []byte) (int, error) {
	n, err := p.data.Write(b)
	p.hash.Write(b[:n])
	p.at += int64(n)
	return n, err
}

// Mark makes what was written safe.
func (p *Partial) Mark() error {
	if err := p.data.Sync(); err != nil {
		return err
	}
	p.state.Safe = p.at
	text, err := json.Marshal(p.state)
	if err != nil {
		return err
	}
	return replaceFile(p.target+stateSuffix, text)
}

// Sum is the SHA-256 of what was written.
func (p *Partial) Sum() []byte { return p.hash.Sum(nil) }

// Open reads what was written, from its beginning.
func (p *Partial) Open() io.Reader { return io.NewSectionReader(p.data, 0, p.at) }

// Finish gives the file its name and forgets the state.
func (p *Partial) Finish() error {
	if err := p.data.Sync(); err != nil {
		return err
	}
	if err := os.Rename(p.data.Name(), p.target); err != nil {
		return err
	}
	if err := errors.Join(os.Remove(p.target+stateSuffix), p.data.Close()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(p.target))
}

// Discard removes what was written: it is of no use.
func (p *Partial) Discard() error {
	return errors.Join(p.data.Close(), os.Remove(p.data.Name()), os.Remove(p.target+stateSuffix))
}

// Close leaves it to be gone on with.
func (p *Partial) Close() error { return p.data.Close() }

// replaceFile writes a small file so that it is there whole or as it was before.
func replaceFile(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}
