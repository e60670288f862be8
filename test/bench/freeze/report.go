package freeze

import (
	"slices"
	"time"
)

// Report is what a run has measured.
type Report struct {
	Results    []*Result
	Seen       []*Seen
	Throughput []*Throughput
	Took       time.Duration
}

// forget drops what was measured so far.
func (r *Result) forget() {
	r.Freeze, r.Reported, r.Ready, r.Bytes, r.Profiles, r.Stats = nil, nil, nil, nil, nil, nil
	for i := range r.Restores {
		r.Restores[i] = RestoreResult{Name: r.Restores[i].Name, Key: r.Restores[i].Key}
	}
}

// median of an even number of values is the lesser of the two in the middle; of none, 0.
func median[T int64 | float64 | time.Duration](of []T) T {
	if len(of) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(of))[(len(of)-1)/2]
}
