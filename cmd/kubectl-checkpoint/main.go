// kubectl-checkpoint is the kubectl plugin "kubectl checkpoint".
package main

import (
	"os"

	"podstasis.dev/stasis/internal/kubectl"
)

func main() { os.Exit(kubectl.Main(kubectl.NewCheckpointCommand)) }
