package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// result is a row of the table.
type result struct {
	*app
	cold, checkpoint, frozen, restore []time.Duration
	bytes                             []int64
	refusal                           string
	err                               error
}

// markdown is the table. Figures are medians.
func markdown(results []result) string {
	var b strings.Builder
	b.WriteString("| application | checked | checkpoint ms | frozen ms | size | restore ms | cold start ms | cold start / restore | restored | verdict |\n")
	b.WriteString("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n")
	for _, r := range results {
		ratio := ""
		if cold, restore := median(r.cold), median(r.restore); cold > 0 && restore > 0 {
			ratio = fmt.Sprintf("%.1f", cold.Seconds()/restore.Seconds())
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s | %d× | %s |\n", r.name, r.Checks,
			millis(r.checkpoint), millis(r.frozen), size(r.bytes), millis(r.restore), millis(r.cold), ratio, len(r.restore), r.verdict())
	}
	for i, r := range slices.DeleteFunc(slices.Clone(results), func(r result) bool { return r.Needs == "" }) {
		if i == 0 {
			b.WriteString("\nWhat was done for them:\n\n")
		}
		fmt.Fprintf(&b, "- %s: %s\n", r.name, r.Needs)
	}
	return b.String()
}

// briefly is the table of another engine than the document's first one.
func briefly(results []result, now time.Time) string {
	var b strings.Builder
	passed := 0
	for _, r := range results {
		if r.err == nil {
			passed++
		}
	}
	fmt.Fprintf(&b, "Of %s: %d of %d applications live on.\n\n", now.Format(time.DateOnly), passed, len(results))
	b.WriteString("| application | checkpoint ms | frozen ms | size | restore ms | cold start ms | restored | verdict |\n")
	b.WriteString("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n")
	for _, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %d× | %s |\n", r.name, millis(r.checkpoint), millis(r.frozen), size(r.bytes), millis(r.restore), millis(r.cold), len(r.restore), r.verdict())
	}
	return b.String()
}

func (r result) verdict() string {
	switch {
	case r.err != nil:
		return "**fails**: " + strings.ReplaceAll(r.err.Error(), "\n", "; ")
	case r.refusal != "":
		return "refused before the freeze: " + r.refusal
	}
	return "lives on"
}

func median[T int64 | time.Duration](of []T) T {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

func millis(of []time.Duration) string {
	if len(of) == 0 {
		return ""
	}
	return fmt.Sprint(median(of).Milliseconds())
}

func size(of []int64) string {
	if len(of) == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f MiB", float64(median(of))/(1<<20))
}
