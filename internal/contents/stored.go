package contents

import (
	"fmt"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// StoredTable shows what of a checkpoint its store had when it was stored: a heading, then
// a row for memory and one for files. Nothing if that is not known.
func StoredTable(in *checkpointv1alpha1.StoredCheckpoint) [][]string {
	if in == nil || in.Memory == nil || in.Files == nil {
		return nil
	}
	rows := [][]string{{"", "ALL", "ZEROS", "THERE BEFORE"}}
	if in.Previous != nil {
		rows[0] = append(rows[0], "OF THESE SHARED WITH "+previousName(in.Previous))
	}
	for _, kind := range []struct {
		name string
		of   *checkpointv1alpha1.StoredShare
	}{{"memory", in.Memory}, {"files", in.Files}} {
		row := []string{kind.name, Bytes(kind.of.Bytes), Bytes(kind.of.ZeroBytes), partOf(kind.of.PresentBytes, kind.of.Bytes)}
		if in.Previous != nil {
			row = append(row, partOf(kind.of.PreviousBytes, kind.of.Bytes))
		}
		rows = append(rows, row)
	}
	return rows
}

func previousName(p *checkpointv1alpha1.PreviousCheckpoint) string {
	if p.Name == "" {
		return fmt.Sprintf("%.16s…", Printable(p.CheckpointID))
	}
	return Printable(p.Name)
}

// partOf rounds down, so that only all is 100%.
func partOf(some, all int64) string {
	if all <= 0 {
		return Bytes(some)
	}
	return fmt.Sprintf("%s (%d%%)", Bytes(some), int(100*(float64(some)/float64(all))))
}
