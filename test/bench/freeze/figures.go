package freeze

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Figure is one line of output.
type Figure struct {
	Name  string
	Value float64
	Unit  string
}

// find returns what was measured of a contender; an empty result if nothing was.
func (r *Report) find(key string, s Shape) *Result {
	for _, result := range r.Results {
		if result.Key == key && result.Shape == s {
			return result
		}
	}
	return &Result{}
}

func (r *Result) restore(key string) RestoreResult {
	for _, way := range r.Restores {
		if way.Key == key {
			return way
		}
	}
	return RestoreResult{}
}

// stasis is the key of the capture that is used where nothing else is asked for.
func (r *Report) stasis() string {
	if slices.ContainsFunc(r.Results, func(r *Result) bool { return r.Key == "cow" }) {
		return "cow"
	}
	return "plain"
}

// name is a shape in the name of a figure.
func (s Shape) name() string {
	text := strings.ToLower(strings.ReplaceAll(size(s.MiB), " ", ""))
	if s.Containers > 1 {
		return fmt.Sprintf("%dx%s", s.Containers, text)
	}
	return text
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }

// figures collects lines, and leaves out those of which something was not measured.
type figures []Figure

func (f *figures) millis(name string, d []time.Duration) {
	if len(d) > 0 {
		*f = append(*f, Figure{name, ms(median(d)), "ms"})
	}
}

func (f *figures) ratio(name string, of, to time.Duration, unit string) {
	if of > 0 && to > 0 {
		*f = append(*f, Figure{name, of.Seconds() / to.Seconds(), unit})
	}
}

// Figures are all medians, and what is made of them.
func (r *Report) Figures() []Figure {
	var f figures
	for _, result := range r.Results {
		name := result.Key + "_" + result.Shape.name()
		f.millis("freeze_"+name+"_ms", result.Freeze)
		f.millis("freeze_"+name+"_said_ms", result.Reported)
		f.millis("ready_"+name+"_ms", result.Ready)
		if len(result.Bytes) > 0 {
			f = append(f, Figure{"bytes_" + name + "_mib", float64(median(result.Bytes)) / (1 << 20), "MiB"})
		}
		for _, way := range result.Restores {
			name := way.Key + "_" + result.Shape.name()
			f.millis("restore_"+name+"_asked_ms", way.Asked)
			f.millis("restore_"+name+"_first_ms", way.First)
			f.millis("restore_"+name+"_all_ms", way.All)
			f.millis("restore_"+name+"_whole_ms", way.Whole)
		}
	}
	for _, s := range r.Seen {
		f.millis("client_longest_gap_"+s.Key+"_ms", s.Longest)
		f.millis("client_p999_"+s.Key+"_ms", s.P999)
	}
	for _, t := range r.Throughput {
		f = append(f, Figure{t.Key, median(t.Ratio), "x"})
	}
	return append(f, r.compared()...)
}

var (
	gib1, gib4 = Shape{1, 1024}, Shape{1, 4096}
	least      = Shape{1, 64}
)

// compared are the figures that compare.
func (r *Report) compared() []Figure {
	var f figures
	froze := func(key string, s Shape) time.Duration { return median(r.find(key, s).Freeze) }
	stasis := r.stasis()
	for _, s := range []Shape{gib1, gib4} {
		f.ratio("freeze_vs_criu_"+s.name(), froze(stasis, s), froze("criu", s), "x")
		f.ratio("freeze_vs_kubelet_"+s.name(), froze(stasis, s), froze("kubelet", s), "x")
		f.ratio("freeze_vs_podman_"+s.name(), froze(stasis, s), froze("podman", s), "x")
	}
	if small, large := froze(stasis, gib1), froze(stasis, gib4); small > 0 && large > 0 {
		f = append(f, Figure{"freeze_growth_ms_per_gib", ms(large-small) / 3, "ms/GiB"})
	}
	for _, n := range []int{1, 2, 4} {
		s := Shape{n, 512}
		f.ratio(fmt.Sprintf("freeze_plain_vs_criu_%d_containers", n), froze("plain", s), froze("criu", s), "x")
	}
	f.ratio("freeze_to_a_store_vs_node_1gib", froze("stored", gib1), froze(stasis, gib1), "x")
	f.ratio("freeze_plain_to_a_store_vs_node_1gib", froze("plain_stored", gib1), froze("plain", gib1), "x")
	if off, some := r.said(); some {
		f = append(f, Figure{"freeze_said_minus_measured_ms", ms(off), "ms"})
	}
	f = append(f, r.restores()...)
	return f
}

// said is the difference between the freeze that Stasis reports and the one that
// programs noticed, where it is largest.
func (r *Report) said() (off time.Duration, some bool) {
	for _, result := range r.Results {
		for i, said := range result.Reported {
			some = true
			if d := said - result.Freeze[i]; d.Abs() > off.Abs() {
				off = d
			}
		}
	}
	return off, some
}

// restores compares restores. That of Stasis is counted from the request for a Pod where
// bandwidths are compared: what it does before it makes containers is part of it, and what does
// not grow with memory falls out of a difference.
func (r *Report) restores() figures {
	var f figures
	of := func(way string, s Shape) RestoreResult {
		for _, key := range []string{"plain", "cow"} {
			if got := r.find(key, s).restore(way); len(got.Asked) > 0 {
				return got
			}
		}
		return RestoreResult{}
	}
	eager, lazy := of("eager", gib1), of("lazy", gib1)
	f.millis("eager_first_instruction_1gib_ms", eager.First)
	f.millis("lazy_first_instruction_1gib_ms", lazy.First)
	large := gib4
	if all := r.single(); len(all) > 0 && all[len(all)-1] != least { // no other, where less was asked for
		large = all[len(all)-1]
	}
	f.ratio("lazy_first_instruction_largest_vs_64mib", median(of("lazy", large).First), median(of("lazy", least).First), "x")
	f.ratio("lazy_all_vs_eager_1gib", median(lazy.Whole), median(eager.Whole), "x")
	f.ratio("lazy_all_vs_eager_4gib", median(of("lazy", gib4).Whole), median(of("eager", gib4).Whole), "x")
	grown := func(small, large RestoreResult) time.Duration {
		if len(small.Asked) == 0 || len(large.Asked) == 0 {
			return 0
		}
		return median(large.Asked) - median(small.Asked)
	}
	d := grown(of("eager", least), of("eager", gib4))
	f.ratio("eager_vs_criu_restore_bandwidth", grown(r.find("criu", least).restore("criu"), r.find("criu", gib4).restore("criu")), d, "x")
	if d > 0 {
		f = append(f, Figure{"eager_restore_mib_s", float64(gib4.MiB-least.MiB) / d.Seconds(), "MiB/s"})
	}
	return f
}
