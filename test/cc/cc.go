// Package cc compiles the project's C programs and libraries for tests of them.
package cc

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Compile returns what the system's C compiler makes of a source, with every warning an
// error and further options. Sources are embedded by their tests: so the go command knows
// what those depend on, and its -overlay reaches them.
func Compile(source []byte, options ...string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "cc")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	built := filepath.Join(dir, "built")
	args := append([]string{"-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-o", built, "-x", "c", "-"}, options...)
	cmd := exec.Command("cc", args...)
	cmd.Stdin = bytes.NewReader(source)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%v: %w: %s", cmd, err, out)
	}
	return os.ReadFile(built)
}
