package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"podstasis.dev/stasis/test/bench/freeze"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// slow is how often as much as in test/zoo the services read at their start, to start as
// slowly as those that are restored for it: in ten seconds and more.
const slow = 8

// services compares, for two services of test/zoo, the time from a Pod's creation to its
// first answer: started as ever, and restored. A ratio of 10 is ten times as fast.
func services(ctx context.Context, b *bench, dir string) (err error) {
	root, err := cluster.Root()
	if err != nil {
		return err
	}
	c, err := freeze.Cluster(ctx, root)
	defer func() { err = errors.Join(err, c.Down(context.WithoutCancel(ctx))) }()
	if err != nil {
		return err
	}
	for _, as := range []struct {
		size   int
		figure string
	}{{1, "_small"}, {slow, ""}} {
		if err := servicesOf(ctx, b, root, dir, c.Kubeconfig(), as.size, as.figure); err != nil {
			return err
		}
	}
	return nil
}

// servicesOf starts and restores services of a size.
func servicesOf(ctx context.Context, b *bench, root, dir, kubeconfig string, size int, figure string) error {
	apps := []struct{ name, figure string }{{"search", "python" + figure}, {"shop", "jvm" + figure}}
	var names []string
	for _, a := range apps {
		names = append(names, a.name)
	}
	table := filepath.Join(dir, "zoo.md")
	cmd := exec.CommandContext(ctx, filepath.Join(root, "bin/zoo"), "-kubeconfig", kubeconfig, "-apps", strings.Join(names, ","),
		"-size", strconv.Itoa(size), "-rounds", strconv.Itoa(b.rounds), "-o", table)
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, os.Stderr, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("test/zoo: %w", err)
	}
	text, err := os.ReadFile(table)
	if err != nil {
		return err
	}
	rows, err := readTable(string(text))
	if err != nil {
		return err
	}
	for _, a := range apps {
		row, found := rows[a.name]
		if !found {
			return fmt.Errorf("test/zoo: its table has no row for %s", a.name)
		}
		var cold, restore float64
		if _, err := fmt.Sscan(row["cold start ms"]+" "+row["restore ms"], &cold, &restore); err != nil {
			return fmt.Errorf("test/zoo: its row for %s: %w", a.name, err)
		}
		report("cold_start_"+a.figure+"_ms", cold, "ms")
		report("restore_"+a.figure+"_ms", restore, "ms")
		report("restore_vs_cold_start_"+a.figure, cold/restore, "x")
	}
	return nil
}

// readTable reads the first table of a text of Markdown: its cells by row, which the first
// cell names, and column.
func readTable(text string) (map[string]map[string]string, error) {
	var head []string
	rows := map[string]map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			if head != nil {
				break
			}
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case head == nil:
			head = cells
		case len(cells) != len(head):
			return nil, fmt.Errorf("a row of the table has %d cells, its head %d: %s", len(cells), len(head), line)
		case strings.HasPrefix(cells[0], "---"):
		default:
			row := map[string]string{}
			for i, cell := range cells {
				row[head[i]] = cell
			}
			rows[cells[0]] = row
		}
	}
	if len(rows) == 0 {
		return nil, errors.New("the text has no table")
	}
	return rows, nil
}
