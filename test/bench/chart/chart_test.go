package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

func drawn(t *testing.T, c Chart) string {
	t.Helper()
	var b strings.Builder
	if err := c.Write(&b); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(b.String())); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return b.String()
		} else if err != nil {
			t.Fatalf("not XML: %v\n%s", err, b.String())
		}
	}
}

func TestEveryValueHasABarAndWhatWasNotMeasuredHasNone(t *testing.T) {
	got := drawn(t, Chart{Title: "Freeze <all>", Unit: "ms", Names: []string{"a", "b"}, Groups: []Group{{"1 GiB", []float64{12, 0}}, {"4 GiB", []float64{120, 1234}}}})
	for _, want := range []string{">12<", ">120<", ">1234<", ">1 GiB<", ">4 GiB<", ">a<", ">b<", "Freeze &lt;all&gt;"} {
		if !strings.Contains(got, want) {
			t.Errorf("the drawing has no %s:\n%s", want, got)
		}
	}
	if bars := strings.Count(got, `text-anchor="middle" font-size="10"`); bars != 3 {
		t.Errorf("%d bars for 3 values", bars)
	}
}

func TestBarsGrowWithTheirValuesByTheLogarithm(t *testing.T) {
	c := Chart{Groups: []Group{{Values: []float64{10, 100, 1000}}}}
	if lowest, highest := c.decades(); lowest != 1 || highest != 3 {
		t.Errorf("values from 10 to 1000 lie between 10^%g and 10^%g", lowest, highest)
	}
	c = Chart{Groups: []Group{{Values: []float64{0}}}}
	if lowest, highest := c.decades(); lowest >= highest {
		t.Errorf("nothing lies between 10^%g and 10^%g", lowest, highest)
	}
}

func TestAGroupWithoutAValueForEachNameIsRefused(t *testing.T) {
	if err := (Chart{Names: []string{"a"}, Groups: []Group{{"g", nil}}}).Write(io.Discard); err == nil {
		t.Error("drawn")
	}
}
