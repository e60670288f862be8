package criu

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
)

func TestVersionsAreReadFromWhatCRIUPrints(t *testing.T) {
	for out, want := range map[string]string{
		"Version: 4.2.1\nGitID: v4.2\n": "4.2.1",
		"Version: 3.17\n":               "3.17",
		"":                              "",
		"Version: unknown\n":            "",
	} {
		got, _, err := parseVersion(out)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v", out, got, err)
		}
	}
}

func TestWhatACaptureThatWasKilledLeftIsRemovedAtTheStart(t *testing.T) {
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	run := t.TempDir()
	e := New(Config{Host: host, RunDir: run, Log: slog.New(slog.DiscardHandler)})
	left := filepath.Join(run, "work", "sandbox")
	if err := os.MkdirAll(filepath.Join(left, "main"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := e.ThawLeftovers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
}

func TestAProcessWithAMultipathTCPSocketIsRefusedBeforeTheFreeze(t *testing.T) {
	plain, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(plain)
	if problem, err := problemOf("/proc/self"); err != nil || problem != "" {
		t.Fatalf("with an ordinary socket: %q, %v", problem, err)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err != nil {
			t.Fatalf("this kernel has no multipath TCP: %v", err)
		}
		problem, err := problemOf("/proc/self")
		unix.Close(fd)
		if err != nil || !strings.Contains(problem, "multipath TCP socket (file descriptor "+strconv.Itoa(fd)+")") {
			t.Errorf("family %d: %q, %v", family, problem, err)
		}
	}
}

func TestUnknownOptionsAreRefused(t *testing.T) {
	e := &Engine{}
	if err := engine.CheckOptions(e, nil); err != nil {
		t.Error(err)
	}
	if err := engine.CheckOptions(e, map[string]string{"x": "y"}); !errors.Is(err, engine.ErrOption) {
		t.Errorf("got %v", err)
	}
}

func TestTheCgroupOfAProcessIsFoundInEitherHierarchy(t *testing.T) {
	v1 := "6:freezer:/kubepods/pod1/c1\n3:cpu,cpuacct:/kubepods/cpu\n0::/unified\n"
	v2 := "0::/kubepods.slice/c1\n"
	for _, c := range []struct {
		file, controller, path string
		unified                bool
	}{
		{v1, "freezer", "/kubepods/pod1/c1", false},
		{v1, "cpu", "/kubepods/cpu", false},
		{v2, "freezer", "/kubepods.slice/c1", true},
	} {
		path, unified, err := parseCgroup(strings.NewReader(c.file), c.controller)
		if err != nil || path != c.path || unified != c.unified {
			t.Errorf("%s: got %q, %v, %v", c.controller, path, unified, err)
		}
	}
	if _, _, err := parseCgroup(strings.NewReader("1:name=systemd:/\n"), "cpu"); err == nil {
		t.Error("a process without the controller: no error")
	}
}

func TestAQuotaIsLiftedAndPutBackAndACgroupThatIsGoneNeedsNeither(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cpu.cfs_quota_us")
	if err := os.WriteFile(file, []byte("5000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	q := liftedQuota{File: file, Old: "5000"}
	if err := q.lift(); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(file); !strings.HasPrefix(string(data), "-1") {
		t.Errorf("lifted to %q", data)
	}
	if err := q.putBack(); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(file); string(data) != "5000" {
		t.Errorf("put back to %q", data)
	}
}

func TestVolumesThatTheKubeletWritesAreKnownByTheirDirectories(t *testing.T) {
	config := filepath.Join(t.TempDir(), "kubernetes.io~configmap/scripts")
	if err := os.MkdirAll(config, 0o755); err != nil {
		t.Fatal(err)
	}
	const directory = "..2026_11_26_22_21_54.4244946247"
	if err := os.Symlink(directory, filepath.Join(config, "..data")); err != nil {
		t.Fatal(err)
	}
	found, err := publishedTo(engine.Container{Spec: &specs.Spec{Mounts: []specs.Mount{
		{Type: "bind", Source: "/data", Destination: "/data"}, {Type: "bind", Source: config, Destination: "/scripts"},
	}}})
	if err != nil || len(found) != 1 || found[0] != (checkpoint.Published{Destination: "/scripts", Directory: directory}) {
		t.Errorf("found %+v, %v", found, err)
	}
}

func TestOnlyErrorsThatMeanSomethingAreQuotedFromCRIUsLog(t *testing.T) {
	log := filepath.Join(t.TempDir(), "dump.log")
	text := "(00.1) ok\n(00.2) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: no\n" +
		"(00.3) Error (criu/sk-inet.c:1): Connected TCP socket\n(00.4) Error (criu/cr-dump.c:1): Dumping FAILED.\n"
	if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := lastErrors(log); got != "Error (criu/sk-inet.c:1): Connected TCP socket" {
		t.Errorf("got %q", got)
	}
	if got := lastErrors(log + "-nosuch"); got != "" {
		t.Errorf("of a log that is not there: %q", got)
	}
}

func TestProcessesOfACaptureAreFoundByTheirMark(t *testing.T) {
	if pids, err := capturing("no-such-sandbox"); err != nil || len(pids) != 0 {
		t.Errorf("got %v, %v", pids, err)
	}
	if err := endCapture(context.Background(), "no-such-sandbox"); err != nil {
		t.Error(err)
	}
}
