// Command stasis-runtime is the OCI runtime of the handler "stasis". The same
// program, under other names, is CRIU's freeze hook and the process of an init
// container that had completed.
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
		fmt.Fprintln(os.Stderr, "stasis-runtime:", err)
		// The real runtime's own exit code is passed on: callers know its meaning.
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			os.Exit(exit.ExitCode())
		}
		os.Exit(1)
	}
}
