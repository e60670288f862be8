package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
	checkpointstore "podstasis.dev/stasis/internal/store"
)

const (
	// laterPart is what is asked for at once of what nobody waits for, in blocks: 4 MiB.
	laterPart = 64
	// laterPatience is how long a part may be asked for in vain, of all origins. It is
	// shorter than processes wait for a page (lazyPatience): they are told why.
	laterPatience = 40 * time.Second
	// laterStall is how long no byte may come before an origin is asked anew.
	laterStall = 10 * time.Second
	// laterRetry is the pause after all origins have failed.
	laterRetry = 500 * time.Millisecond
)

// giver is a place that parts of files are read from, all of a part or none.
type giver struct {
	name string
	read func(ctx context.Context, file string, p []byte, offset int64) error
}

// giversOrigin has several of them.
type giversOrigin interface {
	origin
	givers() []giver
}

// giversOf are the places that an origin can be read from, in the order to ask them.
func giversOf(o origin) []giver {
	if p, ok := o.(giversOrigin); ok {
		return p.givers()
	}
	return []giver{{o.Name(), func(ctx context.Context, file string, p []byte, offset int64) error {
		return readOpened(ctx, o, file, p, offset)
	}}}
}

func readOpened(ctx context.Context, o origin, file string, p []byte, offset int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(laterStall, func() { cancel(fmt.Errorf("no byte has come for %s", laterStall)) })
	defer stalled.Stop()
	body, err := o.Open(ctx, file, offset, int64(len(p)))
	if err != nil {
		return because(ctx, err)
	}
	defer body.Close()
	for len(p) > 0 {
		n, err := body.Read(p)
		if p = p[n:]; len(p) == 0 {
			return nil
		}
		if err == io.EOF {
			err = errShort
		}
		if err != nil {
			return because(ctx, fmt.Errorf("receive %s: %w", file, err))
		}
		stalled.Reset(laterStall)
	}
	return nil
}

// lostError says that what is asked for cannot be had, now or later.
type lostError struct{ error }

func (e lostError) Unwrap() error { return e.error }

// blockOf names a block.
type blockOf struct {
	file  string
	block int
}

// later brings those blocks of a checkpoint's files of pages that CRIU does not read,
// while its processes run. What a process waits for comes first, over connections of its
// own; then what whoever streams pages asks for; then the rest. A block is put in its
// place when its digest is right: what is in the file and has its digest is there, and
// whoever is interrupted goes on from that.
type later struct {
	bandwidth *lazy.Bandwidth
	patience  time.Duration
	progress  *progress
	received  func(bytes int)
	now       func() time.Time

	names []string // of files, in order
	files map[string]*laterFile

	mu           sync.Mutex
	urgent, soon []blockOf
	come         chan struct{} // closed when a block has come, and replaced
	called       chan struct{} // closed when somebody asks, and replaced
	left         int           // blocks
	trouble      string
	good         string // the origin that gave something last
}

type laterFile struct {
	sums  checkpoint.FileBlocks
	out   *os.File
	there []bool // guarded by later.mu
	next  int    // no block before it is missing
}

// openLater finds out what is there of files of pages in a directory, and gives each the
// size that it will have.
func openLater(ctx context.Context, dir string, l *pages.Lazily) (_ *later, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the directory of a fetch: %w", err)
	}
	defer root.Close()
	t := &later{files: map[string]*laterFile{}, come: make(chan struct{}), called: make(chan struct{}), now: time.Now, patience: laterPatience, received: func(int) {}, progress: &progress{}}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	for file := range l.Later() {
		name := filepath.FromSlash(file)
		if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			return nil, fmt.Errorf("make the directory of %s: %w", file, err)
		}
		out, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", file, err)
		}
		f := &laterFile{sums: l.Blocks(file), out: out}
		f.there = make([]bool, f.sums.Count())
		t.files[file] = f
		t.names = append(t.names, file)
		if err := f.look(ctx); err != nil {
			return nil, fmt.Errorf("look what there is of %s: %w", file, err)
		}
		if err := out.Truncate(f.sums.Size); err != nil {
			return nil, fmt.Errorf("make %s: %w", file, err)
		}
		for _, there := range f.there {
			if !there {
				t.left++
			}
		}
	}
	slices.Sort(t.names)
	return t, nil
}

func (t *later) close() {
	for _, f := range t.files {
		f.out.Close()
	}
}

