package kubectl

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// progress tells a person how an operation goes on. Every step is one line that
// begins with the seconds since the start; on a terminal the step that is under
// way is shown at once, with a running clock and, where it moves bytes, a bar, and
// becomes such a line when the next one begins.
type progress struct {
	out      io.Writer
	terminal bool
	width    func() int // of the terminal; nil: any
	now      func() time.Time
	start    time.Time

	mu      sync.Mutex
	current string
	moved   *moved        // of the current step, where it moves bytes
	since   time.Duration // when the current step began
	frame   int
	stop    chan struct{}
	stopped chan struct{}
}

// moved is how far a transfer is.
type moved struct {
	done, total int64
	first       int64         // done when it began: what was there already makes no speed
	told        time.Duration // when a plain line was last written
}

const (
	spinner = `|/-\`
	// tellEvery is how often a transfer is told in a pipe.
	tellEvery = 10 * time.Second
	barWidth  = 24
)

// newProgress starts the clock. Call end when the operation is over.
func newProgress(out io.Writer, now func() time.Time) *progress {
	p := &progress{out: out, now: now, start: now()}
	if file, ok := out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		p.terminal = true
		p.width = func() int {
			width, _, err := term.GetSize(int(file.Fd()))
			if err != nil {
				return 80
			}
			return width
		}
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
	text := clean(fmt.Sprintf(format, args...))
	p.mu.Lock()
	defer p.mu.Unlock()
	if text == p.current {
		return
	}
	p.settle()
	p.current, p.since, p.moved = text, p.elapsed(), nil
	if p.terminal {
		p.draw()
	} else {
		p.line()
	}
}

// note says something that lasts, without an end to the current step.
func (p *progress) note(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
	fmt.Fprintf(p.out, "%6.1fs  %s\n", p.elapsed().Seconds(), clean(fmt.Sprintf(format, args...)))
	if p.terminal && p.current != "" {
		p.draw()
	}
}

// bytes says how far the current step has come, of how much.
func (p *progress) bytes(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.moved == nil {
		p.moved = &moved{first: done, told: p.elapsed()}
	}
	p.moved.done, p.moved.total = done, total
	if !p.terminal && p.current != "" && p.elapsed()-p.moved.told >= tellEvery {
		p.moved.told = p.elapsed()
		fmt.Fprintf(p.out, "%6.1fs  %s: %s\n", p.elapsed().Seconds(), p.current, p.figures())
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
	p.current, p.moved = "", nil
}

// settle turns the animated line into a lasting one.
func (p *progress) settle() {
	if p.terminal && p.current != "" {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.line()
	}
}

func (p *progress) line() {
	text := p.current
	if p.moved != nil {
		text += ": " + p.figures()
	}
	fmt.Fprintf(p.out, "%6.1fs  %s\n", p.since.Seconds(), text)
}

func (p *progress) draw() {
	text := fmt.Sprintf("%6.1fs %c%s", p.elapsed().Seconds(), spinner[p.frame%len(spinner)], p.current)
	if p.moved != nil {
		text += " " + p.bar() + " " + p.figures()
	}
	if p.width != nil {
		text = cut(text, max(p.width()-1, 20)) // a line that wraps could not be drawn anew
	}
	fmt.Fprint(p.out, "\r\x1b[K"+text)
}

func (p *progress) bar() string {
	full := barWidth
	if p.moved.total > 0 {
		full = int(int64(barWidth) * min(p.moved.done, p.moved.total) / p.moved.total)
	}
	return "[" + strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full) + "]"
}

// figures are the bytes, the speed and the time that is left.
func (p *progress) figures() string {
	text := size(p.moved.done) + " of " + size(p.moved.total)
	took := (p.elapsed() - p.since).Seconds()
	if moved := p.moved.done - p.moved.first; moved > 0 && took >= 0.5 {
		speed := float64(moved) / took
		text += fmt.Sprintf(", %s/s", size(int64(speed)))
		if left := p.moved.total - p.moved.done; left > 0 {
			text += fmt.Sprintf(", %s left", time.Duration(float64(left)/speed*float64(time.Second)).Round(time.Second))
		}
	}
	return text
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
