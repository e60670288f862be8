package main

import (
	"fmt"
	"strings"
	"time"
)

// markdown is the results as a table.
func markdown(results []result, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Of %s. Each row is a cluster of two nodes and %d end-to-end tests; that of Podman has containers that conmon starts by `stasis-runtime`, and tests of its own.\n\n", now.UTC().Format(time.DateOnly), len(tests))
	b.WriteString("| Kubernetes | containerd | OCI runtime | CRIU | |\n| --- | --- | --- | --- | --- |\n")
	for _, r := range results {
		if r.Podman {
			fmt.Fprintf(&b, "| none | Podman %s, conmon | %s | none | %s |\n", r.podman, r.runtime(), cell(r.verdict()))
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", plain(r.Kubernetes), plain(r.Containerd), r.runtime(), r.criu, cell(r.verdict()))
	}
	return b.String()
}

func plain(version string) string { return strings.TrimPrefix(version, "v") }

func cell(s string) string { return strings.NewReplacer("|", "\\|", "\n", " ").Replace(s) }
