package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A list that has fallen behind the source says so at once, and not only when
// somebody tries all of it, which takes long.
func TestEveryMutantChangesTheSourceAndNamesATestThatExists(t *testing.T) {
	root := filepath.Join("..", "..")
	names := map[string]bool{}
	for _, m := range slices.Concat(mutants, aggregated) {
		if names[m.name] {
			t.Errorf("two mutants are called %q", m.name)
		}
		names[m.name] = true
		if _, err := m.mutated(root); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
		files, err := filepath.Glob(filepath.Join(root, m.pkg, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			found = found || strings.Contains(string(content), "\nfunc "+m.test+"(t *testing.T)")
		}
		if !found {
			t.Errorf("%s: %s has no test %s", m.name, m.pkg, m.test)
		}
	}
}
