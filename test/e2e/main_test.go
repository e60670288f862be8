// Package e2e tests Stasis on a real Kubernetes of two nodes, installed as users
// install it. Tests are named by sentences; comments give the requirements'
// numbers.
//
//	make test-e2e                                           a cluster of its own
//	go test ./test/e2e -run TestTheMainJob                  one test, likewise
//	STASIS_KUBECONFIG=.devcluster/kubeconfig go test ...    on a running devcluster
//
// With STASIS_KUBECONFIG the devcluster that it belongs to is used as it is and
// left running: Stasis must be installed in it and its images loaded.
// STASIS_E2E_CLUSTER gives other flags to devcluster up than --gvisor, such as versions.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/test/e2e/cluster"
)

// shared is the cluster that tests use which disturb nobody.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	flag.Parse()
	if err := errors.Join(chooseEngine(), mostlyWaiting()); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// mostlyWaiting lets more tests run in parallel than there are processors, unless
// -parallel says otherwise: they wait for the cluster most of the time.
func mostlyWaiting() error {
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if given {
		return nil
	}
	return flag.Set("test.parallel", fmt.Sprint(max(4, runtime.GOMAXPROCS(0))))
}

func run(m *testing.M) (code int, err error) {
	root, err := cluster.Root()
	if err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), cluster.Patience*5*time.Minute)
	defer cancel()
	if kubeconfig := os.Getenv("STASIS_KUBECONFIG"); kubeconfig != "" {
		if shared, err = cluster.Attach(root, filepath.Dir(kubeconfig)); err != nil {
			return 1, err
		}
		if err := makeClasses(ctx); err != nil {
			return 1, err
		}
		return m.Run(), nil
	}
	flags := []string{"--gvisor"}
	if given := os.Getenv("STASIS_E2E_CLUSTER"); given != "" {
		flags = strings.Fields(given)
	}
	shared, err = cluster.Up(ctx, root, filepath.Join(root, ".devcluster-e2e"), 2, flags...)
	defer func() { err = errors.Join(err, shared.Down(context.Background())) }()
	if err != nil {
		return 1, err
	}
	for _, node := range []string{nodeOne, nodeTwo} { // config/store-directory wants it
		if _, err := shared.OnNode(ctx, node, "mkdir -p "+mounted); err != nil {
			return 1, err
		}
	}
	if err := shared.InstallFrom(ctx, "test/e2e/config"); err != nil {
		shared.Diagnose(ctx, os.Stderr)
		return 1, err
	}
	if err := makeClasses(ctx); err != nil {
		return 1, err
	}
	slog.Info("cluster is ready", "kubeconfig", shared.Kubeconfig())
	return m.Run(), nil
}
