package kubectl

import (
	"strings"
	"testing"
	"time"
)

func TestProgressInAPipeIsOneLineForEachNewStep(t *testing.T) {
	var out strings.Builder
	clock := time.Unix(0, 0)
	p := newProgress(&out, func() time.Time { return clock })
	p.step("one")
	p.step("one")
	clock = clock.Add(1500 * time.Millisecond)
	p.step("two")
	p.end()
	p.end()
	if want := "   0.0s  one\n   1.5s  two\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestProgressOnATerminalShowsTheStepUnderWayAndLeavesTheSameLines(t *testing.T) {
	var out strings.Builder
	clock := time.Unix(0, 0)
	p := &progress{out: &out, terminal: true, now: func() time.Time { return clock }, start: clock}
	p.step("one")
	clock = clock.Add(time.Second)
	p.step("two")
	p.end()
	want := "\r\x1b[K   0.0s |one" + "\r\x1b[K   0.0s  one\n" + "\r\x1b[K   1.0s |two" + "\r\x1b[K   1.0s  two\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestSizesAndDurationsAreShort(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 12 << 20: "12.0 MiB", 3 << 40: "3.0 TiB"} {
		if got := size(bytes); got != want {
			t.Errorf("size(%d) = %q, want %q", bytes, got, want)
		}
	}
	for d, want := range map[time.Duration]string{1499 * time.Microsecond: "1ms", 9999 * time.Millisecond: "9999ms", 61 * time.Second: "61.0s"} {
		if got := short(d); got != want {
			t.Errorf("short(%s) = %q, want %q", d, got, want)
		}
	}
}
