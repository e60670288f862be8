package criu

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

func TestAddressesOfSocketsAreReadAsTheKernelPrintsThem(t *testing.T) {
	for text, want := range map[string]string{
		"0100007F:1F90":                         "127.0.0.1:8080",
		"FE01590A:A4EE":                         "10.89.1.254:42222",
		"00000000000000000000000001000000:0050": "[::1]:80",
		"B80D0120000000000000000001000000:01BB": "[2001:db8::1]:443",
		"0000000000000000FFFF00000100590A:0050": "10.89.0.1:80",
	} {
		if got, err := parseAddress(text); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v; want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0100007F", "0100007:1F90", "xx00007F:1F90", "0100007F:1F901"} {
		if got, err := parseAddress(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// An address that is not the loopback's is taken for an outside one unless the sandbox
// has it: the connection here is made to one of this machine's own.
func TestConnectionsToWhatIsNotInThePodAreFound(t *testing.T) {
	own := outward(t)
	listener, err := net.Listen("tcp", net.JoinHostPort(own, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	inside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	for _, l := range []net.Listener{listener, inside} {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	c := engine.Container{Name: "a", PID: os.Getpid()}
	outside, err := connectionsOut(c, []int{os.Getpid()}, []string{"10.255.255.1"})
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, o := range outside {
		found = found || o.Remote == listener.Addr().String() && o.Container == "a"
		if strings.HasPrefix(o.Remote, "127.") {
			t.Errorf("a connection within: %+v", o)
		}
	}
	if !found {
		t.Errorf("found %+v, not the one to %s", outside, listener.Addr())
	}
	if outside, err = connectionsOut(c, []int{os.Getpid()}, []string{own}); err != nil || len(outside) != 0 {
		t.Errorf("with the sandbox's own address: %+v, %v", outside, err)
	}
	if outside, err = connectionsOut(c, nil, nil); err != nil || len(outside) != 0 {
		t.Errorf("of no process: %+v, %v", outside, err)
	}
}

// outward is an address of this machine that is not the loopback's.
func outward(t *testing.T) string {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			return n.IP.String()
		}
	}
	t.Fatal("this machine has no address but the loopback's")
	return ""
}

func TestEveryProcessThatCannotBeCapturedIsToldOf(t *testing.T) {
	var pids []int
	for range 3 {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
		pids = append(pids, cmd.Process.Pid)
	}
	c := engine.Container{Name: "a"}
	if found, err := problemsOf(c, pids); err != nil || len(found) != 0 {
		t.Fatalf("of processes that can be captured: %q, %v", found, err)
	}
	for _, pid := range pids[:2] {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	found, err := problemsOf(c, pids)
	for deadline := time.Now().Add(5 * time.Second); err == nil && len(found) < 2 && time.Now().Before(deadline); found, err = problemsOf(c, pids) {
		time.Sleep(10 * time.Millisecond) // a signal takes its time
	}
	if err != nil || len(found) != 2 {
		t.Fatalf("%q, %v", found, err)
	}
	for i, problem := range found {
		if want := fmt.Sprintf("container a, process %d (sleep 60): it is stopped", pids[i]); !strings.HasPrefix(problem, want) {
			t.Errorf("%q, want %q", problem, want)
		}
	}
}
