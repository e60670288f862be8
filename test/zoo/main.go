// zoo checkpoints and restores real applications, each with work that checks
// itself, and prints a table of what was checked and how long it took.
//
//	zoo                          every application, each restored five times in a row
//	zoo -apps redis,nginx        these
//	zoo -quick -rounds 1         those that are quick, once
//	zoo -engine gvisor           in Pods of gVisor, all that are not for CRIU alone
//	zoo -archives -apps redis    make the images of these, and print where their archives are
//	zoo -kubeconfig .devcluster/kubeconfig ...    on a running devcluster with Stasis in it
//
// An application is a directory below apps: README.md there says what is in it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	var z zoo
	names := flag.String("apps", "", "the applications, separated by commas; empty for all")
	quick := flag.Bool("quick", false, "only those that are quick")
	flag.StringVar(&z.engine, "engine", "criu", "criu or gvisor: of which their Pods are")
	flag.BoolVar(&z.onlyArchives, "archives", false, "make the applications' images, print where their archives are, and do nothing else")
	flag.IntVar(&z.rounds, "rounds", 5, "how often each is restored, each time from the one restored before")
	flag.StringVar(&z.kubeconfig, "kubeconfig", "", "of a running devcluster with Stasis in it; without it one is made and taken down")
	flag.IntVar(&z.size, "size", 1, "how often as much search and shop read at their start")
	flag.StringVar(&z.update, "update", "", "document to write the table of what passes into, between its marks")
	flag.StringVar(&z.table, "o", "", "file to write the table to, as Markdown")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	z.out = os.Stdout
	if err := z.run(ctx, strings.FieldsFunc(*names, func(r rune) bool { return r == ',' || r == ' ' }), *quick); err != nil {
		fmt.Fprintln(os.Stderr, "zoo:", err)
		os.Exit(1)
	}
}
