// Package gotest runs go test, and tells of each test what came of it.
package gotest

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Test is one that is over.
type Test struct {
	Name string
	// Action is pass, fail or skip.
	Action string
	// Output is what it printed, and its parts.
	Output []string
}

// Run runs go test with arguments, and calls over with each test that is over, and
// outside with each line that is no test's. Variables of the environment are added. When
// ctx ends the tests are interrupted, and have a minute to take down what they have made.
func Run(ctx context.Context, env []string, over func(Test), outside func(line string), args ...string) error {
	return RunCommand(Command(ctx, env, args...), over, outside)
}

// Command is what Run runs.
func Command(ctx context.Context, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-count=1"}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	return cmd
}

// RunCommand runs a command that prints what go test -json does.
func RunCommand(cmd *exec.Cmd, over func(Test), outside func(line string)) error {
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	read(out, over, outside)
	return cmd.Wait()
}

// read reads what go test -json prints. Parts of tests are told with their test.
func read(from io.Reader, over func(Test), outside func(line string)) {
	said := map[string][]string{}
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadString('\n')
		var e struct{ Action, Test, Output string }
		if text := strings.TrimRight(line, "\n"); text != "" && json.Unmarshal([]byte(text), &e) != nil {
			outside(text)
		}
		switch top, _, part := strings.Cut(e.Test, "/"); {
		case e.Action == "output" && top == "":
			outside(strings.TrimRight(e.Output, "\n"))
		case e.Action == "output":
			said[top] = append(said[top], e.Output)
		case part || top == "":
		case e.Action == "pass" || e.Action == "fail" || e.Action == "skip":
			over(Test{top, e.Action, said[top]})
			delete(said, top)
		}
		if err != nil {
			return
		}
	}
}
