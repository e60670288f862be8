package app

import (
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// started compiles the ballast and starts it, with a root directory of its own; it returns
// when it answers, at the address.
func started(t *testing.T, args ...string) (p Process, address string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("a root directory of its own takes root")
	}
	root := t.TempDir()
	program := filepath.Join(root, "ballast")
	if out, err := exec.Command("cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-static", "-pthread", "-o", program, "../ballast/ballast.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	port := freePort(t)
	address = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	cmd := &exec.Cmd{
		Path: "/ballast", Args: append([]string{"ballast"}, args...), Env: []string{"PORT=" + strconv.Itoa(port)}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Chroot: root},
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // killed
	})
	p = Process{cmd.Process.Pid}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if ready, err := p.Ready(); err != nil {
			t.Fatal(err)
		} else if ready {
			return p, address
		}
		if time.Now().After(end) {
			t.Fatal("it is not ready within a minute")
		}
	}
}

// freePort is a TCP port that nobody listens on and that the kernel gives to nobody who
// does not ask for it: from 32768 on it is given to other tests' connections at any time.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 20000 + rand.IntN(10000)
		if l, err := net.Listen("tcp4", net.JoinHostPort("", strconv.Itoa(port))); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// stopped waits until all threads of a process that was sent SIGSTOP have stopped.
func stopped(t *testing.T, p Process) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(p.path("task/*/status"))
		if err != nil {
			t.Fatal(err)
		}
		left := slices.DeleteFunc(threads, func(name string) bool {
			data, err := os.ReadFile(name)
			return err == nil && strings.Contains(string(data), "\nState:\tT")
		})
		if len(threads) > 0 && len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%q do not stop", left)
		}
	}
}

func TestABallastNoticesHowLongItStoodStill(t *testing.T) {
	p, _ := started(t, "8")
	if resident, err := p.Resident(); err != nil || resident < 8<<20 {
		t.Errorf("8 MiB are %d bytes, %v", resident, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Flush(ctx); err != nil { // it looks at the clocks
		t.Fatal(err)
	}
	const stood = 300 * time.Millisecond
	before := time.Now()
	if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped(t, p)
	time.Sleep(stood)
	within := time.Now()
	if err := syscall.Kill(p.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := p.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	gap, found, err := p.Over(within.Add(-stood / 2))
	if err != nil || !found {
		t.Fatalf("it stood still and did not write it down: %v", err)
	}
	longest, err := p.Longest(before, within)
	if err != nil {
		t.Fatal(err)
	}
	nearest, err := p.Nearest(stood, before, within)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Nearest(stood, before.Add(-time.Hour), before.Add(-time.Hour)); err == nil {
		t.Error("it says that it stood still an hour ago")
	}
	if nearest.Length < stood || nearest.To.Before(within) {
		t.Errorf("the nearest of its gaps to %s is %+v", stood, nearest)
	}
	if gap.Length < stood || longest != gap && longest.Length < gap.Length || gap.To.Before(within) || gap.From.After(within.Add(-stood/2)) {
		t.Errorf("stopped from %s to %s, it says %+v; the longest of its gaps is %+v", before, within, gap, longest)
	}
}

func TestABallastAnswersAndTellsHowMuchItHasWorked(t *testing.T) {
	_, address := started(t, "8", "work")
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(message string) []byte {
		t.Helper()
		answer := make([]byte, 8)
		if _, err := io.WriteString(conn, message); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, answer); err != nil {
			t.Fatal(err)
		}
		return answer
	}
	if got := string(ask("touch...")); got != "touch..." {
		t.Errorf("it answers %q", got)
	}
	first := binary.LittleEndian.Uint64(ask("work...."))
	for end := time.Now().Add(20 * time.Second); binary.LittleEndian.Uint64(ask("work....")) <= first; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it stays at %d pages", first)
		}
	}
}
