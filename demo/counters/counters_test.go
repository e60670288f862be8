package counters

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

var epoch = time.Unix(1_700_000_000, 0)

// logOf makes a log of counts from..to, every 10 ms from start, that stands still
// for gap before count at.
func logOf(nonce string, start time.Time, from, to, at uint64, gap time.Duration) string {
	var log strings.Builder
	for count, t := from, start; count <= to; count, t = count+1, t.Add(10*time.Millisecond) {
		if count == at {
			t = t.Add(gap)
		}
		fmt.Fprintf(&log, "a t=%d count=%d peer=%d nonce=%s checks=%d ok\n", t.UnixMicro(), count, count-1, nonce, 2*count)
	}
	return log.String()
}

func parsed(t *testing.T, log string) []Line {
	t.Helper()
	lines, err := Parse(log)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestARestoredPodContinuesOnlyWhereItsSourceStoodStill(t *testing.T) {
	const gap = 200 * time.Millisecond
	source := parsed(t, logOf("n", epoch, 1, 300, 101, gap))
	window := Window{Start: epoch.Add(time.Second), End: epoch.Add(2 * time.Second), Frozen: gap}
	later := epoch.Add(time.Minute)
	for _, way := range []struct {
		name     string
		restored string
		window   Window
		want     string // in the error; empty for none
	}{
		{"at the cut", logOf("n", later, 101, 120, 0, 0), window, ""},
		{"one count before, frozen between clock and line", logOf("n", later, 100, 120, 0, 0), window, ""},
		{"two counts before", logOf("n", later, 99, 120, 0, 0), window, "stood still for 10ms"},
		{"one count after", logOf("n", later, 102, 120, 0, 0), window, "stood still for 10ms"},
		{"started anew", logOf("n", later, 1, 20, 0, 0), window, "the source logged 1 to 300"},
		{"another nonce", logOf("m", later, 101, 120, 0, 0), window, "nonce"},
		{"beyond the source's log", logOf("n", later, 500, 520, 0, 0), window, "the source logged 1 to 300"},
		{"at another time", logOf("n", later, 101, 120, 0, 0), Window{epoch.Add(time.Hour), epoch.Add(time.Hour), gap}, "not while"},
		{"a longer freeze", logOf("n", later, 101, 120, 0, 0), Window{window.Start, window.End, time.Second}, "frozen for 1s"},
		{"older than the cut", logOf("n", epoch, 101, 120, 0, 0), window, "older"},
	} {
		t.Run(way.name, func(t *testing.T) {
			restored := parsed(t, way.restored)
			cut, first, err := Continues(source, restored, way.window)
			switch {
			case way.want == "" && (err != nil || first != restored[0].Count || cut != first-1):
				t.Errorf("cut %d, first %d, error %v", cut, first, err)
			case way.want != "" && (err == nil || !strings.Contains(err.Error(), way.want)):
				t.Errorf("error %v, want one that says %q", err, way.want)
			}
		})
	}
}

func TestAWindowIsOfTheTimeInWhichAllOfThePodStandsStill(t *testing.T) {
	start, end := metav1.NewTime(epoch), metav1.NewTime(epoch.Add(2*time.Second))
	phase := func(name string, d time.Duration) checkpointv1alpha1.PhaseTiming {
		return checkpointv1alpha1.PhaseTiming{Name: name, Duration: metav1.Duration{Duration: d}}
	}
	status := checkpointv1alpha1.PodCheckpointStatus{
		StartTime: &start, CompletionTime: &end, FreezeDuration: &metav1.Duration{Duration: time.Second},
		Phases: []checkpointv1alpha1.PhaseTiming{phase("freeze", 700*time.Millisecond), phase("capture", 200*time.Millisecond), phase("thaw", 100*time.Millisecond)},
	}
	if w, err := WindowOf(status); err != nil || w != (Window{start.Time, end.Time, 200 * time.Millisecond}) {
		t.Errorf("%+v, %v", w, err)
	}
	status.Phases = status.Phases[:1]
	if w, err := WindowOf(status); err == nil || !strings.Contains(err.Error(), "capture") {
		t.Errorf("without the phase: %+v, %v", w, err)
	}
	status.StartTime = nil
	if w, err := WindowOf(status); err == nil || !strings.Contains(err.Error(), "when") {
		t.Errorf("without a start: %+v, %v", w, err)
	}
}

func TestALogThatDisagreesSkipsOrStartsAnewIsRefused(t *testing.T) {
	good := logOf("n", epoch, 1, 3, 0, 0)
	if _, err := Parse(good + "a DISAGREE count=3 nonce=n: b says 9\n"); !errors.Is(err, errDisagree) {
		t.Errorf("error %v, want %v", err, errDisagree)
	}
	for name, log := range map[string]string{
		"a skipped count":  good + logOf("n", epoch, 5, 6, 0, 0),
		"a repeated count": good + logOf("n", epoch, 3, 6, 0, 0),
		"another nonce":    good + logOf("m", epoch, 4, 6, 0, 0),
		"something else":   good + "panic: no\n",
	} {
		if _, err := Parse(log); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func TestNoLogIsNoContinuation(t *testing.T) {
	lines := parsed(t, logOf("n", epoch, 1, 3, 0, 0))
	if _, _, err := Continues(nil, lines, Window{}); err == nil {
		t.Error("without a source's log")
	}
	if _, _, err := Continues(lines, nil, Window{}); err == nil {
		t.Error("without a restored log")
	}
}

func TestALastLineThatIsStillBeingWrittenIsLeftOut(t *testing.T) {
	lines := parsed(t, logOf("n", epoch, 1, 3, 0, 0)+"a t=17000")
	if len(lines) != 3 {
		t.Errorf("%d lines, want 3", len(lines))
	}
}
