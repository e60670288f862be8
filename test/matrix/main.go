// Command matrix runs the main job and five end-to-end tests on each of the sets of
// versions that people run, and prints what passed as a table.
//
//	make matrix
//	make matrix ROWS='containerd v1.7'                    rows whose title matches
//	make matrix UPDATE=docs/compatibility.md              writes the table there; with ROWS those rows of it
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"podstasis.dev/stasis/test/document"
	"podstasis.dev/stasis/test/gotest"
)

func main() {
	only := flag.String("rows", "", "`regexp` of the titles of rows to run")
	update := flag.String("update", "", "`file` to write the table into, between its markers")
	out := flag.String("o", "dist/matrix.md", "`file` to write the table to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *only, *update, *out); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, update, out string) error {
	wanted, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	pinned, err := pinnedVersions(ctx)
	if err != nil {
		return err
	}
	var results []result
	for _, r := range rows {
		title := r.title(pinned)
		if !wanted.MatchString(title) {
			continue
		}
		fmt.Println("matrix:", title)
		results = append(results, r.run(ctx, pinned))
		last := results[len(results)-1]
		fmt.Printf("matrix: %s: %s (%s)\n", title, last.verdict(), last.took.Round(time.Second))
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	older := ""
	if update != "" && only != "" { // the others stay as they were found
		if older, err = document.Written(update, command); err != nil {
			return err
		}
	}
	table := markdown(results, older, time.Now())
	if err := os.WriteFile(out, []byte(table), 0o644); err != nil {
		return err
	}
	fmt.Print(table)
	if update == "" {
		return nil
	}
	return document.Update(update, command, table)
}

// command is what the document says it was written by.
const command = "make matrix UPDATE=docs/compatibility.md"

// pinnedVersions asks the development cluster for what it builds by itself.
func pinnedVersions(ctx context.Context) (row, error) {
	text, err := exec.CommandContext(ctx, "bin/devcluster", "versions", "-o", "json").Output()
	if err != nil {
		return row{}, fmt.Errorf("bin/devcluster versions: %w", err)
	}
	var pinned row
	if err := json.Unmarshal(text, &pinned); err != nil {
		return row{}, fmt.Errorf("bin/devcluster versions: %w", err)
	}
	pinned.CRIU = defaultCRIU
	return pinned, nil
}

// defaultCRIU is the Debian release that hack/criu.sh takes CRIU from by itself.
const defaultCRIU = "forky"

func (r row) or(p row) row {
	return row{cmp.Or(r.Kubernetes, p.Kubernetes), cmp.Or(r.Containerd, p.Containerd), cmp.Or(r.Runc, p.Runc), r.Crun, cmp.Or(r.CRIU, p.CRIU), r.Podman, r.Emulated}
}

func (r row) title(pinned row) string {
	r = r.or(pinned)
	if r.Podman {
		return "Podman, " + r.runtime()
	}
	if r.Emulated {
		return fmt.Sprintf("cgroup v2, systemd (emulated), containerd %s, %s, CRIU of %s", r.Containerd, r.runtime(), r.CRIU)
	}
	return fmt.Sprintf("Kubernetes %s, containerd %s, %s, CRIU of %s", r.Kubernetes, r.Containerd, r.runtime(), r.CRIU)
}

// runtime names the OCI runtime.
func (r row) runtime() string {
	if r.Crun {
		return "crun of " + defaultCRIU + ", runc " + plain(r.Runc)
	}
	return "runc " + plain(r.Runc)
}

// tests names a row's.
func (r row) tests() []string {
	switch {
	case r.Podman:
		return podmanTests
	case r.Emulated:
		return emulatedTests
	}
	return tests
}

// command runs them, and prints what go test -json does.
func (r row) command(ctx context.Context, versions []string) *exec.Cmd {
	which := "^(" + strings.Join(r.tests(), "|") + ")$"
	if r.Emulated { // by a program that was built before: no go tells of it there
		cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "test/matrix/emulated.sh", which)
		// The script ends its machine. An interrupt it might have been started to ignore.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
		cmd.WaitDelay = time.Minute
		return cmd
	}
	pkg := "./test/e2e"
	if r.Podman {
		pkg = "./test/podman"
	}
	return gotest.Command(ctx, []string{"STASIS_E2E_CLUSTER=" + strings.Join(versions, " ")}, "-timeout=20m", "-run="+which, pkg)
}

// result is how a row did.
type result struct {
	row    // with all versions
	criu   string
	podman string
	passed int
	failed []failure
	err    error // nothing could be tested
	took   time.Duration
}

// failure is a test that failed and its first words.
type failure struct{ test, why string }

func (r *result) verdict() string {
	tests := r.tests()
	switch {
	case r.err != nil && (r.Podman || r.Emulated):
		return "not run: " + firstLine(r.err.Error())
	case r.err != nil:
		return "no cluster: " + firstLine(lastError(r.err.Error()))
	case len(r.failed) == 0:
		return fmt.Sprintf("passes (%d of %d)", r.passed, len(tests))
	}
	// One cause makes many fail; which others did is in the log.
	return fmt.Sprintf("%d of %d pass; %s: %s", r.passed, len(tests), r.failed[0].test, r.failed[0].why)
}

// run brings up a cluster of the row's versions and runs the tests in it.
func (r row) run(ctx context.Context, pinned row) (done result) {
	began := time.Now()
	done.row = r.or(pinned)
	defer func() { done.took = time.Since(began) }()
	if r.CRIU != "" {
		if done.err = images(ctx, r.CRIU); done.err != nil {
			return done
		}
		defer func() { done.err = errors.Join(done.err, images(context.WithoutCancel(ctx), defaultCRIU)) }()
	}
	version, err := os.ReadFile("dist/criu/VERSION")
	if err != nil {
		done.err = err
		return done
	}
	done.criu = strings.TrimSpace(string(version))
	v := done.row
	versions := []string{"--kubernetes=" + v.Kubernetes, "--containerd=" + v.Containerd, "--runc=" + v.Runc}
	if v.Crun {
		versions = append(versions, "--crun-first")
	}
	if out, err := exec.CommandContext(ctx, "bin/devcluster", append([]string{"build"}, versions...)...).CombinedOutput(); err != nil {
		done.err = fmt.Errorf("%s", cmp.Or(lastLines(strings.Split(string(out), "\n")), err.Error()))
		return done
	}
	if r.Podman {
		said, err := exec.CommandContext(ctx, "podman", "--version").Output()
		if err != nil {
			done.err = fmt.Errorf("podman: %w (apt-get install --no-install-recommends podman)", err)
			return done
		}
		done.podman = strings.TrimSpace(strings.TrimPrefix(string(said), "podman version"))
	}
	var said []string
	err = gotest.RunCommand(r.command(ctx, versions), func(t gotest.Test) {
		said = append(said, saysMachine(t)...)
		done.count(t)
	}, func(line string) { said = append(said, line) })
	if err != nil && len(done.failed) == 0 || done.passed+len(done.failed) != len(r.tests()) {
		done.err = errors.New(cmp.Or(ended(said), lastLines(said), fmt.Sprint(err)))
	}
	return done
}

// images makes the agent's image with the CRIU of a Debian release.
func images(ctx context.Context, suite string) error {
	cmd := exec.CommandContext(ctx, "make", "-B", "dist/criu/VERSION")
	cmd.Env = append(os.Environ(), "STASIS_CRIU_SUITE="+suite)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("CRIU of %s: %w\n%s", suite, err, out)
	}
	if out, err := exec.CommandContext(ctx, "make", "images").CombinedOutput(); err != nil {
		return fmt.Errorf("make images: %w\n%s", err, out)
	}
	return nil
}

