//go:build amd64

package cow

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// oneMoment checks what a hammer's image holds: no page is younger than the count, and
// of each thread's pages those before the one that it was at are of its last round.
func oneMoment(t *testing.T, c captured, count, pages uint64) {
	t.Helper()
	counted := c.word(count)
	if counted < 2*hammers*hammerPages {
		t.Fatalf("it counted to %d only", counted)
	}
	for h := range uint64(hammers) {
		drops := 0
		var before uint64
		for i := range uint64(hammerPages) {
			page := pages + (h*hammerPages+i)*pageSize
			n, end := c.word(page), c.word(page+pageSize-8)
			if n == 0 || n > counted {
				t.Fatalf("thread %d: page %d holds %d, counted were %d", h, i, n, counted)
			}
			if i > 0 && n < before {
				drops++
			}
			if n != end && end > n {
				t.Fatalf("thread %d: page %d begins with %d and ends with %d", h, i, n, end)
			}
			before = n
		}
		if drops > 1 {
			t.Errorf("thread %d: its pages are of %d moments", h, drops+1)
		}
	}
}

func TestMemoryIsCapturedAsItWasInOneMomentWhileItsProcessGoesOn(t *testing.T) {
	s := begin(t, "hammer", nil)
	at := numbers(t, s.line(t))
	for range 3 {
		c := imagesOf(t, s.pid())
		must(t, captureAll(t, c))
		oneMoment(t, readCaptured(t, c.Images, s.pid()), at[0], at[1])
	}
	noChildren(t, s.pid())
	s.end(t)
}

func TestAProcessNoticesNothingOfItsCapture(t *testing.T) {
	s := begin(t, "sleeper", nil)
	s.line(t)
	for range 10 {
		must(t, captureAll(t, imagesOf(t, s.pid())))
		time.Sleep(17 * time.Millisecond) // so that others of its system calls are met
	}
	noChildren(t, s.pid())
	s.end(t)
}

func TestWhatChildrenDoNotGetIsCapturedToo(t *testing.T) {
	s := begin(t, "kept", nil)
	at := numbers(t, s.line(t))
	c := imagesOf(t, s.pid())
	must(t, captureAll(t, c))
	got := readCaptured(t, c.Images, s.pid())
	for i, address := range at {
		if n := got.word(address); n != uint64(i+1) {
			t.Errorf("memory %d holds %d", i+1, n)
		}
	}
	s.end(t)
}

func TestAFilterOfSystemCallsStandsInNobodysWay(t *testing.T) {
	s := begin(t, "strict", nil)
	at := numbers(t, s.line(t))
	s.line(t)
	for range 3 {
		c := imagesOf(t, s.pid())
		must(t, captureAll(t, c))
		oneMoment(t, readCaptured(t, c.Images, s.pid()), at[0], at[1])
	}
	noChildren(t, s.pid())
	s.end(t)
}

// between captures, and does something after the processes have been let go and before
// their memory is read.
func between(t *testing.T, do func(), containers ...Container) (read error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		c := capture{request: Request{Sandbox: "s", Containers: containers}, log: slog.New(slog.DiscardHandler), settled: do}
		_, err := c.run(t.Context(), func() error { return nil })
		done <- err
	}()
	return <-done
}

func TestMemoryThatHasBeenReadIsGivenUp(t *testing.T) {
	s := begin(t, "hammer", nil)
	s.line(t)
	kilobytes := func(pid int) (n int) {
		text, err := statusOf(pid, "RssAnon")
		if err == nil {
			_, err = fmt.Sscanf(text, "%d kB", &n)
		}
		if err != nil {
			t.Error(err)
		}
		return n
	}
	own, kept := 0, 0
	finished := make(chan error, 1)
	container := imagesOf(t, s.pid())
	go func() {
		runtime.LockOSThread()
		c := capture{request: Request{Sandbox: "s", Containers: []Container{container}}, log: slog.New(slog.DiscardHandler)}
		c.settled = func() { own = kilobytes(c.processes[0].child.pid) }
		c.done = func(p *process) { kept = kilobytes(p.child.pid) }
		_, err := c.run(t.Context(), func() error { return nil })
		finished <- err
	}()
	must(t, <-finished)
	// What was read last may not have been told yet.
	if most := 2 * chunk >> 10; own < 4*most || kept > most {
		t.Errorf("a child with %d KiB of memory has %d KiB when it has been read", own, kept)
	}
	noChildren(t, s.pid())
	s.end(t)
}

