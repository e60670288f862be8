package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// captureEnv marks every process of a capture (the OCI runtime, CRIU and what
// they start) with its sandbox, so that they are found when the agent that
// started them is gone.
const captureEnv = "STASIS_CAPTURE"

// endCapture ends what is left of a sandbox's capture and waits until it is gone.
// It comes before a thaw: a CRIU that lives on puts the freezer back, when it
// ends, into the state that it found.
//
// CRIU's victims survive its death: the code that it put into them ends by itself
// when its socket closes, and goes back to where they were.
func endCapture(ctx context.Context, sandboxID string) error {
	for {
		pids, err := capturing(sandboxID)
		if err != nil {
			return fmt.Errorf("look for what is left of a capture: %w", err)
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end process %d of an interrupted capture: %w", pid, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of an interrupted capture do not end: %w", pids, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// capturing lists the processes that are marked with a sandbox's capture. One
// that has ended has no environment any more, so it is not among them.
func capturing(sandboxID string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	mark := []byte(captureEnv + "=" + sandboxID + "\x00")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err != nil {
			continue // it has ended, or is a kernel thread
		}
		if bytes.HasPrefix(env, mark) || bytes.Contains(env, append([]byte{0}, mark...)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
