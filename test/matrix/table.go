package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// heading is what comes before the lines of the rows.
var heading = fmt.Sprintf("Each row is a cluster of two nodes and %d end-to-end tests; those without Kubernetes have tests of their own: that of Podman of containers that conmon starts by `stasis-runtime`, "+
	"that of systemd of the container runtime's side alone (`test/cri`), in an emulated machine.\n\n", len(tests)) +
	"| Kubernetes | containerd | OCI runtime | CRIU | tested on | |\n| --- | --- | --- | --- | --- | --- |\n"

// markdown is the results as a table. Of an older one the rows stay that are of none of the
// results.
func markdown(results []result, older string, now time.Time) string {
	var lines []string
	_, rest, _ := strings.Cut(older, " --- |\n")
	for line := range strings.Lines(rest) {
		lines = append(lines, line)
	}
	for _, r := range results {
		line := r.line(now)
		if i := slices.IndexFunc(lines, func(l string) bool { return versions(l) == versions(line) }); i >= 0 {
			lines[i] = line
		} else {
			lines = append(lines, line)
		}
	}
	return heading + strings.Join(lines, "")
}

func (r *result) line(now time.Time) string {
	kubernetes, containerd, criu := plain(r.Kubernetes), plain(r.Containerd), r.criu
	switch {
	case r.Podman:
		kubernetes, containerd, criu = "none", "none; Podman "+r.podman+", conmon", "none"
	case r.Emulated:
		kubernetes, containerd = "none", containerd+"; cgroup v2 by systemd (Debian trixie, emulated)"
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s |\n", kubernetes, containerd, r.runtime(), criu, now.UTC().Format(time.DateOnly), cell(r.verdict()))
}

// versions are the cells by which a line is known.
func versions(line string) string {
	cells := strings.SplitN(line, " | ", 5)
	return strings.Join(cells[:min(4, len(cells))], " | ")
}

func plain(version string) string { return strings.TrimPrefix(version, "v") }

func cell(s string) string { return strings.NewReplacer("|", "\\|", "\n", " ").Replace(s) }
