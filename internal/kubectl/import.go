package kubectl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/kubectl/transfer"
)

// importOptions is the command line of "kubectl checkpoint import".
type importOptions struct {
	*environment
	output   *output
	file     string
	name     string
	pod      string
	node     string
	patience time.Duration
	timeout  time.Duration
	wait     bool
	dryRun   *dryRun
}

func newImportCommand(env *environment) *cobra.Command {
	o := &importOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "import FILE [--name NAME] [--node NODE]",
		Short: "Bring a checkpoint in from a file",
		Long: `Bring a checkpoint in from a file that "kubectl checkpoint download" wrote, or from
one that a kubelet's checkpoint endpoint wrote. The first can be restored like any
other, on the node that it is brought to; one of a single container can be inspected,
compared and downloaded, and cannot be restored as a Pod.

FILE is read once and checked before anything is sent, then sent in parts. What was
interrupted goes on where it was when the same command is run again. Whoever restores
an import runs what is in it: the command needs the verb "import" on "podcheckpoints",
which only administrators have unless it is given to others.

Exit codes:
  0    imported
  1    failed or refused
  2    wrong command line, nothing was sent
  3    nothing has moved for --retry-for, or its node is still at work when
       --timeout is over; run it again to go on
  4    FILE is damaged, nothing was sent
  130  interrupted; run it again to go on`,
		Example: `  # Under the name that it had
  kubectl checkpoint import web-x7k2p.tar

  # To another node, under another name
  kubectl checkpoint import web-x7k2p.tar --name web-there --node node-2
  kubectl restore web-there`,
		Args: exactly(1, "one file"),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return []string{"tar"}, cobra.ShellCompDirectiveFilterFileExt
		},
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o.file = args[0]
		if o.patience <= 0 || o.timeout <= 0 {
			return usagef("--retry-for %s, --timeout %s: must be more than 0", o.patience, o.timeout)
		}
		if err := o.output.validate(); err != nil {
			return err
		}
		if err := o.connect(); err != nil {
			return err
		}
		return o.run(cmd.Context())
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&o.name, "name", "", "Name of the PodCheckpoint. Default: the one that it had; of a kubelet's archive, made of Pod, container and digest.")
	flags.StringVar(&o.node, "node", "", "Node to bring it to. Default: one is chosen.")
	flags.StringVar(&o.pod, "pod", "", "Name of the Pod that it is of, where the archive does not say it.")
	flags.DurationVar(&o.patience, "retry-for", 2*time.Minute, "How long to go on trying while nothing moves.")
	flags.DurationVar(&o.timeout, "timeout", 10*time.Minute, "How long to wait for the node, once everything is there.")
	flags.BoolVar(&o.wait, "wait", true, "Wait until the node has checked and unpacked it.")
	o.dryRun = dryRunFlag(flags)
	o.output = newOutput(cmd, "created")
	completeFlag(cmd, "node", env.completeNodes())
	return cmd
}

func (o *importOptions) run(ctx context.Context) error {
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	progress.step("reading %s", o.file)
	file, err := openArchive(ctx, o.file, progress)
	if err != nil {
		return err
	}
	defer file.Close()
	checkpoint, err := o.object(file)
	if err != nil {
		return err
	}
	if *o.dryRun != dryRunClient {
		if checkpoint, err = o.create(ctx, checkpoint, progress); err != nil {
			return err
		}
	}
	if *o.dryRun != dryRunNone {
		progress.end()
		return o.output.print(o.Out, checkpoint, o.dryRun.suffix())
	}
	if err := o.send(ctx, file, checkpoint, progress); err != nil {
		return o.judged(ctx, err)
	}
	failure, err := o.follow(ctx, checkpoint, progress)
	if err != nil {
		return err
	}
	progress.end()
	if o.output.asked() || !o.wait {
		return errors.Join(o.output.print(o.Out, checkpoint, ""), failure)
	}
	if failure == nil {
		tellCheckpoint(o.Out, checkpoint)
	}
	return failure
}

