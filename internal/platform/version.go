package platform

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Version is what counts of a program's or a kernel's version: major and minor. What comes
// after them is a distribution's affair.
type Version [2]int

// ParseVersion reads versions such as 4.2.1, v2.4.1, 1.3.0-rc.1 and 6.12-amd64.
func ParseVersion(text string) (v Version, err error) {
	major, rest, found := strings.Cut(strings.TrimPrefix(text, "v"), ".")
	if end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
		rest = rest[:end]
	}
	for i, digits := range []string{major, rest} {
		n, err := strconv.ParseUint(digits, 10, 31)
		if !found || err != nil {
			return Version{}, fmt.Errorf("%q is not a version", text)
		}
		v[i] = int(n)
	}
	return v, nil
}

// Older says whether v comes before than.
func (v Version) Older(than Version) bool { return slices.Compare(v[:], than[:]) < 0 }

func (v Version) String() string { return fmt.Sprintf("%d.%d", v[0], v[1]) }
