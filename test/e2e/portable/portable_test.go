package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"podstasis.dev/stasis/test/gotest"
)

// e2e are the names of all end-to-end tests.
func e2e(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("../*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Test") && f.Name.Name != "TestMain" {
				names = append(names, f.Name.Name)
			}
		}
	}
	if len(names) < 60 {
		t.Fatalf("only %d tests were found", len(names))
	}
	return names
}

func TestOfEveryEndToEndTestIsSaidWhetherItIsCRIUsAlone(t *testing.T) {
	all := e2e(t)
	said := map[string]int{}
	for i, entry := range tests {
		said[entry.name]++
		top, _, part := strings.Cut(entry.name, "/")
		switch {
		case !slices.Contains(all, top):
			t.Errorf("there is no test %s", top)
		case part && (entry.only == "" || !slices.ContainsFunc(tests[:i], func(e test) bool { return e.name == top && e.only == "" })):
			t.Errorf("%s is a part of no test that is run with other engines, or has no reason to be left out", entry.name)
		case entry.quick && entry.only != "":
			t.Errorf("%s is CRIU's alone and quick with gVisor", entry.name)
		case said[entry.name] > 1:
			t.Errorf("%s is there twice", entry.name)
		}
	}
	for _, name := range all {
		if said[name] == 0 {
			t.Errorf("of %s nothing is said: are its Pods to be of CRIU alone, and why?", name)
		}
	}
}

func TestTheDocumentHasTheTable(t *testing.T) {
	text, err := os.ReadFile("../../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), reasons()) {
		t.Errorf("docs/compatibility.md says another thing of what is CRIU's alone: %s", updateCommand)
	}
}

func TestWhatIsRunIsWhatIsChosen(t *testing.T) {
	some := []test{{name: "TestA"}, {name: "TestB", only: "x"}, {name: "TestC", quick: true}, {name: "TestC/one_(of_two)", only: "x"}}
	wanted, left := chosen(some, false)
	if got := pattern(wanted); got != "^TestA$|^TestC$" {
		t.Errorf("%s", got)
	}
	if got := pattern(left); got != `^TestC$/^one_\(of_two\)$` {
		t.Errorf("%s", got)
	}
	if wanted, _ := chosen(some, true); !slices.Equal(wanted, []string{"TestC"}) {
		t.Errorf("%q", wanted)
	}
}

func TestATestThatFailsIsToldWithWhatItPrinted(t *testing.T) {
	for action, want := range map[string]string{"pass": "portable: passes: TestA\n", "fail": "portable: FAILS: TestA\nwhy A\n\n", "skip": ""} {
		var out strings.Builder
		if passed := told(gotest.Test{Name: "TestA", Action: action, Output: []string{"why A\n"}}, &out); passed != (action == "pass") || out.String() != want {
			t.Errorf("%s: passed %v, %q", action, passed, out.String())
		}
	}
}
