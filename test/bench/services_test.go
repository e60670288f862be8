package main

import "testing"

func TestATableIsReadByRowAndColumn(t *testing.T) {
	rows, err := readTable("\ntext\n| application | restore ms | cold start ms |\n| --- | ---: | ---: |\n| shop | 900 | 9000 |\n| search | 1 | 2 |\n\n| other |\n| x |\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 2 || rows["shop"]["cold start ms"] != "9000" || rows["search"]["restore ms"] != "1" {
		t.Errorf("%v", rows)
	}
	for _, bad := range []string{"", "no table", "| a | b |\n| --- | --- |\n| 1 |\n"} {
		if got, err := readTable(bad); err == nil {
			t.Errorf("%q was read as %v", bad, got)
		}
	}
}
