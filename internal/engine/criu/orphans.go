package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// captureEnv marks every process of a capture (the OCI runtime, CRIU and what
// they start) with its sandbox, so that they are found when the agent that
// started them is gone.
const captureEnv = "STASIS_CAPTURE"

// interruptPatience is how long a CRIU that was asked to give up may take. With
// what comes after it stays below the 2 s in which a Pod is thawed (P13).
const interruptPatience = 1500 * time.Millisecond

// interruptCapture asks every CRIU of a sandbox's capture to give up.
//
// CRIU must not be killed while it can be asked: for moments it has the captured
// processes execute its own instructions, and one that is left there dies
// (SIGTRAP). It knows no request to stop, but it stops in good order, with its
// victims as they were, when it cannot write a file. So its limit of file sizes is
// set to 0: its next write fails with EFBIG (setrlimit(2)). That SIGXFSZ does not
// end it first is seen to by what starts it (the launcher in the CRIU prefix).
func interruptCapture(sandboxID string) error {
	pids, err := capturing(sandboxID)
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		if !isCRIU(pid) {
			continue
		}
		none := unix.Rlimit{}
		if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &none, nil); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("limit the files of process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// isCRIU says whether a process is a CRIU that an OCI runtime has started, and
// ignores SIGXFSZ.
func isCRIU(pid int) bool {
	proc := "/proc/" + strconv.Itoa(pid)
	cmdline, err := os.ReadFile(proc + "/cmdline")
	if err != nil || !bytes.Contains(cmdline, []byte("\x00swrk\x00")) {
		return false
	}
	ignored, err := ignoredSignals(proc + "/status")
	return err == nil && ignored&(1<<(unix.SIGXFSZ-1)) != 0
}

// ignoredSignals reads the mask of ignored signals (proc_pid_status(5)).
func ignoredSignals(status string) (uint64, error) {
	data, err := os.ReadFile(status)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(data) {
		if mask, ok := bytes.CutPrefix(line, []byte("SigIgn:")); ok {
			return strconv.ParseUint(string(bytes.TrimSpace(mask)), 16, 64)
		}
	}
	return 0, fmt.Errorf("%s has no SigIgn", status)
}

// killedPatience is how long a killed process is waited for. One that is in a
// system call which does not return, as of a disk that does not answer, ends when
// that does; it does nothing more before, and is no reason to keep a Pod frozen.
const killedPatience = 100 * time.Millisecond

// endCapture ends what is left of a sandbox's capture and waits until it is gone:
// asked first, killed when that takes too long. It comes before a thaw: a CRIU
// that lives on puts the freezer back, when it ends, into the state that it found.
func endCapture(ctx context.Context, sandboxID string) error {
	patience := time.Now().Add(interruptPatience)
	killed := map[int]time.Time{}
	for {
		pids, err := capturing(sandboxID)
		if err != nil {
			return fmt.Errorf("look for what is left of a capture: %w", err)
		}
		alive := slices.DeleteFunc(pids, func(pid int) bool {
			at, ok := killed[pid]
			return ok && time.Since(at) > killedPatience
		})
		if len(alive) == 0 {
			return nil
		}
		if time.Now().Before(patience) {
			err = interruptCapture(sandboxID)
		} else {
			err = kill(alive)
			for _, pid := range alive {
				if _, ok := killed[pid]; !ok {
					killed[pid] = time.Now()
				}
			}
		}
		if err != nil {
			return fmt.Errorf("end an interrupted capture: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of an interrupted capture do not end: %w", alive, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func kill(pids []int) error {
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

// capturing lists the processes that are marked with a sandbox's capture. One
// that has ended has no environment any more, so it is not among them.
func capturing(sandboxID string) ([]int, error) {
	marked, err := markedBy(captureEnv)
	maps.DeleteFunc(marked, func(_ int, sandbox string) bool { return sandbox != sandboxID })
	return slices.Collect(maps.Keys(marked)), err
}

// markedBy lists the processes that have a variable in their environment, with its value.
func markedBy(variable string) (map[int]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	mark := []byte(variable + "=")
	marked := map[int]string{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err != nil {
			continue // it has ended, or is a kernel thread
		}
		for setting := range bytes.SplitSeq(env, []byte{0}) {
			if value, ok := bytes.CutPrefix(setting, mark); ok {
				marked[pid] = string(value)
				break
			}
		}
	}
	return marked, nil
}
