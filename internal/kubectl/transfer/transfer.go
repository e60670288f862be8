// Package transfer moves archives over connections that break: in ranges that each
// end in time, taken up again where they stopped, in constant memory, and compared
// with what was written at the end.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

var (
	// ErrChanged says that the archive is another one than the part that is here.
	ErrChanged = errors.New("the archive has changed")
	// ErrCorrupt says that what has arrived is not what was written.
	ErrCorrupt = errors.New("verification failed")
	// ErrStalled says that nothing has moved for too long. What is here stays and can
	// be gone on with.
	ErrStalled = errors.New("nothing has moved for too long")
)

// Object is an archive as its server announces it.
type Object struct {
	Size int64
	ETag string // strong: archives of the same tag are the same bytes
}

// Policy is how a transfer deals with connections. All members must be set.
type Policy struct {
	// Patience is how long nothing may move before a transfer is given up.
	Patience time.Duration
	// Transient says whether trying again may help.
	Transient func(error) bool
	// Progress is told what has moved.
	Progress func(done, total int64)
	// Notice is told what went wrong and is tried again.
	Notice func(err error, wait time.Duration)
	// Now is the clock.
	Now func() time.Time
}

const (
	// MaxPart is the longest range that is asked for at a time.
	MaxPart   = 64 << 20
	minPart   = 256 << 10
	firstPart = 4 << 20
	// partTime is how long a range should take, requestTime how long it may: the API
	// server ends ordinary calls after 60 s.
	partTime    = 10 * time.Second
	requestTime = 50 * time.Second
	// idleTime is how long a request may move nothing.
	idleTime = 20 * time.Second

	firstPause = 200 * time.Millisecond
	longPause  = 10 * time.Second
)

// window is how much to move with one request: as much as fits in partTime at the
// speed of the last one.
type window struct{ size int64 }

func newWindow() *window { return &window{firstPart} }

// next is the length of the next part when rest is left.
func (w *window) next(rest int64) int64 { return min(w.size, rest) }

// moved takes note that n bytes took so long.
func (w *window) moved(n int64, took time.Duration) {
	fits := int64(float64(n) / max(took.Seconds(), 1e-3) * partTime.Seconds())
	w.size = min(max(fits, minPart), MaxPart, max(4*n, minPart))
}

// broke takes note that a request ended early.
func (w *window) broke() { w.size = max(w.size/2, minPart) }

// patience says how long to pause after failures, and when to give up.
type patience struct {
	policy *Policy
	since  time.Time // the last success
	pause  time.Duration
}

func newPatience(p *Policy) *patience { return &patience{p, p.Now(), firstPause} }

// success begins anew.
func (p *patience) success() { p.since, p.pause = p.policy.Now(), firstPause }

// failed pauses; it returns the error that ends the transfer.
func (p *patience) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !errors.Is(err, errNothingTaken) && !errors.Is(err, errIdle) && !p.policy.Transient(err) {
		return err
	}
	if quiet := p.policy.Now().Sub(p.since); quiet >= p.policy.Patience {
		return fmt.Errorf("%w (%s): %w", ErrStalled, quiet.Round(time.Second), err)
	}
	p.policy.Notice(err, p.pause)
	timer := time.NewTimer(p.pause)
	defer timer.Stop()
	p.pause = min(2*p.pause, longPause)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

var errIdle = errors.New("the connection moves nothing any more")

// watched ends a request that takes too long or moves nothing.
type watched struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	idle   *time.Timer
	stop   context.CancelFunc
}

func watch(ctx context.Context) *watched {
	ctx, stop := context.WithTimeout(ctx, requestTime)
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watched{ctx: ctx, cancel: cancel, stop: stop}
	w.idle = time.AfterFunc(idleTime, func() { cancel(errIdle) })
	return w
}

func (w *watched) moved() { w.idle.Reset(idleTime) }

func (w *watched) end() {
	w.idle.Stop()
	w.cancel(nil)
	w.stop()
}

// why is err, or what ended the request.
func (w *watched) why(err error) error {
	if err != nil && errors.Is(context.Cause(w.ctx), errIdle) {
		return errIdle
	}
	return err
}

// counted tells of every read.
type counted struct {
	io.Reader
	moved func(n int)
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.moved(n)
	return n, err
}
