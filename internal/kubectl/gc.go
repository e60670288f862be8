package kubectl

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// gcOptions is the command line of "kubectl checkpoint gc".
type gcOptions struct {
	*environment
	store   string
	timeout time.Duration
	dryRun  bool
}

func newGCCommand(env *environment) *cobra.Command {
	o := &gcOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "gc --store STORE [--dry-run]",
		Short: "Remove from a store what no checkpoint uses",
		Long: `Remove from a CheckpointStore what no checkpoint uses any more. Stasis does so by
itself; this is for who wants it now, or to know. Nothing is removed that was not seen
without use before, at least an hour ago, and nothing while an agent that was writing
then still is: two calls in a row free nothing.

It needs the verb "create" on "checkpointstores/collect" (ClusterRole
stasis-store-admin, bound in the cluster).

` + exitCodesHelp,
		Example: `  # What would be removed?
  kubectl checkpoint gc --store shared --dry-run

  # Remove it
  kubectl checkpoint gc --store shared`,
		Args:              none,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.store == "" {
				return usagef("--store must be given: `kubectl checkpoint stores` lists them")
			}
			if o.timeout <= 0 {
				return usagef("--timeout %s: must be more than 0", o.timeout)
			}
			if err := o.connect(); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&o.store, "store", "", "CheckpointStore to look through.")
	flags.BoolVar(&o.dryRun, "dry-run", false, "Only say what would be removed.")
	flags.DurationVar(&o.timeout, "timeout", time.Hour, "How long to wait.")
	completeFlag(cmd, "store", env.completeStores())
	return cmd
}

func (o *gcOptions) run(ctx context.Context) error {
	if o.calls == nil {
		return errNotServed
	}
	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	var c *subresourcesv1alpha1.StoreCollection
	err := askAgain(ctx, waiting, "collection of checkpointstore "+o.store, func(ctx context.Context) (bool, error) {
		c = &subresourcesv1alpha1.StoreCollection{}
		c.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("StoreCollection"))
		err := o.calls.post(ctx, "", "checkpointstores", o.store, "collect", o.dryRun, c)
		if err == nil && c.Status.CompletionTime == nil {
			progress.step("checkpointstore %s: looking for what no checkpoint uses", o.store)
		}
		return err == nil && c.Status.CompletionTime != nil, err
	})
	progress.end()
	if err != nil {
		return err
	}
	s := &c.Status
	removed, suffix := "removed", ""
	if s.DryRun {
		removed, suffix = "to remove", " (dry run)"
	}
	return table(o.Out, "", [][]string{
		{"Store:", o.store + suffix},
		{"Checkpoints:", fmt.Sprint(s.Checkpoints)},
		{"Held:", size(s.Bytes)},
		{"Now " + removed + ":", size(s.RemovedBytes)},
		{"Unused, stays for now:", size(s.UnusedBytes)},
		{"Agents that write:", fmt.Sprint(s.Writers)},
	})
}
