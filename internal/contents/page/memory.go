package page

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

// kinds of mappings, in the order of the legend.
func kinds() []string {
	return []string{"anonymous", "heap", "stack", "shared", "file", "vdso", "other"}
}

// class of a kind, which colours it.
func class(name string) string {
	if slices.Contains(kinds(), name) {
		return "k-" + name
	}
	return "k-other"
}

// legend names the kinds that a container's processes have, with their sums. What is
// shared is not summed up: it is the same memory in every process.
func legend(c *api.ContainerContents) []kind {
	var out []kind
	for _, name := range kinds() {
		sum := int64(0)
		for i := range c.Processes {
			if bytes := c.Processes[i].Memory.ByKind[name]; name == "shared" {
				sum = max(sum, bytes)
			} else {
				sum += bytes
			}
		}
		if sum > 0 {
			out = append(out, kind{class(name), name, contents.Bytes(sum)})
		}
	}
	return out
}

// byKind is a process's memory as a bar, and in words.
func byKind(p *api.Process) (bar []segment, described string) {
	var words []string
	left := p.Memory.Captured
	for _, name := range kinds() {
		bytes := p.Memory.ByKind[name]
		if bytes <= 0 {
			continue
		}
		left -= bytes
		text := fmt.Sprintf("%s %s", name, contents.Bytes(bytes))
		words = append(words, text)
		bar = append(bar, segment{class(name), text, share(bytes, p.Memory.Captured)})
	}
	if left > 0 {
		bar = append(bar, segment{class("other"), "of other kinds " + contents.Bytes(left), share(left, p.Memory.Captured)})
	}
	return bar, strings.Join(words, ", ")
}

// share is in thousandths, and never so little that it does not show.
func share(part, whole int64) float64 {
	if whole <= 0 {
		return 1
	}
	return max(float64(part)/float64(whole)*1000, 1)
}

// byAddress is a process's mappings from the lowest address to the highest, each as
// wide as what was captured of it; those that are not listed come last.
func byAddress(p *api.Process) []segment {
	mappings := slices.Clone(p.Mappings)
	slices.SortFunc(mappings, func(a, b api.Mapping) int {
		return cmp.Or(cmp.Compare(len(a.Start), len(b.Start)), strings.Compare(a.Start, b.Start))
	})
	var out []segment
	left := p.Memory.Captured
	for _, m := range mappings {
		if m.CapturedBytes <= 0 {
			continue
		}
		left -= m.CapturedBytes
		title := show(fmt.Sprintf("%s–%s %s %s %s, %s captured", m.Start, m.End, m.Protection, m.Kind, m.Path, contents.Bytes(m.CapturedBytes)))
		out = append(out, segment{class(m.Kind), title, share(m.CapturedBytes, p.Memory.Captured)})
	}
	if left > 0 {
		out = append(out, segment{"k-rest", "smaller mappings, " + contents.Bytes(left) + " captured", share(left, p.Memory.Captured)})
	}
	return out
}
