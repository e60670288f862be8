package freeze

import (
	"testing"
	"time"

	"podstasis.dev/stasis/test/bench/load"
)

// looked are samples every two milliseconds, of a server that answers one request in each
// but within pauses, and half as many after the first of them.
func looked(begun time.Time, length time.Duration, pauses ...[2]time.Duration) (samples []load.Sample) {
	done := uint64(0)
	for at := time.Duration(0); at < length; at += 2 * time.Millisecond {
		stands, slow := false, false
		for _, p := range pauses {
			stands = stands || p[0] <= at && at < p[1]
		}
		if len(pauses) > 0 {
			slow = at > pauses[0][1]
		}
		if !stands && (!slow || at%(4*time.Millisecond) == 0) {
			done++
		}
		samples = append(samples, load.Sample{At: begun.Add(at), Done: done})
	}
	return samples
}

func TestTheThawIsTheEndOfThePauseThatIsAsLongAsTheFreeze(t *testing.T) {
	begun := time.Now()
	after := func(ms int) time.Time { return begun.Add(time.Duration(ms) * time.Millisecond) }
	ms := func(from, to int) [2]time.Duration {
		return [2]time.Duration{time.Duration(from) * time.Millisecond, time.Duration(to) * time.Millisecond}
	}
	samples := looked(begun, 10*time.Second, ms(3000, 3040), ms(4000, 4060))
	at, err := thawed(samples, after(2000), after(9000), 41*time.Millisecond)
	if err != nil || at.Sub(after(3040)).Abs() > 4*time.Millisecond {
		t.Errorf("thawed %s after the beginning, %v", at.Sub(begun), err)
	}
	// What happened before the checkpoint was asked for was not its freeze.
	at, err = thawed(samples, after(3500), after(9000), 39*time.Millisecond)
	if err != nil || at.Sub(after(4060)).Abs() > 4*time.Millisecond {
		t.Errorf("thawed %s after the beginning, %v", at.Sub(begun), err)
	}
	if at, err := thawed(samples, after(20000), after(30000), time.Millisecond); err == nil {
		t.Errorf("of samples of another time: thawed at %s", at)
	}
}

func TestSharesAreOfWhatWasUsualBefore(t *testing.T) {
	begun := time.Now()
	samples := looked(begun, 10*time.Second, [2]time.Duration{3 * time.Second, 3100 * time.Millisecond})
	all, err := shares(samples, begun.Add(2900*time.Millisecond), begun.Add(3100*time.Millisecond), 2*time.Second, begun.Add(8*time.Second))
	if err != nil || len(all) != 2 || all[0].until != "_while_read" || all[1].until != "" {
		t.Fatalf("%+v, %v", all, err)
	}
	for _, g := range all {
		if g.ratio < 0.49 || g.ratio > 0.51 {
			t.Errorf("%q: %.3f of the usual, want a half", g.until, g.ratio)
		}
	}
	if all, err := shares(samples, begun.Add(2900*time.Millisecond), begun.Add(3100*time.Millisecond), 0, begun.Add(8*time.Second)); err != nil || len(all) != 1 {
		t.Errorf("of a checkpoint that read nothing while the program ran: %+v, %v", all, err)
	}
}
