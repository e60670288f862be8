// Command stasis-restore is what stasis-runtime becomes where its Pod restores: it does
// what an OCI runtime does, and can do all that stasis-runtime leaves to runc. The same
// program, under another name, is the agent's guard.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"podstasis.dev/stasis/internal/ociruntime"
)

func main() {
	executable, err := os.Executable()
	if err == nil {
		err = ociruntime.Main(context.Background(), executable, os.Args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stasis-restore:", err)
		// The real runtime's own exit code is passed on: callers know its meaning.
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			os.Exit(exit.ExitCode())
		}
		os.Exit(1)
	}
}
