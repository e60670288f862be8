package cow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"
)

// HelperName is the name under which stasis-runtime is the helper.
const HelperName = "stasis-cow"

// What the helper says.
const (
	// Ready: it can be relied on.
	Ready = "ready"
	// Running: all processes run, each has a child.
	Running = "running"
	// Done: all memory is in the images, no child is left.
	Done = "done"
	// Failed: nothing came of it; all processes run that had been let go, no child is left.
	Failed = "failed"
)

// Kinds of failures.
const (
	KindUnfit    = "unfit"    // ErrUnfit
	KindComplete = "complete" // ErrComplete
	KindMemory   = "memory"   // ErrMemory
	KindDisk     = "disk"     // what was read could not be written: the error is Errno
)

// Message is what the helper says, a line each.
type Message struct {
	Says   string `json:"says"`
	Bytes  int64  `json:"bytes,omitempty"`
	Kind   string `json:"kind,omitempty"`
	Reason string `json:"reason,omitempty"`
	Errno  int    `json:"errno,omitempty"`
}

// Err is what a message of a failure says.
func (m Message) Err() error {
	if m.Says != Failed {
		return nil
	}
	switch m.Kind {
	case KindUnfit:
		return &failure{ErrUnfit, m.Reason}
	case KindComplete:
		return ErrComplete
	case KindMemory:
		return &failure{ErrMemory, m.Reason}
	case KindDisk:
		return &failure{unix.Errno(m.Errno), m.Reason}
	}
	return errors.New(m.Reason)
}

// failure is an error that another process told of.
type failure struct {
	is   error
	says string
}

func (f *failure) Error() string { return f.says }
func (f *failure) Unwrap() error { return f.is }

func failed(err error) Message {
	m := Message{Says: Failed, Reason: err.Error()}
	switch {
	case errors.Is(err, ErrUnfit):
		m.Kind = KindUnfit
	case errors.Is(err, ErrComplete):
		m.Kind = KindComplete
	case errors.Is(err, ErrMemory):
		m.Kind = KindMemory
	}
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO} {
		if errors.Is(err, errno) && errors.Is(err, errWrite) {
			m.Kind, m.Errno = KindDisk, int(errno)
		}
	}
	return m
}

// errWrite says that an image could not be written.
var errWrite = errors.New("write images")

// errLeft says that whoever asked has given up, or is gone.
var errLeft = errors.New("whoever asked for it has gone")

// Serve is the helper: it reads one request, and does it.
// When in ends early, everything is undone.
func Serve(in io.Reader, out io.Writer, log *slog.Logger) error {
	// Who reads may be gone: that must not end the helper.
	runtime.LockOSThread()
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGTERM, unix.SIGINT)
	say := json.NewEncoder(out)
	if err := say.Encode(Message{Says: Ready}); err != nil {
		return err
	}
	lines := json.NewDecoder(in)
	c := capture{log: log}
	if err := lines.Decode(&c.request); err != nil {
		if errors.Is(err, io.EOF) {
			return nil // it was not needed
		}
		return fmt.Errorf("read what is to be captured: %w", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		io.Copy(io.Discard, in)
		cancel(errLeft)
	}()
	total, err := c.run(ctx, func() error { return say.Encode(Message{Says: Running}) })
	if err != nil {
		say.Encode(failed(err)) // whoever asked may be gone
		return err
	}
	return say.Encode(Message{Says: Done, Bytes: total})
}

// run does one capture and leaves nothing behind.
func (c *capture) run(ctx context.Context, running func() error) (total int64, err error) {
	err = c.attach()
	if err == nil {
		if err = context.Cause(ctx); err == nil {
			err = c.fork()
		}
	}
	if err != nil {
		// Those that have stopped are let go here, the others by this process' end.
		err = errors.Join(err, c.release())
		c.adopt()
	}
	if err == nil {
		err = running()
	}
	if err == nil {
		err = c.settle()
	}
	if err == nil && c.settled != nil {
		c.settled()
	}
	if err == nil {
		total, err = c.readAll(ctx)
	}
	left := false
	for _, p := range c.processes {
		if reapErr := c.reap(p); reapErr != nil {
			left = true
			c.log.Warn("a child was not collected by its parent", "process", p.pid, "err", reapErr)
		}
	}
	if !left {
		err = errors.Join(err, c.record.end())
	}
	return total, err
}
