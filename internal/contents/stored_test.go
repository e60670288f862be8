package contents_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

func TestWhatIsSharedIsShownForMemoryAndFiles(t *testing.T) {
	in := &checkpointv1alpha1.StoredCheckpoint{
		Name: "s", CheckpointID: "1", NewBytes: 5,
		Memory: &checkpointv1alpha1.StoredShare{Bytes: 1 << 30, ZeroBytes: 1 << 20, PresentBytes: 1<<30 - 1<<28, PreviousBytes: 1 << 29},
		Files:  &checkpointv1alpha1.StoredShare{},
	}
	if got := contents.StoredTable(&checkpointv1alpha1.StoredCheckpoint{Name: "s"}); got != nil {
		t.Errorf("of what nothing is known of: %v", got)
	}
	want := [][]string{{"", "ALL", "ZEROS", "THERE BEFORE"}, {"memory", "1.0 GiB", "1.0 MiB", "768.0 MiB (75%)"}, {"files", "0 B", "0 B", "0 B"}}
	if diff := cmp.Diff(want, contents.StoredTable(in)); diff != "" {
		t.Error(diff)
	}
	for name, heading := range map[string]string{"": "OF THESE SHARED WITH 0123456789abcdef…", "web-1": "OF THESE SHARED WITH web-1", "\x1b[2J": `OF THESE SHARED WITH \x1b[2J`} {
		in.Previous = &checkpointv1alpha1.PreviousCheckpoint{CheckpointID: "0123456789abcdef0123456789abcdef", Name: name}
		rows := contents.StoredTable(in)
		if rows[0][4] != heading || rows[1][4] != "512.0 MiB (50%)" {
			t.Errorf("with %q: %q", name, rows)
		}
	}
}
