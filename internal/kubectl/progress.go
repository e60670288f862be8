package kubectl

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// progress tells a person how an operation goes on. Every step is one line that
// begins with the seconds since the start; on a terminal the step that is under
// way is shown at once, with a running clock, and becomes such a line when the
// next one begins.
type progress struct {
	out      io.Writer
	terminal bool
	now      func() time.Time
	start    time.Time

	mu      sync.Mutex
	current string
	since   time.Duration // when the current step began
	frame   int
	stop    chan struct{}
	stopped chan struct{}
}

const spinner = `|/-\`

// newProgress starts the clock. Call end when the operation is over.
func newProgress(out io.Writer, now func() time.Time) *progress {
	p := &progress{out: out, now: now, start: now()}
	if file, ok := out.(*os.File); ok {
		p.terminal = term.IsTerminal(int(file.Fd()))
	}
	if p.terminal {
		p.stop, p.stopped = make(chan struct{}), make(chan struct{})
		go p.animate(100 * time.Millisecond)
	}
	return p
}

// elapsed is the time since the start.
func (p *progress) elapsed() time.Duration { return p.now().Sub(p.start) }

// step says what is under way now; the same text again says nothing new.
func (p *progress) step(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.mu.Lock()
	defer p.mu.Unlock()
	if text == p.current {
		return
	}
	p.settle()
	p.current, p.since = text, p.elapsed()
	if p.terminal {
		p.draw()
	} else {
		p.line()
	}
}

// end leaves the last step as a line. It may be called again.
func (p *progress) end() {
	if p.stop != nil {
		close(p.stop)
		<-p.stopped
		p.stop = nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settle()
	p.current = ""
}

// settle turns the animated line into a lasting one.
func (p *progress) settle() {
	if p.terminal && p.current != "" {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.line()
	}
}

func (p *progress) line() {
	fmt.Fprintf(p.out, "%6.1fs  %s\n", p.since.Seconds(), p.current)
}

func (p *progress) draw() {
	fmt.Fprintf(p.out, "\r\x1b[K%6.1fs %c%s", p.elapsed().Seconds(), spinner[p.frame%len(spinner)], p.current)
}

func (p *progress) animate(every time.Duration) {
	defer close(p.stopped)
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-ticker.C:
			p.mu.Lock()
			if p.current != "" {
				p.frame++
				p.draw()
			}
			p.mu.Unlock()
		}
	}
}
