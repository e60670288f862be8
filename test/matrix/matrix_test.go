package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/test/gotest"
)

func TestARowTellsWhichTestsFailedAndTheirFirstWords(t *testing.T) {
	var r result
	for _, t := range []gotest.Test{
		{Name: "TestA", Action: "fail", Output: []string{"=== RUN TestA\n", "    a_test.go:7: it was | refused in " + checkout + "/bin\n", "    a_test.go:9: and more\n"}},
		{Name: "TestB", Action: "pass"}, {Name: "TestC", Action: "skip"},
	} {
		r.count(t)
	}
	if r.passed != 1 || len(r.failed) != 2 || r.failed[0] != (failure{"TestA", "it was | refused in bin"}) || r.failed[1].test != "TestC" {
		t.Errorf("read %+v", r)
	}
	if got := ended([]string{"e2e: the agent: not there", "kubelet: more"}); got != "the agent: not there" {
		t.Errorf("it ended with %q", got)
	}
	r.row = row{"v1.37.0", "v2.4.2", "v1.5.2", false, "forky", false, false}
	table := markdown([]result{r}, "", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC))
	if !strings.Contains(table, `| 1.37.0 | 2.4.2 | runc 1.5.2 |  | 2026-01-02 | 1 of 6 pass; TestA: it was \| refused in bin |`) {
		t.Errorf("the table:\n%s", table)
	}
}

func TestTheRowOfPodmanTellsOfItsOwnTests(t *testing.T) {
	r := result{row: row{Runc: "v1.5.2", Podman: true}, podman: "4.3.1", passed: 2}
	table := markdown([]result{r}, "", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC))
	if !strings.Contains(table, `| none | none; Podman 4.3.1, conmon | runc 1.5.2 | none | 2026-01-02 | passes (2 of 2) |`) {
		t.Errorf("the table:\n%s", table)
	}
}

func TestTheRowOfSystemdTellsOfItsOwnTests(t *testing.T) {
	r := result{row: row{Containerd: "v2.4.2", Runc: "v1.5.2", Emulated: true}, criu: "4.2.1", passed: len(emulatedTests)}
	table := markdown([]result{r}, "", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC))
	if want := fmt.Sprintf("| none | 2.4.2; cgroup v2 by systemd (Debian trixie, emulated) | runc 1.5.2 | 4.2.1 | 2026-01-02 | passes (%d of %[1]d) |", len(emulatedTests)); !strings.Contains(table, want) {
		t.Errorf("the table:\n%s", table)
	}
}

func TestRowsThatWereNotRunStayInTheTable(t *testing.T) {
	one := result{row: row{Kubernetes: "v1.37.0", Containerd: "v2.4.2", Runc: "v1.5.2"}, criu: "4.2.1", passed: 6}
	two, three := one, one
	two.Containerd, three.Containerd = "v2.3.7", "v2.2.9"
	older := markdown([]result{one, two}, "", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC))
	two.passed, two.failed = 5, []failure{{"TestA", "it | was refused"}}
	got := markdown([]result{two, three}, older, time.Date(2026, 1, 3, 0, 0, 0, 0, time.UTC))
	want := heading + `| 1.37.0 | 2.4.2 | runc 1.5.2 | 4.2.1 | 2026-01-02 | passes (6 of 6) |
| 1.37.0 | 2.3.7 | runc 1.5.2 | 4.2.1 | 2026-01-03 | 5 of 6 pass; TestA: it \| was refused |
| 1.37.0 | 2.2.9 | runc 1.5.2 | 4.2.1 | 2026-01-03 | passes (6 of 6) |
`
	if got != want {
		t.Errorf("the table:\n%s", got)
	}
	if again := markdown([]result{one}, got, time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)); again != want {
		t.Errorf("written once more:\n%s", again)
	}
}

func TestAMachineThatEndsInTheMiddleOfATestIsWhyItsRowHasNotRun(t *testing.T) {
	said := saysMachine(gotest.Test{Name: "TestA", Action: "fail", Output: []string{"=== RUN TestA\n", "emulated: it had not ended after 60 s\n"}})
	if got := ended(said); got != "it had not ended after 60 s" {
		t.Errorf("it ended with %q", got)
	}
}

func TestARowIsOfThePinnedVersionsUnlessItNamesOthers(t *testing.T) {
	pinned := row{"k", "c", "r", false, "u", false, false}
	if got := (row{Containerd: "x"}).title(pinned); got != "Kubernetes k, containerd x, runc r, CRIU of u" {
		t.Errorf("title %q", got)
	}
}

func TestAClusterThatDoesNotComeUpIsToldByItsLastError(t *testing.T) {
	r := &result{err: errors.New("bin/devcluster up: exit status 1:   0.2s  programs are built\nkubelet of node-1 has ended:\n    E1127 \"command failed\" err=\"no such gate\"\nwhat to try: see the log")}
	if got := r.verdict(); !strings.Contains(got, "no such gate") || strings.Contains(got, "programs are built") {
		t.Error(got)
	}
}
