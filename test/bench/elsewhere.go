package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// elsewhere has the end-to-end tests' benchmark bring up a cluster of two nodes, store a
// large Pod, and restore one on the other node. Its lines are passed on.
func elsewhere(ctx context.Context, _ *bench, _ string) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-timeout=60m", "-run=^$", "-bench=^BenchmarkElsewhere$", "-benchtime=1x", "./test/e2e")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return err
	}
	var said strings.Builder
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if text := lines.Text(); strings.HasPrefix(text, "bench: ") {
			fmt.Println(text)
		} else {
			fmt.Fprintln(&said, text)
		}
	}
	if err := errors.Join(lines.Err(), cmd.Wait()); err != nil {
		return fmt.Errorf("go test ./test/e2e: %w\n%s", err, said.String())
	}
	return nil
}
