package document

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWhatACommandWritesGoesBetweenItsMarks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "d.md")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := mark("make other") + "theirs\n" + end
	write("before\n" + mark("make it") + "old\n" + end + "after\n" + other)
	if err := Update(file, "make it", "new\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "before\n"+mark("make it")+"new\n"+end+"after\n"+other {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := Written(file, "make it"); err != nil || got != "new\n" {
		t.Errorf("what was written is read as %q, %v", got, err)
	}
	for _, lacks := range []string{"before\n" + end, "before\n" + mark("make it") + "after\n"} {
		write(lacks)
		if err := Update(file, "make it", "new\n"); err == nil {
			t.Errorf("%q is written to", lacks)
		}
		if got, _ := os.ReadFile(file); string(got) != lacks {
			t.Errorf("%q has become %q", lacks, got)
		}
	}
}
