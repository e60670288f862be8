package contents

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits bound what Read reads, keeps and gives out. What is zero is the default,
// in brackets.
type Limits struct {
	// ImageBytes are read of all the engine's images together, besides the pages of
	// command lines and environments (256 MiB).
	ImageBytes int64
	// HeldBytes are held of one container's images at a time (64 MiB).
	HeldBytes int64
	// Bytes is about how large the answer becomes (16 MiB).
	Bytes int64
	// StringBytes is the longest string; longer ones end with "…" (4096).
	StringBytes int
	// Containers (256) and Volumes (1024) of the Pod.
	Containers, Volumes int
	// Processes of a container (4096), and of each: Threads named (64), Mappings (40),
	// Files (1024), Arguments (256), Variables of its environment (512).
	Processes, Threads, Mappings, Files, Arguments, Variables int
	// Sockets (2048), Mounts (512), Changes (5000) and Notes (64) of a container.
	Sockets, Mounts, Changes, Notes int
	// TarEntries are looked at in all tar files together (1000000), and TarBytes read of
	// them (1 GiB).
	TarEntries int
	TarBytes   int64
	// DigestFileBytes is the largest changed file that is digested (1 MiB), DigestBytes
	// what is digested in all (64 MiB).
	DigestFileBytes, DigestBytes int64
}

func (l Limits) withDefaults() Limits {
	for _, d := range []struct {
		limit   *int64
		initial int64
	}{
		{&l.ImageBytes, 256 << 20}, {&l.HeldBytes, 64 << 20}, {&l.Bytes, 16 << 20},
		{&l.DigestFileBytes, 1 << 20}, {&l.DigestBytes, 64 << 20}, {&l.TarBytes, 1 << 30},
	} {
		if *d.limit == 0 {
			*d.limit = d.initial
		}
	}
	for _, d := range []struct {
		limit   *int
		initial int
	}{
		{&l.StringBytes, 4096}, {&l.Containers, 256}, {&l.Volumes, 1024}, {&l.Processes, 4096}, {&l.Threads, 64}, {&l.Mappings, 40}, {&l.Files, 1024},
		{&l.Arguments, 256}, {&l.Variables, 512}, {&l.Sockets, 2048}, {&l.Mounts, 512}, {&l.Changes, 5000},
		{&l.Notes, 64}, {&l.TarEntries, 1_000_000},
	} {
		if *d.limit == 0 {
			*d.limit = d.initial
		}
	}
	return l
}

// bounds keep count of what has been given out.
type bounds struct {
	limits Limits
	given  int64
	digest int64 // bytes digested
	looked int   // at entries of tar files
	tar    int64 // bytes read of them
	cut    []string
	uncut  bool // more was cut than cut holds
}

// itemBytes is what an item of a list takes besides its strings.
const itemBytes = 64

// maxCut bounds the list of what was cut.
const maxCut = 200

func newBounds(l Limits) *bounds { return &bounds{limits: l.withDefaults()} }

// fits says whether a list that has n items may have another one, whose strings are
// of size bytes. If not, the list's path is noted.
func (b *bounds) fits(path string, n, limit, size int) bool {
	cost := int64(min(size, b.limits.StringBytes) + itemBytes)
	if n < limit && b.given+cost <= b.limits.Bytes {
		b.given += cost
		return true
	}
	b.cuts(path)
	return false
}

func (b *bounds) cuts(path string) {
	switch last := len(b.cut) - 1; {
	case last >= 0 && b.cut[last] == path || slices.Contains(b.cut, path):
	case len(b.cut) < maxCut:
		b.cut = append(b.cut, path)
	default:
		b.uncut = true
	}
}

func (b *bounds) truncated() []string {
	if b.uncut {
		return append(b.cut, "…")
	}
	return b.cut
}

// clean makes a string valid UTF-8 of bounded length.
func (b *bounds) clean(s string) string {
	if len(s) > b.limits.StringBytes {
		end := b.limits.StringBytes
		for end > 0 && !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// notes are a container's.
type notes struct {
	*bounds
	all []string
}

// add adds a note, each once.
func (n *notes) add(format string, args ...any) {
	note := n.clean(fmt.Sprintf(format, args...))
	if slices.Contains(n.all, note) {
		return
	}
	switch {
	case len(n.all) < n.limits.Notes:
		n.all = append(n.all, note)
	case len(n.all) == n.limits.Notes:
		n.all = append(n.all, "and more that is not said")
	}
}

// Printable shows a string on a terminal: what is not a letter, mark, number,
// punctuation, symbol or space is escaped, so that no name can move the cursor,
// change colours or turn the direction of writing.
func Printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) < 0 {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && s[i] != 0xef:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
