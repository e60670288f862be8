// counter-a is the demo's first program: Go, several threads. It counts about a
// hundred times a second, each time by an exchange with counter-b (see package
// exchange), and keeps in memory alone its count, a random nonce and the digest of
// every exchange there was. When anything does not fit it prints DISAGREE and
// exits with 1.
//
//	counter-a            run
//	counter-a status     print the status of both programs, and exit
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

const (
	ledger   = "/shared/ledger"
	addressA = "127.0.0.1:7101"
	addressB = "127.0.0.1:7102"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var err error
	if len(os.Args) == 2 && os.Args[1] == "status" {
		err = status(os.Stdout, addressA, addressB)
	} else {
		err = run(ctx, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "a", err)
		os.Exit(1)
	}
}
