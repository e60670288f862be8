// kubectl-restore is the kubectl plugin "kubectl restore".
package main

import (
	"os"

	"podstasis.dev/stasis/internal/kubectl"
)

func main() { os.Exit(kubectl.Main(kubectl.NewRestoreCommand)) }
