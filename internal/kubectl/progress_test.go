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

func TestProgressOfATransferHasABarOnATerminalAndFiguresInAPipe(t *testing.T) {
	var out strings.Builder
	clock := time.Unix(0, 0)
	p := &progress{out: &out, terminal: true, now: func() time.Time { return clock }, start: clock}
	p.step("downloading")
	p.bytes(1<<20, 4<<20)
	clock = clock.Add(time.Second)
	p.bytes(3<<20, 4<<20)
	p.draw()
	if want := "downloading [==================      ] 3.0 MiB of 4.0 MiB, 2.0 MiB/s, 1s left"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("the line on a terminal is %q, want %q at its end", out.String(), want)
	}
	out.Reset()
	p.width = func() int { return 30 }
	p.draw()
	if line := strings.TrimPrefix(out.String(), "\r\x1b[K"); len([]rune(line)) != 29 {
		t.Errorf("on a terminal of 30 columns a line has %d: %q", len([]rune(line)), line)
	}

	out.Reset()
	p = &progress{out: &out, now: func() time.Time { return clock }, start: clock}
	p.step("downloading")
	for range 25 {
		clock = clock.Add(time.Second)
		p.bytes(1<<20, 4<<20)
	}
	p.note("broken: \x1b[31m")
	p.end()
	want := "   0.0s  downloading\n  11.0s  downloading: 1.0 MiB of 4.0 MiB\n  21.0s  downloading: 1.0 MiB of 4.0 MiB\n  25.0s  broken: \\x1b[31m\n"
	if out.String() != want {
		t.Errorf("in a pipe: %q, want %q", out.String(), want)
	}
}

func TestTextOfOthersCannotControlATerminal(t *testing.T) {
	for text, want := range map[string]string{
		"plain äöü 日本":     "plain äöü 日本",
		"\x1b[2J\x07\n\t":  `\x1b[2J\x07\n\t`,
		"a\xffb":           `a\xffb`,
		"evil\u202etxt":    `evil\u202etxt`,
		"c1\u009b31m":      `c1\u009b31m`,
		"real \ufffd sign": `real \ufffd sign`,
	} {
		if got := clean(text); got != want {
			t.Errorf("clean(%q) = %q, want %q", text, got, want)
		}
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
