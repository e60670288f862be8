package house

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

var engineNames = regexp.MustCompile(`(?i)criu|gvisor|runsc|\brunc\b`)

// What is asked of an engine is asked of any: the interface knows none.
func TestTheEngineInterfaceKnowsNoEngine(t *testing.T) {
	files, err := filepath.Glob("../engine/*.go")
	if err != nil || len(files) < 5 {
		t.Fatalf("%q, %v", files, err)
	}
	for _, name := range append(files, "../engine/enginetest/suite.go") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if found := engineNames.FindAllString(string(text), -1); len(found) > 0 {
			t.Errorf("%s speaks of %q", name, found)
		}
	}
}
