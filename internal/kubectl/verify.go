package kubectl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// verifyOptions is the command line of "kubectl checkpoint verify".
type verifyOptions struct {
	*environment
	store   string
	timeout time.Duration
}

func newVerifyCommand(env *environment) *cobra.Command {
	o := &verifyOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "verify NAME... | verify --store STORE",
		Short: "Read checkpoints in their store, and compare them with their digests",
		Long: `Read all that checkpoints consist of in their CheckpointStore, and compare it with
the digests that it was stored by. With --store, everything that the store holds,
which may take long: interrupted, and called again soon, the command waits on for the
same verification.

It needs the verb "create" on "podcheckpoints/verify"; for a store, which is the
cluster's, on "checkpointstores/verify" (ClusterRole stasis-store-admin).

Exit codes:
  0    all of it is as it was stored
  1    it could not be looked at
  2    wrong command line, nothing was sent
  3    the timeout is over, and the verification goes on
  4    something is corrupt or missing
  130  interrupted`,
		Example: `  # Can it still be restored?
  kubectl checkpoint verify web-x7k2p

  # Is all that the store holds as it was written?
  kubectl checkpoint verify --store shared`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case o.store == "" && len(args) == 0:
				return usagef("checkpoints, or a store (--store), must be named")
			case o.store != "" && len(args) > 0:
				return usagef("--store verifies all that the store holds: name no checkpoint")
			}
			return nil
		},
		ValidArgsFunction: env.completeCheckpoints(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := checkpointNames(args)
			if err != nil {
				return err
			}
			if o.timeout <= 0 {
				return usagef("--timeout %s: must be more than 0", o.timeout)
			}
			if err := o.connect(); err != nil {
				return err
			}
			return o.run(cmd.Context(), names)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&o.store, "store", "", "CheckpointStore to verify, with everything in it.")
	flags.DurationVar(&o.timeout, "timeout", time.Hour, "How long to wait.")
	completeFlag(cmd, "store", env.completeStores())
	return cmd
}

// errCorrupt ends a verification that found something.
var errCorrupt = &exitError{ExitCorrupt, errors.New("what is stored is not what was written; what is named cannot be restored")}

func (o *verifyOptions) run(ctx context.Context, names []string) error {
	if o.calls == nil {
		return errNotServed
	}
	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	if o.store != "" {
		return o.one(ctx, waiting, progress, "checkpointstore "+o.store, func(ctx context.Context, v *subresourcesv1alpha1.StoreVerification) error {
			return o.calls.post(ctx, "", "checkpointstores", o.store, "verify", false, v)
		})
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, o.one(ctx, waiting, progress, "podcheckpoint "+name, func(ctx context.Context, v *subresourcesv1alpha1.StoreVerification) error {
			return o.calls.post(ctx, o.namespace, "podcheckpoints", name, "verify", false, v)
		}))
	}
	return joined(errs)
}

func (o *verifyOptions) one(ctx, waiting context.Context, progress *progress, what string, ask func(context.Context, *subresourcesv1alpha1.StoreVerification) error) error {
	var v *subresourcesv1alpha1.StoreVerification
	err := askAgain(ctx, waiting, "verification of "+what, func(ctx context.Context) (bool, error) {
		v = &subresourcesv1alpha1.StoreVerification{}
		v.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("StoreVerification"))
		err := ask(ctx, v)
		if err == nil && v.Status.CompletionTime == nil {
			progress.step("%s: %s read", what, size(v.Status.VerifiedBytes))
		}
		return err == nil && v.Status.CompletionTime != nil, err
	})
	progress.end()
	if err != nil {
		return err
	}
	s := &v.Status
	for _, p := range s.Problems {
		fmt.Fprintf(o.Out, "%s: checkpoint %s of podcheckpoint %s: %s\n", what, clean(p.CheckpointID), or(clean(p.PodCheckpoint), "(unknown)"), clean(p.Message))
	}
	if more := int(s.ProblemCount) - len(s.Problems); more > 0 {
		fmt.Fprintf(o.Out, "%s: %d problems more\n", what, more)
	}
	if s.ProblemCount > 0 {
		return errCorrupt
	}
	counted := "1 checkpoint"
	if s.Checkpoints != 1 {
		counted = fmt.Sprintf("%d checkpoints", s.Checkpoints)
	}
	fmt.Fprintf(o.Out, "%s verified: %s, %s read\n", what, counted, size(s.VerifiedBytes))
	return nil
}

// askAgain asks until it is done, for what goes on longer than a call may.
func askAgain(ctx, waiting context.Context, what string, ask func(context.Context) (done bool, err error)) error {
	for {
		done, err := ask(waiting)
		switch {
		case done:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case waiting.Err() != nil:
			return inProgressf("timed out waiting; the %s goes on for a while: ask again", what)
		case apierrors.IsTooManyRequests(err):
			// Others' go on. They end.
		case err != nil:
			return err
		}
		select {
		case <-waiting.Done():
		case <-time.After(askPause):
		}
	}
}

// askPause keeps a server that answers at once from being asked all the time.
const askPause = 500 * time.Millisecond
