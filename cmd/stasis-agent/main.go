// Command stasis-agent is the node's daemon: it checkpoints and restores the
// Pods of its node, and installs what that takes there.
package main

import (
	"fmt"
	"os"

	"podstasis.dev/stasis/internal/agent"
)

func main() {
	ctx, stop := agent.Context()
	err := agent.NewCommand(os.Stdout).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "stasis-agent:", err)
		os.Exit(1)
	}
}