// count takes in what came of a test.
func (r *result) count(t gotest.Test) {
	if t.Action == "pass" {
		r.passed++
		return
	}
	f := failure{t.Name, why(t.Output)}
	fmt.Printf("matrix: %s: %s\n", f.test, f.why)
	r.failed = append(r.failed, f)
}

// position is how a test's message begins.
var position = regexp.MustCompile(`^\s*\w+\.go:\d+: `)

// why is the first message of a test that failed.
func why(output []string) string {
	i := slices.IndexFunc(output, position.MatchString)
	if i < 0 {
		return "no message"
	}
	return firstLine(position.ReplaceAllString(output[i], ""))
}

// checkout is where this is run: no path of it is told.
var checkout, _ = os.Getwd()

// lastError is the last line of a text that tells of an error; the whole text, if none does.
func lastError(s string) string {
	for _, line := range slices.Backward(strings.Split(s, "\n")) {
		if strings.Contains(line, "rror: ") || strings.Contains(line, "err=") {
			return line
		}
	}
	return s
}

func firstLine(s string) string {
	if checkout != "" {
		s = strings.ReplaceAll(s, checkout+"/", "")
	}
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// machineSays begins what hack/emulated.sh says of its machine, also in the middle of a test.
const machineSays = "emulated: "

// saysMachine is that of a test which was not over when it ended.
func saysMachine(t gotest.Test) (said []string) {
	for _, line := range t.Output {
		if strings.HasPrefix(line, machineSays) {
			said = append(said, strings.TrimRight(line, "\n"))
		}
	}
	return said
}

// ended is what the tests' program, or the machine that it is in, says of why it could not begin
// or go on.
func ended(lines []string) string {
	for _, l := range slices.Backward(lines) {
		for _, who := range []string{"e2e: ", machineSays} {
			if why, ok := strings.CutPrefix(l, who); ok {
				return why
			}
		}
	}
	return ""
}

func lastLines(lines []string) string {
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.TrimSpace(l) == "" })
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}
