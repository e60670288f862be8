package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// The table of a document is between these lines.
const (
	beginMark = "<!-- from here to the end mark: written by make matrix UPDATE=docs/compatibility.md -->\n"
	endMark   = "<!-- end of what is written -->\n"
)

// markdown is the results as a table.
func markdown(results []result, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Of %s. Each row is a cluster of two nodes and %d end-to-end tests.\n\n", now.UTC().Format(time.DateOnly), len(tests))
	b.WriteString("| Kubernetes | containerd | OCI runtime | CRIU | |\n| --- | --- | --- | --- | --- |\n")
	for _, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", plain(r.Kubernetes), plain(r.Containerd), r.runtime(), r.criu, cell(r.verdict()))
	}
	return b.String()
}

func plain(version string) string { return strings.TrimPrefix(version, "v") }

func cell(s string) string { return strings.NewReplacer("|", "\\|", "\n", " ").Replace(s) }

// between puts a table between the marks of a text.
func between(text, table string) (string, error) {
	before, rest, begins := strings.Cut(text, beginMark)
	_, after, ends := strings.Cut(rest, endMark)
	if !begins || !ends {
		return "", errors.New("it has no place for the table: the lines " + strings.TrimSpace(beginMark) + " and " + strings.TrimSpace(endMark))
	}
	return before + beginMark + table + endMark + after, nil
}
