// demo shows the main job on a Kubernetes cluster of its own: it checkpoints a
// running Pod and restores it twice. "make demo" runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"podstasis.dev/stasis/demo/driver"
)

func main() {
	d := driver.Demo{Out: os.Stdout}
	flag.StringVar(&d.Root, "root", ".", "checkout, with the programs built in bin and the images in dist/images")
	flag.StringVar(&d.State, "state", ".devcluster-demo", "state directory of the cluster")
	flag.IntVar(&d.Nodes, "nodes", 1, "nodes of the cluster")
	flag.BoolVar(&d.Keep, "keep", false, "leave the cluster running")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := d.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo: failed:", err)
		os.Exit(1)
	}
}
