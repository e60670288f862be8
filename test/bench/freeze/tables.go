package freeze

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/bench/chart"
	"podstasis.dev/stasis/test/document"
)

// command writes the tables.
const command = "make bench BENCH=freeze UPDATE=docs/benchmarks.md"

// plots are drawn into this directory beside the document.
const plots = "images"

// Update writes the tables into a document, between its marks, and the plots beside it.
func (r *Report) Update(file string) error {
	for name, c := range map[string]chart.Chart{"freeze.svg": r.freezeChart(), "restore.svg": r.restoreChart()} {
		var drawing bytes.Buffer
		if err := c.Write(&drawing); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(file), plots, name), drawing.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return document.Update(file, command, r.Markdown())
}

// Markdown is everything as tables.
func (r *Report) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\nMeasured on %s, %s; medians of %s; %s in all.\n", time.Now().UTC().Format(time.DateOnly), machine(), r.counts(), r.Took.Round(time.Second))
	b.WriteString("\n![How long a container stands still, by its memory](images/freeze.svg)\n")
	b.WriteString("\n| memory | checkpoint by | frozen, ms | it says, ms | until Ready, ms | MiB |\n| --- | --- | ---: | ---: | ---: | ---: |\n")
	for _, result := range r.Results {
		if len(result.Freeze) > 0 {
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", result.Shape, result.Contender, millis(result.Freeze), millis(result.Reported), millis(result.Ready), mib(result.Bytes))
		}
	}
	b.WriteString("\n![How soon a restored program runs, by its memory](images/restore.svg)\n")
	b.WriteString("\n| memory | restore by | request to first instruction, ms | container's creation to first instruction, ms | to all memory there, ms | request to all memory there, ms |\n| --- | --- | ---: | ---: | ---: | ---: |\n")
	for _, result := range r.Results {
		for _, way := range result.Restores {
			if len(way.Asked) > 0 {
				fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", result.Shape, way.Name, millis(way.Asked), millis(way.First), millis(way.All), millis(way.Whole))
			}
		}
	}
	if len(r.Seen) > 0 {
		fmt.Fprintf(&b, "\n| a client of %s that asks every millisecond, and sees | longest gap, ms | 99.9th percentile, ms |\n| --- | ---: | ---: |\n", paysShape)
		for _, s := range r.Seen {
			fmt.Fprintf(&b, "| %s | %.1f | %.1f |\n", s.What, ms(median(s.Longest)), ms(median(s.P999)))
		}
	}
	b.WriteString("\n| compared | figure | wanted |\n| --- | ---: | ---: |\n")
	for _, t := range r.Throughput {
		fmt.Fprintf(&b, "| `%s` | %.2f | %s |\n", t.Key, median(t.Ratio), wanted[t.Key])
	}
	for _, f := range r.compared() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Name, value(f), wanted[f.Name])
	}
	b.WriteString(r.profiles())
	b.WriteString("\n")
	return b.String()
}

// wanted are bounds that are set for figures.
var wanted = map[string]string{
	"freeze_vs_criu_1gib":                     "≤ 0.33",
	"freeze_vs_criu_4gib":                     "≤ 0.125",
	"freeze_vs_kubelet_1gib":                  "≤ 0.05",
	"freeze_growth_ms_per_gib":                "≤ 40 ms",
	"freeze_plain_vs_criu_1_containers":       "≤ 1.15",
	"freeze_plain_vs_criu_2_containers":       "≤ 1.15",
	"freeze_plain_vs_criu_4_containers":       "≤ 1.15 with four cores",
	"freeze_to_a_store_vs_node_1gib":          "0.9–1.1",
	"freeze_plain_to_a_store_vs_node_1gib":    "0.9–1.1",
	"cow_throughput_1_in_20":                  "≥ 0.70",
	"cow_throughput_1_in_20_while_read":       "≥ 0.70",
	"cow_throughput_redis_at_half":            "≥ 0.70",
	"cow_throughput_redis_at_half_while_read": "≥ 0.70",
	"lazy_first_instruction_1gib_ms":          "≤ 300 ms",
	"lazy_first_instruction_largest_vs_64mib": "≤ 1.3",
	"lazy_all_vs_eager_1gib":                  "≤ 1.5",
	"lazy_all_vs_eager_4gib":                  "≤ 1.5",
	"eager_vs_criu_restore_bandwidth":         "≥ 0.70",
}

func value(f Figure) string {
	if f.Unit == "x" {
		return fmt.Sprintf("%.3f", f.Value)
	}
	return fmt.Sprintf("%.0f %s", f.Value, f.Unit)
}

func millis(of []time.Duration) string {
	if len(of) == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", ms(median(of)))
}

func mib(of []int64) string {
	if len(of) == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", float64(median(of))/(1<<20))
}

// counts says of how many measurements medians are.
func (r *Report) counts() string {
	var counts []int
	for _, result := range r.Results {
		if n := len(result.Freeze); n > 0 && !slices.Contains(counts, n) {
			counts = append(counts, n)
		}
	}
	slices.Sort(counts)
	switch {
	case len(counts) == 0:
		return "nothing"
	case counts[0] == counts[len(counts)-1]:
		return fmt.Sprintf("%d measurements", counts[0])
	}
	return fmt.Sprintf("%d to %d measurements, fewest where one takes long", counts[0], counts[len(counts)-1])
}

// machine is what it was measured on.
func machine() string {
	var name unix.Utsname
	var info unix.Sysinfo_t
	if unix.Uname(&name) != nil || unix.Sysinfo(&info) != nil {
		return "an unknown machine"
	}
	memory := info.Totalram * uint64(info.Unit) >> 30
	return fmt.Sprintf("%d cores, %d GiB, Linux %s", runtime.NumCPU(), memory, unix.ByteSliceToString(name.Release[:]))
}

// single are the shapes of one container, by memory.
func (r *Report) single() []Shape {
	var shapes []Shape
	for _, result := range r.Results {
		if result.Shape.Containers == 1 && !slices.Contains(shapes, result.Shape) {
			shapes = append(shapes, result.Shape)
		}
	}
	slices.SortFunc(shapes, func(a, b Shape) int { return a.MiB - b.MiB })
	return shapes
}

func (r *Report) freezeChart() chart.Chart {
	c := chart.Chart{Title: "How long a container stands still", Unit: "ms"}
	for _, s := range r.single() {
		g := chart.Group{Name: s.String()}
		for _, result := range r.Results {
			if result.Shape == s && !strings.HasSuffix(result.Key, "stored") {
				g.Values = append(g.Values, ms(median(result.Freeze)))
				if len(c.Groups) == 0 {
					c.Names = append(c.Names, result.Contender)
				}
			}
		}
		c.Groups = append(c.Groups, g)
	}
	return c
}

func (r *Report) restoreChart() chart.Chart {
	c := chart.Chart{Title: "From the container's creation to its first instruction", Unit: "ms"}
	for _, s := range r.single() {
		g := chart.Group{Name: s.String()}
		for _, result := range r.Results {
			if result.Shape != s {
				continue
			}
			for _, way := range result.Restores {
				g.Values = append(g.Values, ms(median(way.First)))
				if len(c.Groups) == 0 {
					c.Names = append(c.Names, way.Name)
				}
			}
		}
		c.Groups = append(c.Groups, g)
	}
	return c
}