// create makes the PodCheckpoint, or finds the one of an earlier run.
func (o *importOptions) create(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint, progress *progress) (*checkpointv1alpha1.PodCheckpoint, error) {
	made := checkpoint.DeepCopy()
	err := o.client.Create(ctx, made, o.dryRun.createOptions()...)
	if err == nil {
		if *o.dryRun == dryRunNone {
			progress.step("podcheckpoint %s created, for node %s", made.Name, or(made.Spec.NodeName, "(not chosen yet)"))
		}
		return made, nil
	}
	if !apierrors.IsAlreadyExists(err) || *o.dryRun != dryRunNone {
		return nil, explain(err)
	}
	before := &checkpointv1alpha1.PodCheckpoint{}
	if err := o.client.Get(ctx, client.ObjectKeyFromObject(checkpoint), before); err != nil {
		return nil, err
	}
	before.SetGroupVersionKind(checkpoint.GroupVersionKind())
	if before.DeletionTimestamp != nil || before.Spec.Import == nil || *before.Spec.Import != *checkpoint.Spec.Import {
		return nil, fmt.Errorf("podcheckpoint %s is there already, and is not an import of %s: choose another --name", before.Name, o.file)
	}
	if o.node != "" && before.Spec.NodeName != o.node {
		return nil, fmt.Errorf("podcheckpoint %s is an import of %s to node %s: choose another --name to bring it to %s", before.Name, o.file, before.Spec.NodeName, o.node)
	}
	progress.step("podcheckpoint %s is there already: going on with it", before.Name)
	return before, nil
}

// send brings the archive to its node.
func (o *importOptions) send(ctx context.Context, file *localArchive, checkpoint *checkpointv1alpha1.PodCheckpoint, progress *progress) error {
	to := &remoteImport{
		remoteArchive: &remoteArchive{calls: o.calls, namespace: checkpoint.Namespace, name: checkpoint.Name},
		size:          file.size,
		over:          func(ctx context.Context) (bool, error) { return o.arrived(ctx, checkpoint) },
	}
	if over, err := to.over(ctx); over || err != nil {
		return err
	}
	progress.step("sending %s to %s", o.file, or(checkpoint.Spec.NodeName, "its node"))
	// The node takes an object up a moment after it was made, and refuses a part that
	// does not go on from what it has: asking again helps with both.
	mayPass := func(err error) bool {
		var over *endedError
		return !errors.As(err, &over) && (transient(err) || apierrors.IsConflict(err))
	}
	return transfer.Upload(ctx, file.file, file.size, to, transferPolicy(o.environment, progress, o.patience, mayPass))
}

// arrived says whether the node has the whole archive. The error is why it is not
// taken any more; one that the object cannot be looked at is none.
func (o *importOptions) arrived(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) (bool, error) {
	now := &checkpointv1alpha1.PodCheckpoint{}
	err := o.client.Get(ctx, client.ObjectKeyFromObject(checkpoint), now)
	switch {
	case apierrors.IsNotFound(err) || err == nil && now.UID != checkpoint.UID:
		return false, &endedError{fmt.Errorf("podcheckpoint %s was deleted", checkpoint.Name)}
	case err != nil:
		return false, nil
	}
	done, failure := ended(now)
	if failure != nil {
		return false, &endedError{failure}
	}
	return done || readyCondition(now).Reason == checkpointv1alpha1.ReasonCheckpointInProgress, nil
}

// endedError is an outcome: trying again does not help.
type endedError struct{ error }

func (e *endedError) Unwrap() error { return e.error }

// follow waits until the node has made a checkpoint of the archive.
func (o *importOptions) follow(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint, progress *progress) (failure, err error) {
	if !o.wait {
		return nil, nil
	}
	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	progress.step("waiting for node %s to check and unpack it", checkpoint.Spec.NodeName)
	err = follow(waiting, o.client, client.ObjectKeyFromObject(checkpoint), checkpoint, &checkpointv1alpha1.PodCheckpointList{},
		func(now *checkpointv1alpha1.PodCheckpoint) (bool, error) {
			if condition := readyCondition(now); condition.Reason == checkpointv1alpha1.ReasonCheckpointInProgress && condition.Message != "" {
				progress.step("%s", condition.Message)
			}
			var done bool
			done, failure = ended(now)
			return done, nil
		})
	return failure, waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s goes on: kubectl checkpoint describe %s -n %s", checkpoint.Name, checkpoint.Name, checkpoint.Namespace))
}

// judged gives an error its exit code and says how to go on.
func (o *importOptions) judged(ctx context.Context, err error) error {
	const again = "; run the command again to go on"
	switch {
	case ctx.Err() != nil:
		return &exitError{ExitInterrupted, errors.New("interrupted" + again)}
	case errors.Is(err, transfer.ErrStalled):
		return &exitError{ExitInProgress, fmt.Errorf("%w%s", err, again)}
	}
	return err
}
