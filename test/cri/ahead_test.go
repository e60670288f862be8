package cri_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/engine/criu/mappings"
)

// spiedOn puts scripts in place of programs of the node that write down that they were
// started, and by which capture.
func (n *node) spiedOn(t *testing.T, programs ...string) (started func() string) {
	t.Helper()
	list := filepath.Join(n.directory(t), "started")
	must(t, n.host.Do(func() error {
		for _, program := range programs {
			spy := "/opt/stasis/bin/" + program // CRIU looks here first
			script := fmt.Sprintf("#!/bin/sh\necho %s $STASIS_CAPTURE >>%s\nexec /usr/bin/%s \"$@\"\n", program, list, program)
			if err := os.WriteFile(spy, []byte(script), 0o755); err != nil {
				return err
			}
			t.Cleanup(func() { n.host.Do(func() error { return os.Remove(spy) }) })
		}
		return nil
	}))
	return func() string {
		data, err := os.ReadFile(n.host.Path(list))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(data)
	}
}

func TestNoProgramIsStartedWhileAPodStandsStill(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), container("b", counting))
	p.numbers(t, "a", 5)
	p.exec(t, "a", "ln -s /nowhere /dev/link; mkdir -p /dev/deep/er; echo kept >/dev/deep/er/file; mknod /dev/mine c 1 5 || true")
	started := theNode.spiedOn(t, "tar", "gzip")
	dir, m := p.checkpointWith(t, map[string]string{"capture": "cow"}) // its images are written where they stay
	if list := started(); list != "" {
		t.Errorf("the capture of %s started\n%s", p.sandbox, list)
	}
	for _, name := range []string{"a", "b"} {
		// The last that runc writes before it starts CRIU.
		info, err := os.Stat(theNode.host.Path(filepath.Join(dir, "containers", name, "criu", "descriptors.json")))
		must(t, err)
		if !info.ModTime().Before(m.CutTime) {
			t.Errorf("container %s: CRIU was started %v after the freeze", name, info.ModTime().Sub(m.CutTime))
		}
	}
	restored := theNode.restore(t, dir, p.configs...)
	restored.goesOn(t, "b")
	const look = "cat /dev/deep/er/file; readlink /dev/link; ls -l /dev | grep -Ev 'shm|pts|mqueue'" // but for what is mounted there
	if got, want := restored.exec(t, "a", look), p.exec(t, "a", look); got != want || !strings.HasPrefix(got, "kept\n/nowhere\n") {
		t.Errorf("restored it has\n%s\nand the source\n%s", got, want)
	}
}

// opened says afterwards which files below a directory of the node, that were opened by
// others than the agent, have a name that begins so; of each the rest of its name.
func (n *node) opened(t *testing.T, dir, prefix string) (rests func() []string) {
	t.Helper()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, n.host.Path(dir)))
	agent, err := n.agentPID()
	must(t, err)
	return func() (rests []string) {
		buffer := make([]byte, 64<<10)
		for {
			got, err := unix.Read(fd, buffer)
			if errors.Is(err, unix.EAGAIN) {
				return rests
			}
			must(t, err)
			for events := bytes.NewReader(buffer[:got]); events.Len() > 0; {
				var event unix.FanotifyEventMetadata
				must(t, binary.Read(events, binary.NativeEndian, &event))
				name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", event.Fd))
				must(t, errors.Join(err, unix.Close(int(event.Fd))))
				name = filepath.Base(strings.TrimSuffix(name, " (deleted)"))
				if rest, ok := strings.CutPrefix(name, prefix); ok && int(event.Pid) != agent {
					rests = append(rests, rest)
				}
			}
		}
	}
}

// Else the kernel walks through their page tables while the Pod stands still.
func TestCRIUIsGivenTheMappingsOfTheProcessesThatItCaptures(t *testing.T) {
	kernel, err := mappings.Open()
	if err != nil {
		if _, known := os.Stat("/sys/kernel/btf/vmlinux"); known == nil {
			t.Fatalf("this kernel tells of its types, and cannot be asked for mappings: %v", err)
		}
		t.Skipf("of this kernel CRIU asks for mappings itself: %v", err)
	}
	must(t, kernel.Close())
	p := theNode.run(t, "", container("a", counting), container("b", "sleep 1000000 & "+counting))
	p.numbers(t, "a", 5)
	p.numbers(t, "b", 5)
	for _, mode := range []string{"plain", "cow"} {
		before := p.processes(t)
		opened := theNode.opened(t, "/run/stasis", "smaps-")
		p.checkpointWith(t, map[string]string{"capture": mode})
		given := opened()
		stayed := 0
		for _, pid := range p.processes(t) {
			comm, err := os.ReadFile("/proc/" + pid + "/comm")
			if err != nil || string(comm) == "pause\n" || !slices.Contains(before, pid) {
				continue // it has ended, is the sandbox's own, or began meanwhile
			}
			stayed++
			if !slices.Contains(given, pid) {
				t.Errorf("%s: CRIU had no list of process %s, only of %v", mode, pid, given)
			}
		}
		if stayed < 3 {
			t.Fatalf("only %d processes were there before and after", stayed)
		}
	}
}

// What is held has not touched a process, and whoever holds it may go.
func TestACaptureThatIsCalledOffBeforeTheFreezeLeavesNoTrace(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	dir := theNode.directory(t)
	socket := filepath.Join(dir, "gate")
	var listener net.Listener
	must(t, theNode.host.Do(func() (err error) {
		listener, err = net.Listen("unix", socket)
		return err
	}))
	defer listener.Close()
	ended := make(chan error, 1)
	cmd := exec.Command(theNode.root+"/bin/devcluster", "--state", theNode.state, "exec", "node-1", "--", "env",
		"PATH=/opt/stasis/bin:/usr/local/bin:/usr/bin:/bin", "STASIS_AHEAD="+socket, "runc", "--root", "/run/containerd/runc/k8s.io",
		"checkpoint", "--leave-running", "--image-path", dir+"/images", "--work-path", dir+"/work", p.containers["a"])
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	must(t, cmd.Start())
	go func() {
		ended <- cmd.Wait()
		listener.Close() // if it never came
	}()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatalf("it did not wait: %v, %v: %s", err, <-ended, output.Bytes())
	}
	must(t, conn.SetReadDeadline(time.Now().Add(20*time.Second)))
	said := make([]byte, len("held\n"))
	if _, err := conn.Read(said); err != nil || string(said) != "held\n" {
		t.Errorf("it said %q: %v", said, err)
	}
	untouched := func(when string) {
		t.Helper()
		if theNode.frozen(t, p) {
			t.Errorf("%s the Pod is frozen", when)
		}
		for _, pid := range p.processes(t) {
			status, err := os.ReadFile("/proc/" + pid + "/status")
			if err == nil && !strings.Contains(string(status), "TracerPid:\t0\n") {
				t.Errorf("%s a process is traced:\n%s", when, status)
			}
		}
	}
	untouched("while CRIU waits")
	p.goesOn(t, "a")
	must(t, conn.Close())
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("it ended with %v: %s", err, output.Bytes())
		}
	case <-time.After(30 * time.Second):
		t.Error("it waits still")
		cmd.Process.Kill()
	}
	untouched("after that")
	if s := p.state(t, "a"); s != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container a is %v", s)
	}
	p.goesOn(t, "a")
	p.checkpoint(t)
}