// awaitEnd waits until a process is a zombie, or gone.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ending(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("process %d does not end", pid)
			return
		}
	}
}

func TestAProcessThatEndsWhileItsMemoryIsReadIsCapturedAndItsParentSeesItsEndAlone(t *testing.T) {
	for name, end := range map[string]func(pid int){
		"killed":     func(pid int) { unix.Kill(pid, unix.SIGKILL) },
		"terminated": func(pid int) { unix.Kill(pid, unix.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t, "family", nil)
			at := numbers(t, s.line(t))
			child := int(at[0])
			c := imagesOf(t, s.pid(), child)
			inner := child
			err := between(t, func() {
				end(child)
				awaitEnd(t, child)
				// Nobody holds its output open any more. The line comes before its memory is read.
				if line := s.line(t); !strings.HasPrefix(line, "ended ") {
					t.Errorf("its parent says %q", line)
				}
			}, c)
			must(t, err)
			p, err := readPagemap(c.Images, inner)
			must(t, err)
			oneMoment(t, readPages(t, c.Images, p), at[1], at[2])
			noChildren(t, s.pid())
			s.end(t)
		})
	}
}

func TestAProcessThatExecutesAnotherProgramWhileItsMemoryIsReadIsCaptured(t *testing.T) {
	s := begin(t, "hammer", nil)
	at := numbers(t, s.line(t))
	c := imagesOf(t, s.pid())
	must(t, between(t, func() {
		io.WriteString(s.in, "exec")
		s.in.Close()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			if st, err := readStat(s.pid()); err == nil && st.command == "sleep" {
				return
			}
			if time.Now().After(end) {
				t.Error("it does not execute sleep")
				return
			}
		}
	}, c))
	oneMoment(t, readCaptured(t, c.Images, s.pid()), at[0], at[1])
	noChildren(t, s.pid())
}

func TestALimitThatIsReachedEndsTheChildrenAndNobodyElse(t *testing.T) {
	s := begin(t, "hammer", nil)
	s.line(t)
	done := make(chan error, 1)
	c := imagesOf(t, s.pid())
	file := t.TempDir() + "/usage"
	must(t, writeText(file, "100"))
	go func() {
		runtime.LockOSThread()
		c := capture{log: slog.New(slog.DiscardHandler), request: Request{
			Containers: []Container{c}, Limits: []Limit{{Usage: file, Stat: file, Bytes: 1000, Reserve: 950}}}}
		_, err := c.run(t.Context(), func() error { return nil })
		done <- err
	}()
	if err := <-done; err != nil && !errors.Is(err, ErrMemory) {
		t.Errorf("it ended with %v", err)
	} else if err == nil {
		t.Log("it was read before anybody looked")
	}
	noChildren(t, s.pid())
	s.end(t)
}

func TestMemoryThatCRIUHasWrittenIsLeftAlone(t *testing.T) {
	s := begin(t, "hammer", nil)
	at := numbers(t, s.line(t))
	c := imagesOf(t, s.pid())
	must(t, pagemap{id: 1, runs: []run{{start: at[0], pages: 1, flags: pagesPresent}}}.write(fmt.Sprintf("%s/pagemap-%d.img", c.Images, s.pid())))
	if err := captureAll(t, c); !errors.Is(err, ErrComplete) {
		t.Errorf("it ended with %v", err)
	}
	s.end(t)
}
