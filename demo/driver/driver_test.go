package driver

import (
	"strings"
	"testing"
	"time"
)

func TestTheLastLineTellsCountsFreezeAndRestore(t *testing.T) {
	o := outcome{cut: map[string]uint64{"a": 171, "b": 170}, first: map[string]uint64{"a": 172, "b": 171}, frozen: 143 * time.Millisecond, restore: 1071 * time.Millisecond}
	if got, want := o.line(), "demo: ok a=171→172 b=170→171 frozen=143 restore=1071"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTheTimeOfARestoreIsTakenFromWhatTheCommandPrints(t *testing.T) {
	got, err := restoredIn("pod/x ready\n  Node:       node-1\n  Restored in: 1071ms\n")
	if err != nil || got != 1071*time.Millisecond {
		t.Errorf("got %s, %v", got, err)
	}
	if _, err := restoredIn("pod/x ready\n"); err == nil {
		t.Error("output without a time was taken")
	}
}

func TestOutputOfCommandsIsSetOffLineByLine(t *testing.T) {
	var out strings.Builder
	i := &indenter{out: &out}
	for _, part := range []string{"one\ntw", "o\n", "three"} {
		if n, err := i.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	pad := strings.Repeat(" ", 13)
	if want := pad + "one\n" + pad + "two\n" + pad + "three"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
