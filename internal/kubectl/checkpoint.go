package kubectl

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// reportGrace is how long the command waits after the operation's own timeout,
// so that the outcome, also that of a timeout, can still be reported.
const reportGrace = 15 * time.Second

// checkpointOptions is the command line of "kubectl checkpoint POD".
type checkpointOptions struct {
	*environment
	output *output
	grace  time.Duration

	pod        string
	containers []string
	name       string
	store      string
	timeout    time.Duration
	pairs      []string
	options    map[string]string
	wait       bool
	dryRun     *dryRun
	// preflight is what a dry run on the server found out.
	preflight *subresourcesv1alpha1.CheckpointPreflight
}

// NewCheckpointCommand is "kubectl checkpoint" with its subcommands.
func NewCheckpointCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return newCheckpointCommand(newEnvironment(streams))
}

func newCheckpointCommand(env *environment) *cobra.Command {
	o := &checkpointOptions{environment: env, grace: reportGrace}
	cmd := &cobra.Command{
		Use:   "kubectl-checkpoint POD [-c CONTAINER]... [--name NAME] [--store STORE] [--timeout DURATION] [--option KEY=VALUE]...",
		Short: "Take a checkpoint of a running Pod",
		Long: `Take a checkpoint of a running Pod: its containers' processes with their memory,
open files and writable layers. The Pod stands still for a moment and runs on.

The command asks for a PodCheckpoint and waits until it is ready. "kubectl restore"
makes new Pods from it, as often as wanted, also when the Pod itself is gone. It
needs the verb "create" on "pods/checkpoint" (or on "podcheckpoints").

A Pod whose name is that of a command is named after "--", or as pod/NAME:
"kubectl checkpoint -- list".

` + exitCodesHelp,
		Example: `  # Take a checkpoint of Pod web
  kubectl checkpoint web

  # Under a name of your own, giving up after 30 seconds
  kubectl checkpoint web --name web-before-upgrade --timeout 30s

  # Only one container, for forensics: such a checkpoint cannot be restored
  kubectl checkpoint web -c app

  # Keep it where any node can restore it
  kubectl checkpoint web --store shared

  # Do not let the Pod stand still for longer than half a second
  kubectl checkpoint web --option freezeBudget=500ms

  # What would a checkpoint meet? Nothing is frozen or stored
  kubectl checkpoint web --dry-run=server

  # Ask and go on; look later
  kubectl checkpoint web --wait=false -o name`,
		Args:              exactly(1, "one Pod"),
		ValidArgsFunction: env.completePods(),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := o.complete(args[0]); err != nil {
			return err
		}
		if err := o.connect(); err != nil {
			return err
		}
		return o.run(cmd.Context())
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringArrayVarP(&o.containers, "container", "c", nil, "Container to checkpoint, instead of all. May be repeated.")
	flags.StringVar(&o.name, "name", "", "Name of the PodCheckpoint. Default: the Pod's name and a random suffix.")
	flags.DurationVar(&o.timeout, "timeout", 0, "How long the operation may take, in whole seconds. Default: 2m.")
	flags.StringArrayVar(&o.pairs, "option", nil, "Option for the engine, as KEY=VALUE. May be repeated. An option that the engine does not know fails the checkpoint.")
	flags.StringVar(&o.store, "store", "", "CheckpointStore to keep it in, from where any node can restore it. Default: it stays on its node.")
	flags.BoolVar(&o.wait, "wait", true, "Wait until the checkpoint is ready or has failed.")
	o.dryRun = dryRunFlag(flags)
	o.output = newOutput(cmd, "created")
	completeFlag(cmd, "container", env.completePodContainers())
	completeFlag(cmd, "store", env.completeStores())
	cmd.AddCommand(newListCommand(env), newDescribeCommand(env), newDeleteCommand(env), newInspectCommand(env), newDiffCommand(env), newDownloadCommand(env), newImportCommand(env), newCheckCommand(env), newVerifyCommand(env), newGCCommand(env), newStoresCommand(env), completionCommand(env))
	return program(cmd, env)
}

// complete checks the command line; nothing is sent.
func (o *checkpointOptions) complete(arg string) (err error) {
	if o.pod, err = resourceName(arg, podTypes()); err != nil {
		return err
	}
	if o.timeout < 0 || o.timeout%time.Second != 0 || o.timeout > time.Hour {
		return usagef("--timeout %s: must be whole seconds, at most 1h", o.timeout)
	}
	if o.options, err = parseOptions(o.pairs); err != nil {
		return err
	}
	return o.output.validate()
}

// parseOptions turns KEY=VALUE pairs into a map.
func parseOptions(pairs []string) (map[string]string, error) {
	var options map[string]string
	for _, pair := range pairs {
		key, value, found := strings.Cut(pair, "=")
		if !found || key == "" {
			return nil, usagef("--option %q: must be KEY=VALUE", pair)
		}
		if _, again := options[key]; again {
			return nil, usagef("--option %s is given twice", key)
		}
		if options == nil {
			options = map[string]string{}
		}
		options[key] = value
	}
	return options, nil
}

func (o *checkpointOptions) timeoutSeconds() *int32 {
	if o.timeout == 0 {
		return nil
	}
	seconds := int32(min(o.timeout/time.Second, math.MaxInt32))
	return &seconds
}

func (o *checkpointOptions) run(ctx context.Context) error {
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	checkpoint, failure, err := o.take(ctx, progress)
	progress.end()
	if err != nil {
		return err
	}
	suffix := o.dryRun.suffix()
	if o.output.asked() || suffix != "" || !o.wait {
		if err := o.output.print(o.Out, checkpoint, suffix); err != nil {
			return err
		}
	} else if failure == nil {
		tellCheckpoint(o.Out, checkpoint)
	}
	for _, warning := range checkpoint.Status.Warnings {
		fmt.Fprintf(o.ErrOut, "warning: %s\n", clean(warning))
	}
	if o.preflight != nil {
		tellPreflight(o.ErrOut, o.preflight)
		if len(o.preflight.Problems) > 0 {
			return errWouldFail
		}
	}
	return failure
}

// take has the checkpoint taken. failure is what it ended with; err is why that is
// not known, or why there is none.
func (o *checkpointOptions) take(ctx context.Context, progress *progress) (checkpoint *checkpointv1alpha1.PodCheckpoint, failure, err error) {
	if *o.dryRun == dryRunClient {
		checkpoint, err = o.direct(ctx)
		return checkpoint, nil, err
	}
	checkpoint, err = o.call(ctx)
	if mayCreateInstead(err) {
		checkpoint, err = o.create(ctx, err)
	}
	if err != nil || *o.dryRun != dryRunNone || !o.wait {
		return checkpoint, nil, err
	}
	failure, err = o.follow(ctx, progress, checkpoint)
	return checkpoint, failure, err
}
