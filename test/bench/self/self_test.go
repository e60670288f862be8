package self

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "again" {
		_, err := io.Copy(io.Discard, os.Stdin)
		fmt.Printf("[%q, %t]\n", os.Args[2], err == nil)
		os.Exit(len(strings.TrimLeft(os.Args[2], "a")))
	}
	os.Exit(m.Run())
}

func TestAProcessTellsWhatCameOfItWhenItIsStopped(t *testing.T) {
	p, err := Start(t.Context(), "again", "aaa")
	if err != nil {
		t.Fatal(err)
	}
	var got []any
	if err := p.Stop(&got); err != nil || len(got) != 2 || got[0] != "aaa" || got[1] != true {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestAProcessThatFailsIsTold(t *testing.T) {
	p, err := Start(t.Context(), "again", "b")
	if err != nil {
		t.Fatal(err)
	}
	var got []any
	if err := p.Stop(&got); err == nil || !strings.Contains(err.Error(), "[again b]: exit status 1") {
		t.Errorf("got %v, %v", got, err)
	}
}
