package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type fixture struct {
	t      *testing.T
	dir    string
	client Client
	done   chan error
}

// start runs a supervisor that serves a socket. A supervisor collects every child of its
// process, so that there can be one only: each test runs in a process of its own. In the
// first process start returns nil when that has passed.
func start(t *testing.T) *fixture {
	t.Helper()
	const inside = "SUPERVISE_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.timeout=1m")
		cmd.Env = append(os.Environ(), inside+"=1")
		if output, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
		return nil
	}
	f := &fixture{t: t, dir: t.TempDir(), client: Client{fmt.Sprintf("@devcluster-test-%d", os.Getpid())}, done: make(chan error, 1)}
	s, err := New(filepath.Join(f.dir, "pids"), func() error { return nil }, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	go func() { f.done <- s.Serve(context.Background(), f.client.Socket) }()
	f.await("the socket", func() bool { _, err := f.client.Status(t.Context()); return err == nil })
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := f.client.Shutdown(ctx, time.Second); err != nil && !errors.Is(err, ErrNotRunning) {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-f.done; err != nil {
			t.Errorf("supervisor: %v", err)
		}
	})
	return f
}

func (f *fixture) await(what string, true func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !true(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("waiting for %s took too long", what)
		}
	}
}

func (f *fixture) run(name, script string) {
	f.t.Helper()
	c := Component{Name: name, Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin", "DIR=" + f.dir}, Log: filepath.Join(f.dir, name+".log")}
	if err := f.client.Start(f.t.Context(), c); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) status(name string) Status {
	f.t.Helper()
	all, err := f.client.Status(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	f.t.Fatalf("no component %s", name)
	return Status{}
}

func TestAKilledProgramIsStartedAgain(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "exec sleep 1000")
	old := f.status("a")
	if err := f.client.Kill(t.Context(), "a", false); err != nil {
		t.Fatal(err)
	}
	f.await("the next start", func() bool { s := f.status("a"); return s.State == Running && s.PID != old.PID })
	if s := f.status("a"); s.Restarts != 1 || s.LastExit != "ended by SIGKILL" {
		t.Errorf("%+v", s)
	}
}

func TestAProgramKilledToStayDownStaysDownUntilItIsStarted(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "exec sleep 1000")
	if err := f.client.Kill(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * firstDelay)
	if s := f.status("a"); s.State != Down || s.PID != 0 {
		t.Errorf("%+v", s)
	}
	if err := f.client.Kill(t.Context(), "a", false); err == nil {
		t.Error("killing what is down was no error")
	}
	if err := f.client.StartKnown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if s := f.status("a"); s.State != Running {
		t.Errorf("%+v", s)
	}
}

func TestAProgramThatKeepsFailingIsRetriedEverMoreSlowly(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "date +%s%N >> $DIR/starts; exit 3")
	f.await("four starts", func() bool { s := f.status("a"); return s.Restarts >= 3 && s.State == Waiting })
	s := f.status("a")
	if s.LastExit != "exit code 3" {
		t.Errorf("%+v", s)
	}
	text, err := os.ReadFile(filepath.Join(f.dir, "starts"))
	if err != nil {
		t.Fatal(err)
	}
	var at []time.Duration
	for _, line := range strings.Fields(string(text)) {
		var n int64
		if _, err := fmt.Sscan(line, &n); err != nil {
			t.Fatal(err)
		}
		at = append(at, time.Duration(n))
	}
	if first, third := at[1]-at[0], at[3]-at[2]; first < firstDelay || third < 3*firstDelay {
		t.Errorf("pauses of %s and %s between starts", first, third)
	}
}

func TestAStopGivesTimeAndThenKills(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("polite", "trap 'echo bye > $DIR/bye; exit 0' TERM; : > $DIR/polite; while :; do sleep 0.01; done")
	f.run("deaf", "trap '' TERM; : > $DIR/deaf; while :; do sleep 0.01; done")
	for _, name := range []string{"polite", "deaf"} {
		f.await(name, func() bool { _, err := os.Stat(filepath.Join(f.dir, name)); return err == nil })
	}
	if err := f.client.Stop(t.Context(), "polite", 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(f.dir, "bye")); err != nil {
		t.Error("the program got no time to end")
	}
	if err := f.client.Stop(t.Context(), "deaf", 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for name, exit := range map[string]string{"polite": "exit code 0", "deaf": "ended by SIGKILL"} {
		if s := f.status(name); s.State != Down || s.LastExit != exit {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestWhatAProgramHasStartedOutlivesIt(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "sleep 1000 & echo $! > $DIR/child.tmp; mv $DIR/child.tmp $DIR/child; wait")
	child := filepath.Join(f.dir, "child")
	f.await("the child", func() bool { _, err := os.Stat(child); return err == nil })
	var pid int
	text, err := os.ReadFile(child)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		t.Fatal(err)
	}
	if err := f.client.Kill(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	if _, err := startTime(pid); err != nil {
		t.Errorf("the child ended with its parent: %v", err)
	}
	// It is the supervisor's child now and is reaped when it ends.
	process, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	f.await("the child's end", func() bool { _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); return errors.Is(err, os.ErrNotExist) })
}

func TestASuccessorEndsWhatAKilledSupervisorLeftRunning(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "exec sleep 1000")
	left := f.status("a").PID
	start, err := startTime(left)
	if err != nil {
		t.Fatal(err)
	}
	// The same process under the name of another component stands for a predecessor's.
	pids := filepath.Join(f.dir, "pids")
	if err := os.WriteFile(filepath.Join(pids, "b"), []byte(fmt.Sprintf("%d %s\n", left, start)), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pids, "c"), []byte(fmt.Sprintf("%d %s\n", os.Getpid(), "1")), 0o644); err != nil {
		t.Fatal(err)
	}
	f.run("b", "exec sleep 1000")
	f.await("the predecessor's end", func() bool { return f.status("a").PID != left })
	f.run("c", "exec sleep 1000") // would kill this test if the start time were not compared
}

func TestAnUnknownComponentIsAnErrorThatNamesTheKnown(t *testing.T) {
	f := start(t)
	if f == nil {
		return
	}
	f.run("a", "exec sleep 1000")
	err := f.client.Kill(t.Context(), "b", false)
	if err == nil || !strings.Contains(err.Error(), `"b"`) || !strings.Contains(err.Error(), "a") {
		t.Errorf("error %v", err)
	}
	if err := f.client.Start(t.Context(), Component{Name: "missing", Args: []string{"/no/such/program"}, Log: filepath.Join(f.dir, "x.log")}); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("error %v", err)
	}
}

func TestWithoutASupervisorTheErrorSaysSo(t *testing.T) {
	if _, err := (Client{"@devcluster-test-nobody"}).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("error %v", err)
	}
}
