package criu

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"podstasis.dev/stasis/internal/engine"
)

// Here a container is a process: this one, and a shell that holds what it is given.
func TestUnixSocketsThatLeadOutOfTheirContainerAreFoundBeforeTheFreeze(t *testing.T) {
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	one, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	me := engine.Container{Name: "me", PID: os.Getpid()}
	look := func(containers ...engine.Container) error {
		var pids [][]int
		for _, c := range containers {
			pids = append(pids, []int{c.PID})
		}
		return inspectUnix(containers, pids)
	}
	if err := look(me); err != nil {
		t.Errorf("one that nobody has accepted yet: %v", err)
	}
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := look(me); err != nil {
		t.Errorf("both ends in one container: %v", err)
	}
	file, err := other.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	shell := exec.Command("sleep", "60")
	shell.ExtraFiles = []*os.File{file}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { shell.Process.Kill(); shell.Wait() }()
	file.Close()
	if err := look(me); !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("the other end outside of what is captured: %v", err)
	}
	if err := look(me, engine.Container{Name: "other", PID: shell.Process.Pid}); !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("the other end in another container: %v", err)
	} else {
		t.Log(err)
	}
}
