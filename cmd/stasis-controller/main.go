// Command stasis-controller is the control plane of Stasis: it looks after
// PodCheckpoints and answers the API server's admission webhooks.
package main

import (
	"flag"
	"log/slog"
	"os"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"podstasis.dev/stasis/internal/controlplane"
)

func main() {
	var options controlplane.Options
	var level slog.LevelVar
	options.AddFlags(flag.CommandLine)
	flag.TextVar(&level, "log-level", &level, "debug, info, warn or error")
	flag.Parse()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: &level}))
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	klog.SetSlogLogger(log)

	if err := run(options, log); err != nil {
		log.Error("stasis-controller ends", "error", err)
		os.Exit(1)
	}
}

func run(options controlplane.Options, log *slog.Logger) error {
	ctx := ctrl.SetupSignalHandler()
	config, err := ctrl.GetConfig()
	if err != nil {
		return err
	}
	manager, err := controlplane.New(ctx, config, options, log)
	if err != nil {
		return err
	}
	return manager.Start(ctx)
}
