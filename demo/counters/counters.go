// Package counters reads the logs of the demo's programs and judges by them
// whether a restored Pod continues exactly where its source was cut.
//
// Each program logs every count, once, in order. What a program had logged before
// the cut is its source's; the first count that the restored program logs is the
// next one. So the cut lies, in the source's log, between two counts that the
// restored Pod's log names, and nowhere else: there the source must have stood
// still for as long as the checkpoint says that it was frozen.
package counters

import (
	"bufio"
	"errors"
	"fmt"
	"strings"
	"time"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Line is one line of a program's log.
type Line struct {
	Program string // "a" or "b"
	Time    time.Time
	Count   uint64
	Peer    uint64 // what the program knows of the other's count
	Nonce   string
	Checks  uint64 // how many cross-checks have passed
}

// errDisagree is what a program found.
var errDisagree = errors.New("the programs disagree")

// Parse reads a log. A line in which a program gives up is an error; so is a
// count that does not follow the one before, or another nonce. A last line that
// has no end yet is left out: it was read while it was being written.
func Parse(log string) ([]Line, error) {
	var lines []Line
	log = log[:strings.LastIndexByte(log, '\n')+1]
	scanner := bufio.NewScanner(strings.NewReader(log))
	for number := 1; scanner.Scan(); number++ {
		text := scanner.Text()
		if strings.Contains(text, "DISAGREE") {
			return lines, fmt.Errorf("%w: %s", errDisagree, text)
		}
		var line Line
		var micros int64
		if _, err := fmt.Sscanf(text, "%s t=%d count=%d peer=%d nonce=%s checks=%d ok",
			&line.Program, &micros, &line.Count, &line.Peer, &line.Nonce, &line.Checks); err != nil {
			return lines, fmt.Errorf("line %d is %q: %w", number, text, err)
		}
		line.Time = time.UnixMicro(micros)
		if len(lines) > 0 {
			if last := lines[len(lines)-1]; line.Count != last.Count+1 {
				return lines, fmt.Errorf("program %s logs count %d after %d", line.Program, line.Count, last.Count)
			} else if line.Nonce != last.Nonce {
				return lines, fmt.Errorf("program %s has nonce %s after %s: it was started anew", line.Program, line.Nonce, last.Nonce)
			}
		}
		lines = append(lines, line)
	}
	return lines, scanner.Err()
}

// Window is when a checkpoint was taken, as its object tells: times to the
// second, and how long all of the Pod stood still at once.
type Window struct {
	Start, End time.Time
	Frozen     time.Duration
}

// WindowOf reads it from the status of a checkpoint that is Ready. Its freezeDuration
// counts from before the first container is asked to stand still until the last one
// runs: on a busy machine each of them stands for less of it. While the phase "capture"
// lasts, they all do.
func WindowOf(status checkpointv1alpha1.PodCheckpointStatus) (w Window, err error) {
	if status.StartTime == nil || status.CompletionTime == nil {
		return w, errors.New("the checkpoint does not say when it was taken")
	}
	w.Start, w.End = status.StartTime.Time, status.CompletionTime.Time
	for _, p := range status.Phases {
		if p.Name == "capture" {
			w.Frozen = p.Duration.Duration
		}
	}
	if w.Frozen <= 0 {
		return w, fmt.Errorf("the checkpoint does not say how long its phase \"capture\" took: %+v", status.Phases)
	}
	return w, nil
}

// Continues judges whether restored goes on exactly where source was cut, and
// returns the last count that was logged before the cut and the first after it.
func Continues(source, restored []Line, window Window) (cut, first uint64, err error) {
	if len(source) == 0 || len(restored) == 0 {
		return 0, 0, fmt.Errorf("the source logged %d counts, the restored Pod %d", len(source), len(restored))
	}
	first = restored[0].Count
	if restored[0].Nonce != source[0].Nonce {
		return 0, first, fmt.Errorf("the restored nonce is %s, the source's %s", restored[0].Nonce, source[0].Nonce)
	}
	index := int(first) - int(source[0].Count) // of the source's line with the same count
	if index < 1 || index >= len(source) {
		return 0, first, fmt.Errorf("the restored Pod begins with count %d, the source logged %d to %d",
			first, source[0].Count, source[len(source)-1].Count)
	}
	cut = source[index-1].Count
	at := source[index-1].Time
	if at.Before(window.Start.Add(-time.Second)) || at.After(window.End.Add(time.Second)) {
		return cut, first, fmt.Errorf("the restored Pod begins with count %d, which the source reached at %s: not while the checkpoint was taken, %s to %s",
			first, at.Format(time.TimeOnly), window.Start.Format(time.TimeOnly), window.End.Format(time.TimeOnly))
	}
	// A program may be frozen after it looked at the clock and before it wrote its
	// line: then the gap shows one line later.
	stood := source[index].Time.Sub(at)
	if index+1 < len(source) {
		stood = max(stood, source[index+1].Time.Sub(source[index].Time))
	}
	// The program's clock need not be the node's, to the last bit.
	if stood < window.Frozen*9/10 {
		return cut, first, fmt.Errorf("the restored Pod begins with count %d, where the source stood still for %s: it was frozen for %s, elsewhere",
			first, stood.Round(time.Millisecond), window.Frozen.Round(time.Millisecond))
	}
	if restored[0].Time.Before(at) {
		return cut, first, fmt.Errorf("the restored Pod's first line is older than the source's last before the cut")
	}
	return cut, first, nil
}
