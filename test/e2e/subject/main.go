// subject is what the e2e tests checkpoint: a program with as much state as can be
// told apart from a fresh start. It serves HTTP on port 8080.
//
//	subject              build the state up and serve
//	subject get PATH     ask the subject in this Pod, print the answer
//	subject share a|b    one of two containers that share memory and talk
//	subject echo         answer whoever speaks
//	subject dial HOST    speak to the echo there
//	subject hold MIB     hold so much memory
//	subject plug listen|dial PATH   hold an end of a Unix connection
//	subject reach ADDR   print what is said at an address and port
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// As process 1 of a container it must ask for the signal to get it.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "get":
		err = get(os.Args[2])
	case len(os.Args) == 2 && os.Args[1] == "child":
		err = child()
	case len(os.Args) == 3 && os.Args[1] == "share":
		err = share(ctx, os.Args[2])
	case len(os.Args) == 2 && os.Args[1] == "echo":
		err = echo(ctx)
	case len(os.Args) == 3 && os.Args[1] == "dial":
		err = dial(ctx, os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "hold":
		err = hold(ctx, os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "reach":
		err = reach(os.Args[2])
	case len(os.Args) == 4 && os.Args[1] == "plug":
		err = plug(ctx, os.Args[2], os.Args[3])
	case len(os.Args) == 1:
		err = serve(ctx)
	default:
		err = fmt.Errorf("usage: subject [get PATH]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "subject:", err)
		os.Exit(1)
	}
}