// look takes note of the blocks that are there: what the file system has, and is right.
func (f *laterFile) look(ctx context.Context) error {
	buf := make([]byte, checkpoint.BlockSize)
	for at := int64(0); at < f.sums.Size; {
		data, err := f.out.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		hole, err := f.out.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		block := int(data / checkpoint.BlockSize)
		for ; block < len(f.there) && int64(block)*checkpoint.BlockSize < hole; block++ {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			offset, size := f.sums.Range(block)
			if _, err := f.out.ReadAt(buf[:size], offset); err == nil && f.sums.Check(block, buf[:size]) == nil {
				f.there[block] = true
			} else if err != nil && err != io.EOF {
				return err
			}
		}
		at = max(hole, int64(block)*checkpoint.BlockSize)
	}
	return nil
}

// bytesLeft is how much is missing.
func (t *later) bytesLeft() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int64(t.left) * checkpoint.BlockSize
}

// bringAll brings the blocks that a checkpoint is not restored without.
func (t *later) bringAll(ctx context.Context, from []giver, blocks map[string][]int) error {
	for _, file := range t.names {
		of := blocks[file]
		for len(of) > 0 {
			n := 1
			for n < len(of) && n < laterPart && of[n] == of[0]+n {
				n++
			}
			if err := t.bring(ctx, from, file, of[0], n); err != nil {
				return err
			}
			of = of[n:]
		}
	}
	return nil
}

// fill brings all that is missing.
func (t *later) fill(ctx context.Context, from, hurried []giver) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var work sync.WaitGroup
	each := func(from []giver, next func() (blockOf, int, bool), called func() <-chan struct{}) {
		work.Go(func() {
			for {
				wake := called()
				what, n, ok := next()
				switch {
				case context.Cause(ctx) != nil:
					return
				case !ok:
					select {
					case <-wake:
						continue
					case <-ctx.Done():
						return
					}
				}
				if err := t.bring(ctx, from, what.file, what.block, n); err != nil {
					cancel(err)
					return
				}
				if t.bytesLeft() == 0 {
					cancel(errAllThere)
					return
				}
			}
		})
	}
	if t.bytesLeft() == 0 {
		return nil
	}
	calls := func() <-chan struct{} {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.called
	}
	each(hurried, t.nextUrgent, calls)
	each(from, func() (blockOf, int, bool) {
		if t.bandwidth.Wait(ctx) != nil {
			return blockOf{}, 0, false
		}
		return t.nextCalm()
	}, calls)
	work.Wait()
	if err := context.Cause(ctx); !errors.Is(err, errAllThere) {
		return err
	}
	return nil
}

var errAllThere = errors.New("all is there")

// nextUrgent takes what a process waits for.
func (t *later) nextUrgent() (blockOf, int, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.urgent) > 0 {
		b := t.urgent[0]
		t.urgent = t.urgent[1:]
		if !t.files[b.file].there[b.block] {
			return b, 1, true
		}
	}
	return blockOf{}, 0, false
}

// nextCalm takes what comes next when nobody waits: what is asked for, with what follows
// it, or else the first that is missing.
func (t *later) nextCalm() (blockOf, int, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.soon) > 0 {
		b := t.soon[0]
		t.soon = t.soon[1:]
		if f := t.files[b.file]; !f.there[b.block] {
			return b, f.missing(b.block), true
		}
	}
	for _, name := range t.names {
		f := t.files[name]
		for f.next < len(f.there) && f.there[f.next] {
			f.next++
		}
		if f.next < len(f.there) {
			return blockOf{name, f.next}, f.missing(f.next), true
		}
	}
	return blockOf{}, 0, false
}

// missing is how many blocks from one on are missing, as many as are asked for at once.
func (f *laterFile) missing(block int) int {
	n := 0
	for n < laterPart && block+n < len(f.there) && !f.there[block+n] {
		n++
	}
	return n
}

// wait returns when a block is there, or ctx ends, or over is closed; then it says what
// stands in the way.
func (t *later) wait(ctx context.Context, over <-chan struct{}, b blockOf, urgent bool) (there bool, trouble string, err error) {
	f := t.files[b.file]
	if f == nil || b.block < 0 || b.block >= len(f.there) {
		return false, "", deny(v1alpha1.EventCheckpointDataCorrupt, "%.200q has no block %d that is given later", b.file, b.block)
	}
	for first := true; ; first = false {
		t.mu.Lock()
		there, come, trouble := f.there[b.block], t.come, t.trouble
		if queue := &t.soon; !there && first {
			if urgent {
				queue = &t.urgent
			}
			if !slices.Contains(*queue, b) {
				*queue = append(*queue, b)
				close(t.called)
				t.called = make(chan struct{})
			}
		}
		t.mu.Unlock()
		if there {
			return true, "", nil
		}
		select {
		case <-come:
		case <-over:
			return false, trouble, nil
		case <-ctx.Done():
			return false, trouble, nil
		}
	}
}

