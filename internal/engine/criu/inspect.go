package criu

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/engine"
)

// inspect looks, while the container runs, for what is known not to survive a
// capture, so that it is refused with a plain reason and not found out by CRIU
// while the Pod stands still.
func inspect(c engine.Container, pids []int) error {
	for _, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		problem, err := problemOf(proc)
		if err == nil && problem == "" {
			problem, err = problemOfLeader(proc, leaderPatience)
		}
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

// leaderPatience is how long a process may take to end after its first thread.
const leaderPatience = 2 * time.Second

// problemOfLeader looks for a process whose first thread has ended and others have not, and
// stays so. Of one that is about to end it waits for the end.
func problemOfLeader(proc string, patience time.Duration) (string, error) {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		without, err := leaderless(proc)
		if err != nil || !without {
			return "", err
		}
		if time.Now().After(end) {
			return "its first thread has ended and others go on; CRIU cannot capture such a process: have its first thread wait for the others, or end it", nil
		}
	}
}

// leaderless says whether a process' first thread has ended and another has not.
func leaderless(proc string) (bool, error) {
	if over, err := threadEnded(proc); err != nil || !over {
		return false, err
	}
	threads, err := os.ReadDir(proc + "/task")
	if err != nil {
		return false, err
	}
	for _, thread := range threads {
		if over, err := threadEnded(proc + "/task/" + thread.Name()); err == nil && !over {
			return true, nil
		}
	}
	return false, nil
}

func threadEnded(proc string) (bool, error) {
	stat, err := os.ReadFile(proc + "/stat")
	if err != nil {
		return false, err
	}
	_, err = parseParent(stat)
	if errors.Is(err, errEnded) {
		return true, nil
	}
	return false, err
}

// lookForLeaderless looks again, when a process was frozen while it seemed to end.
func lookForLeaderless(containers []engine.Container) error {
	pids, err := treesOf(containers)
	if err != nil {
		return err
	}
	for i, c := range containers {
		for _, pid := range pids[i] {
			if problem, err := problemOfLeader("/proc/"+strconv.Itoa(pid), leaderPatience); err == nil && problem != "" {
				return fmt.Errorf("%w: container %s, process %d (%s): %s", engine.ErrUnsupported, c.Name, pid, commandOf(pid), problem)
			}
		}
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
