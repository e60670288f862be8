// Command stasis-runtime is the OCI runtime of the handler "stasis": what it is asked
// for it leaves to runc, or to stasis-restore beside it, where its Pod restores. The
// same program, under other names, is CRIU's freeze hook and the process of an init
// container that had completed.
package main

import (
	"os"

	"podstasis.dev/stasis/internal/ociruntime/aside"
)

func main() {
	if err := aside.Main(os.Args); err != nil {
		os.Stderr.WriteString("stasis-runtime: " + err.Error() + ": run stasis-agent install on this node\n")
		os.Exit(1)
	}
}
