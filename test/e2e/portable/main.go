// Command portable runs the end-to-end tests that are not CRIU's alone with Pods of gVisor,
// and says which those are and why.
//
//	make gvisor                                   all of them
//	make test-gvisor                              the quick ones; part of make test
//	make gvisor UPDATE=docs/compatibility.md      writes there what passed
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"podstasis.dev/stasis/test/document"
	"podstasis.dev/stasis/test/gotest"
)

const updateCommand = "make gvisor UPDATE=docs/compatibility.md"

func main() {
	quick := flag.Bool("quick", false, "only those that are run whenever all tests are")
	update := flag.String("update", "", "`file` to write into what passed, between its marks")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *quick, *update); err != nil {
		fmt.Fprintln(os.Stderr, "portable:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, quick bool, update string) error {
	if quick && update != "" {
		return errors.New("what the quick tests show is not written into documents")
	}
	wanted, left := chosen(tests, quick)
	var passed []string
	over := func(t gotest.Test) {
		if told(t, os.Stdout) {
			passed = append(passed, t.Name)
		}
	}
	err := gotest.Run(ctx, []string{"STASIS_E2E_ENGINE=gvisor"}, over, func(line string) { fmt.Println(line) },
		"-timeout=50m", "-run="+pattern(wanted), "-skip="+pattern(left), "./test/e2e")
	if ctx.Err() != nil {
		return context.Cause(ctx)
	} else if err == nil && len(passed) != len(wanted) {
		return fmt.Errorf("%d tests passed of %d that are not CRIU's alone", len(passed), len(wanted))
	} else if err != nil {
		return fmt.Errorf("%d tests passed of %d that are not CRIU's alone: %w", len(passed), len(wanted), err)
	}
	fmt.Printf("portable: with gVisor %d tests pass of %d\n", len(passed), len(wanted))
	if update == "" {
		return nil
	}
	return document.Update(update, updateCommand, markdown(len(passed), time.Now()))
}

// chosen are the names of the tests to run, and of those parts of them that are left out.
func chosen(all []test, quick bool) (wanted, left []string) {
	for _, t := range all {
		switch part := strings.Contains(t.name, "/"); {
		case part:
			left = append(left, t.name)
		case t.only == "" && (t.quick || !quick):
			wanted = append(wanted, t.name)
		}
	}
	return wanted, left
}

// pattern is a regular expression of go test that matches these names and no others; what
// a name has after a slash is matched on its own.
func pattern(names []string) string {
	var whole []string
	for _, name := range names {
		var parts []string
		for part := range strings.SplitSeq(name, "/") {
			parts = append(parts, "^"+regexp.QuoteMeta(part)+"$")
		}
		whole = append(whole, strings.Join(parts, "/"))
	}
	return strings.Join(whole, "|")
}

// told tells a person of a test, and says whether it passed.
func told(t gotest.Test, out io.Writer) (passed bool) {
	switch t.Action {
	case "pass":
		fmt.Fprintln(out, "portable: passes:", t.Name)
	case "fail":
		fmt.Fprintln(out, "portable: FAILS:", t.Name+"\n"+strings.Join(t.Output, ""))
	}
	return t.Action == "pass"
}

// markdown is what documents say.
func markdown(passed int, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Of %s: %d of %d end-to-end tests that are not CRIU's alone pass with Pods of gVisor.\n\n", now.Format(time.DateOnly), passed, passed)
	b.WriteString(reasons())
	return b.String()
}

// reasons is the table of what is CRIU's alone.
func reasons() string {
	var b strings.Builder
	b.WriteString("| CRIU's alone | why |\n| --- | --- |\n")
	for _, t := range tests {
		if t.only != "" {
			fmt.Fprintf(&b, "| `%s` | %s |\n", t.name, t.only)
		}
	}
	return b.String()
}
