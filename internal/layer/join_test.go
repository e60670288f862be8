package layer

import (
	"slices"
	"testing"
)

func TestOfTooManyHolesTheSmallestAreLeftOut(t *testing.T) {
	const kib = 1 << 10
	// Data of 1 KiB each, with holes between them of 20, 20, 100 and 1000 KiB.
	found := []extent{{0, kib}, {21 * kib, kib}, {42 * kib, kib}, {143 * kib, kib}, {1144 * kib, kib}}
	const size = 2000 * kib
	for most, want := range map[int][]extent{
		5: found,
		4: {{0, 43 * kib}, {143 * kib, kib}, {1144 * kib, kib}},
		2: {{0, 144 * kib}, {1144 * kib, kib}},
		1: {{0, size}},
	} {
		if got := atMost(found, size, most); !slices.Equal(got, want) {
			t.Errorf("of %d there are left %v, want %v", most, got, want)
		}
	}
	for name, c := range map[string]struct {
		found, want []extent
		size        int64
	}{
		"an empty file":                      {nil, []extent{{0, 0}}, 0},
		"nothing but a small hole":           {nil, []extent{{0, 5 * kib}}, 5 * kib},
		"nothing but a hole":                 {nil, nil, 64 * kib},
		"a small hole at the begin":          {[]extent{{8 * kib, kib}}, []extent{{0, 9 * kib}}, 64 * kib},
		"a small hole at the end":            {[]extent{{60 * kib, kib}}, []extent{{60 * kib, 4 * kib}}, 64 * kib},
		"small holes at the end and between": {[]extent{{0, kib}, {8 * kib, 50 * kib}}, []extent{{0, 60 * kib}}, 60 * kib},
	} {
		if got := atMost(c.found, c.size, 10); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
