package cow

import (
	"testing"
	"time"
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
