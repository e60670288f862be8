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
	for _, m := range slices.Concat(mutants, aggregated, gvisor, crossNode, stores) {
		if names[m.name] {
			t.Errorf("two mutants are called %q", m.name)
		}
		names[m.name] = true
		if _, err := m.mutated(root); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
		if !exists(t, filepath.Join(root, m.pkg), m.test) {
			t.Errorf("%s: %s has no test %s", m.name, m.pkg, m.test)
		}
	}
}

// exists says whether a package has a test. One of a script is TestScripts/NAME.
func exists(t *testing.T, pkg, test string) bool {
	t.Helper()
	test, script, isScript := strings.Cut(test, "/")
	if isScript {
		if _, err := os.Stat(filepath.Join(pkg, "testdata", "script", script+".txtar")); err != nil {
			return false
		}
	}
	files, err := filepath.Glob(filepath.Join(pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(files, func(file string) bool {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(content), "\nfunc "+test+"(t *testing.T)")
	})
}
