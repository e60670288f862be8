package cli

import (
	"bytes"
	"strings"
	"testing"
)

func TestTheLastLinesOfALogAreShown(t *testing.T) {
	long := strings.Repeat("x", 100<<10)
	for name, c := range map[string]struct {
		log   string
		lines int
		want  string
	}{
		"all without a limit":            {"a\nb\n", 0, "a\nb\n"},
		"fewer than there are":           {"a\nb\nc\n", 2, "b\nc\n"},
		"more than there are":            {"a\nb\n", 9, "a\nb\n"},
		"an unfinished last line":        {"a\nb", 1, "b"},
		"empty lines count":              {"a\n\n\n", 2, "\n\n"},
		"nothing":                        {"", 3, ""},
		"lines longer than what is read": {"a\n" + long + "\nb\n", 2, long + "\nb\n"},
	} {
		var out bytes.Buffer
		if err := show(t.Context(), &out, strings.NewReader(c.log), c.lines, false); err != nil {
			t.Fatal(err)
		}
		if out.String() != c.want {
			t.Errorf("%s: got %.40q, want %.40q", name, out.String(), c.want)
		}
	}
}
