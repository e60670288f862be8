// soak checkpoints and restores Pods of several shapes while a seeded adversary
// kills what takes part: agent, CRIU, containerd, kubelet, controller, API server.
// After each round it looks for what must not be: a Pod that stands still, a
// checkpoint that is Ready and does not restore, an object that does not end, a
// source that was harmed, and anything left behind on the nodes.
//
//	soak -rounds 200 -seed 7
//	soak -rounds 1 -first 12 -seed 7                round 12 of that alone
//	soak -kubeconfig .devcluster/kubeconfig ...     on a running devcluster with Stasis in it
//
// The seed decides shapes, victims and moments; what the killed programs were
// doing then is up to the machine.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	var s soak
	flag.IntVar(&s.rounds, "rounds", 50, "how many rounds")
	flag.IntVar(&s.first, "first", 1, "number of the first round")
	flag.Uint64Var(&s.seed, "seed", uint64(time.Now().Unix()), "what shapes, victims and moments follow from")
	kubeconfig := flag.String("kubeconfig", "", "of a running devcluster with Stasis in it; without it one is made and taken down")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s.out = os.Stdout
	if err := s.run(ctx, *kubeconfig); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}
