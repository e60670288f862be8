package criu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"podstasis.dev/stasis/internal/engine"
)

// inspect looks, while the container runs, for what is known not to survive a
// capture, so that it is refused with a plain reason and not found out by CRIU
// while the Pod stands still.
func inspect(c engine.Container, pids []int) error {
	for _, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		problem, err := problemOf(proc)
		if ended(err) {
			continue
		} else if err != nil {
			return fmt.Errorf("container %s: look at process %d: %w", c.Name, pid, err)
		}
		if problem != "" {
			return fmt.Errorf("%w: container %s, process %d (%s): %s", engine.ErrUnsupported, c.Name, pid, commandOf(pid), problem)
		}
	}
	// After the processes: one that has a queue open is worth its name.
	if problem := problemOfQueues(fmt.Sprintf("/proc/%d/root/dev/mqueue", c.PID)); problem != "" {
		return fmt.Errorf("%w: container %s: %s", engine.ErrUnsupported, c.Name, problem)
	}
	return nil
}

func problemOf(proc string) (string, error) {
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch {
		case name == "State" && strings.HasPrefix(value, "T"):
			return "it is stopped (SIGSTOP); CRIU hangs on stopped processes of a frozen cgroup: continue or end it first", nil
		case name == "TracerPid" && value != "0":
			return "process " + value + " traces it (ptrace), which only one can at a time: end the debugger first", nil
		}
	}
	if problem := problemOfNamespaces(proc); problem != "" {
		return problem, nil
	}
	if cwd, err := os.Readlink(proc + "/cwd"); err == nil {
		if problem := problemOfPath(cwd); problem != "" {
			return "its working directory " + cwd + " " + problem, nil
		}
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return "", err
	}
	for _, fd := range fds {
		if problem := problemOfFD(proc, fd.Name()); problem != "" {
			return problem, nil
		}
	}
	return problemOfMappings(proc)
}
