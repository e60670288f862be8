package kubectl

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// deleteOptions is the command line of "kubectl checkpoint delete".
type deleteOptions struct {
	*environment
	wait           bool
	timeout        time.Duration
	ignoreNotFound bool
	dryRun         *dryRun
	form           string
}

func newDeleteCommand(env *environment) *cobra.Command {
	o := &deleteOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "delete NAME... [--wait=false] [--timeout DURATION] [--ignore-not-found]",
		Short: "Delete checkpoints and their data",
		Long: `Delete PodCheckpoints and wait until their nodes have removed the data. Pods that
were restored from them run on. A checkpoint that is being restored from stays until
that restore is over.

` + exitCodesHelp,
		Example: `  # Delete a checkpoint, and be sure that its data are gone
  kubectl checkpoint delete web-x7k2p

  # Do not wait for the node
  kubectl checkpoint delete web-x7k2p --wait=false`,
		Args:              atLeastOne("checkpoint"),
		ValidArgsFunction: env.completeCheckpoints(0),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := checkpointNames(args)
		if err != nil {
			return err
		}
		if o.timeout <= 0 {
			return usagef("--timeout %s: must be more than 0", o.timeout)
		}
		if o.form != "" && o.form != "name" {
			return usagef(`--output %q: "name" is the only form`, o.form)
		}
		if err := o.connect(); err != nil {
			return err
		}
		return o.run(cmd.Context(), names)
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.BoolVar(&o.wait, "wait", true, "Wait until the data are removed.")
	flags.DurationVar(&o.timeout, "timeout", 2*time.Minute, "How long to wait.")
	flags.BoolVar(&o.ignoreNotFound, "ignore-not-found", false, "A checkpoint that is not there is no error.")
	flags.StringVarP(&o.form, "output", "o", "", `"name" prints names alone.`)
	o.dryRun = dryRunFlag(flags)
	return cmd
}

func (o *deleteOptions) run(ctx context.Context, names []string) error {
	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	var errs []error
	var going []*checkpointv1alpha1.PodCheckpoint
	for _, name := range names {
		checkpoint, err := o.one(ctx, name)
		errs = append(errs, err)
		if checkpoint != nil {
			going = append(going, checkpoint)
		}
	}
	for _, checkpoint := range going {
		if o.wait && *o.dryRun == dryRunNone {
			if err := o.gone(ctx, waiting, progress, checkpoint); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		o.say(progress, checkpoint.Name)
	}
	return joined(errs)
}

func (o *deleteOptions) say(progress *progress, name string) {
	progress.end()
	if o.form == "name" {
		fmt.Fprintf(o.Out, "podcheckpoint.%s/%s\n", checkpointv1alpha1.GroupName, name)
		return
	}
	fmt.Fprintf(o.Out, "podcheckpoint.%s %q deleted%s\n", checkpointv1alpha1.GroupName, name, o.dryRun.suffix())
}

// one asks for the deletion of one checkpoint; it is nil if there is nothing to wait for.
func (o *deleteOptions) one(ctx context.Context, name string) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: o.namespace, Name: name}}
	// Its UID makes sure that the one which is waited for is the one which was deleted.
	// Who may delete and not read does without.
	err := o.client.Get(ctx, client.ObjectKeyFromObject(checkpoint), checkpoint)
	if apierrors.IsForbidden(err) {
		err = nil
	}
	if err == nil && *o.dryRun != dryRunClient {
		var options []client.DeleteOption
		if checkpoint.UID != "" {
			options = append(options, client.Preconditions{UID: &checkpoint.UID})
		}
		if *o.dryRun == dryRunServer {
			options = append(options, client.DryRunAll)
		}
		err = o.client.Delete(ctx, checkpoint, options...)
	}
	if apierrors.IsNotFound(err) && o.ignoreNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, explain(err)
	}
	return checkpoint, nil
}

// gone waits until the object is, and with it its data.
func (o *deleteOptions) gone(ctx, waiting context.Context, progress *progress, checkpoint *checkpointv1alpha1.PodCheckpoint) error {
	uid := checkpoint.UID
	var holding string
	err := follow(waiting, o.client, client.ObjectKeyFromObject(checkpoint), checkpoint.DeepCopy(), &checkpointv1alpha1.PodCheckpointList{},
		func(now *checkpointv1alpha1.PodCheckpoint) (bool, error) {
			if uid != "" && now.UID != uid {
				return true, nil
			}
			holding = whatHolds(now)
			progress.step("podcheckpoint %s: %s", now.Name, holding)
			return false, nil
		})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("podcheckpoint %s: its deletion was asked for, and cannot be waited for: %w", checkpoint.Name, err)
	}
	return waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s is being deleted: %s", checkpoint.Name, holding))
}

// whatHolds says why an object that was deleted is still there.
func whatHolds(checkpoint *checkpointv1alpha1.PodCheckpoint) string {
	others := slices.DeleteFunc(slices.Clone(checkpoint.Finalizers), func(f string) bool {
		return f == checkpointv1alpha1.FinalizerData || f == checkpointv1alpha1.FinalizerStore
	})
	switch {
	case len(others) > 0:
		return "waiting for finalizers " + clean(strings.Join(others, ", "))
	case len(checkpoint.Finalizers) > 0 && !slices.Contains(checkpoint.Finalizers, checkpointv1alpha1.FinalizerData):
		return "waiting for its removal from checkpointstore " + or(clean(checkpoint.Spec.StoreName), "(unknown)")
	case len(checkpoint.Finalizers) > 0:
		return "waiting for node " + or(or(checkpoint.Status.NodeName, checkpoint.Spec.NodeName), "(unknown)") + " to remove its data"
	}
	return "waiting for its removal"
}