// bring brings blocks that follow each other, from wherever they can be had.
func (t *later) bring(ctx context.Context, from []giver, file string, block, count int) error {
	f := t.files[file]
	if block+count > len(f.there) {
		return lostError{fmt.Errorf("%w: %s has no block %d", checkpoint.ErrCorrupt, file, block+count-1)}
	}
	began := t.now()
	for tries := 1; ; tries++ {
		var failures []error
		final := true
		for _, p := range t.inOrder(from) {
			for count > 0 && t.isThere(f, block) {
				block, count = block+1, count-1
			}
			if count == 0 {
				return nil
			}
			came, err := t.bringFrom(ctx, p, f, file, block, count)
			if block, count = block+came, count-came; came > 0 {
				began, tries = t.now(), 1
			}
			var disk errDisk
			switch {
			case count == 0:
				return nil
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case errors.As(err, &disk):
				return err
			}
			failures = append(failures, fmt.Errorf("%s: %w", p.name, err))
			final = final && isFinal(err)
		}
		err := errors.Join(failures...)
		if waited := t.now().Sub(began); waited > t.patience || final && tries >= fetchTries {
			return lostError{fmt.Errorf("%s, %d bytes from %d on, can be had from nowhere: %s", file, count*checkpoint.BlockSize, int64(block)*checkpoint.BlockSize, oneLine(failures))}
		}
		t.mu.Lock()
		t.trouble = oneLine(failures)
		t.mu.Unlock()
		t.progress.update(func(p *progress) { p.trouble, p.broken = err, p.broken+1 })
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(laterRetry):
		}
	}
}

// isFinal says whether an error does not go away by waiting.
func isFinal(err error) bool {
	var no *nodeapi.Error
	return errors.As(err, &no) || errors.Is(err, checkpoint.ErrCorrupt) || errors.Is(err, checkpointstore.ErrCorrupt) || errors.Is(err, checkpointstore.ErrMissing)
}

// oneLine tells several failures.
func oneLine(failures []error) string {
	said := ""
	for i, err := range failures {
		if i > 0 {
			said += "; "
		}
		var no *nodeapi.Error
		if errors.As(err, &no) {
			said += no.Message
		} else {
			said += err.Error()
		}
	}
	return said
}

// inOrder begins with the origin that gave something last.
func (t *later) inOrder(from []giver) []giver {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, p := range from {
		if p.name == t.good {
			return append(append([]giver{p}, from[:i]...), from[i+1:]...)
		}
	}
	return from
}

func (t *later) isThere(f *laterFile, block int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return f.there[block]
}

// bringFrom brings blocks from one origin, and says how many of them, from the first one
// on, are right.
func (t *later) bringFrom(ctx context.Context, from giver, f *laterFile, file string, block, count int) (came int, err error) {
	begin, _ := f.sums.Range(block)
	last, size := f.sums.Range(block + count - 1)
	data := make([]byte, last+int64(size)-begin)
	if err := from.read(ctx, file, data, begin); err != nil {
		return 0, err
	}
	t.received(len(data))
	t.bandwidth.Spend(len(data))
	for ; came < count; came++ {
		offset, size := f.sums.Range(block + came)
		one := data[offset-begin:][:size]
		if err := f.sums.Check(block+came, one); err != nil {
			return came, err
		}
		if _, err := f.out.WriteAt(one, offset); err != nil {
			return came, errDisk{fmt.Errorf("write what is fetched: %w", err)}
		}
		t.mu.Lock()
		if !f.there[block+came] {
			f.there[block+came] = true
			t.left--
			t.progress.update(func(p *progress) { p.have, p.trouble = p.have+int64(size), nil })
		}
		close(t.come)
		t.come = make(chan struct{})
		t.trouble, t.good = "", from.name
		t.mu.Unlock()
	}
	return came, nil
}

// sync makes all that has come durable.
func (t *later) sync() error {
	for _, name := range t.names {
		if err := t.files[name].out.Sync(); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}
