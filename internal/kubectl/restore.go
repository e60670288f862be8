package kubectl

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// maxReplicas bounds --replicas: more than a person means to.
const maxReplicas = 1000

// restoreOptions is the command line of "kubectl restore".
type restoreOptions struct {
	*environment
	output *output

	checkpoint string
	as         string
	node       string
	replicas   int
	timeout    time.Duration
	wait       bool
	dryRun     *dryRun
}

// NewRestoreCommand is "kubectl restore".
func NewRestoreCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return newRestoreCommand(newEnvironment(streams))
}

func newRestoreCommand(env *environment) *cobra.Command {
	o := &restoreOptions{environment: env}
	// --as is the new Pod's name here. Impersonation has --as-user instead of
	// kubectl's --as; the others keep their names.
	env.flags.Impersonate = nil
	var impersonate string
	cmd := &cobra.Command{
		Use:   "kubectl-restore CHECKPOINT [--as POD] [--replicas N] [--node NODE] [--timeout DURATION]",
		Short: "Make a new Pod from a checkpoint",
		Long: `Make a new Pod from a PodCheckpoint: its processes continue where they were when
the checkpoint was taken. One checkpoint makes any number of Pods, also when the
Pod that it was taken of is gone.

The command waits until the checkpoint is ready, if it is still being taken,
creates the Pod and waits until that is ready. It needs the verb "restore" on the
PodCheckpoint, and "create" on Pods. When the node refuses to restore, the command
fails with the reason; the Pod stays Pending and the node tries again until the Pod
is deleted.

With --replicas N it makes N Pods: POD-1 to POD-N, or, without --as, the next N
names that are free of CHECKPOINT-1, CHECKPOINT-2 and so on. It waits for all and
tells of each; it fails if one of them does.

` + exitCodesHelp,
		Example: `  # Make a Pod from checkpoint web-x7k2p, named after it
  kubectl restore web-x7k2p

  # Under a name of your own
  kubectl restore web-x7k2p --as web-2

  # Three warm copies: fast-1, fast-2 and fast-3
  kubectl restore web-x7k2p --as fast --replicas 3

  # See the Pod that would be created
  kubectl restore web-x7k2p --dry-run=server -o yaml`,
		Args:              exactly(1, "one checkpoint"),
		ValidArgsFunction: env.completeCheckpoints(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := o.complete(args[0]); err != nil {
			return err
		}
		if impersonate != "" {
			o.flags.Impersonate = &impersonate
		}
		if err := o.connect(); err != nil {
			return err
		}
		return o.run(cmd.Context())
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&o.as, "as", "", "Name of the new Pod. Default: the checkpoint's name and a random suffix.")
	flags.IntVar(&o.replicas, "replicas", 1, "How many Pods to make.")
	flags.StringVar(&o.node, "node", "", "Node to restore on. It must be one that can.")
	flags.DurationVar(&o.timeout, "timeout", 2*time.Minute, "How long to wait.")
	flags.BoolVar(&o.wait, "wait", true, "Wait until the Pod is ready, or its restore is refused.")
	flags.StringVar(&impersonate, "as-user", "", "Username to impersonate for the operation (kubectl's --as).")
	o.dryRun = dryRunFlag(flags)
	o.output = newOutput(cmd, "created")
	completeFlag(cmd, "node", env.completeNodes())
	return program(cmd, env)
}

// complete checks the command line; nothing is sent.
func (o *restoreOptions) complete(arg string) (err error) {
	if o.checkpoint, err = resourceName(arg, checkpointTypes()); err != nil {
		return err
	}
	if o.timeout <= 0 {
		return usagef("--timeout %s: must be more than 0", o.timeout)
	}
	if o.replicas < 1 || o.replicas > maxReplicas {
		return usagef("--replicas %d: must be 1 to %d", o.replicas, maxReplicas)
	}
	return o.output.validate()
}

func (o *restoreOptions) run(ctx context.Context) error {
	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()

	checkpoint, err := o.ready(ctx, waiting, progress)
	if err != nil {
		return err
	}
	if err := canRunOn(checkpoint, o.node); err != nil {
		return err
	}
	pods, err := o.create(ctx, checkpoint)
	if *o.dryRun != dryRunNone || !o.wait {
		progress.end()
		return errors.Join(o.print(pods, o.dryRun.suffix()), err)
	}
	for _, pod := range pods {
		progress.step("pod %s created from podcheckpoint %s", pod.Name, checkpoint.Name)
	}
	outcomes := o.followAll(ctx, waiting, progress, pods)
	progress.end()
	if o.output.asked() {
		err = errors.Join(err, o.print(pods, ""))
	} else {
		o.tell(checkpoint, outcomes)
	}
	return joined(append(failures(outcomes), err))
}

// joined is the one error of several: its exit code is that of a failure, if there
// is one, else that of what is not over.
func joined(errs []error) error {
	err := errors.Join(errs...)
	if err == nil {
		return nil
	}
	code := ExitOK
	for _, err := range errs {
		switch c := ExitCode(err); {
		case c == ExitFailed, code == ExitOK:
			code = c
		}
	}
	return &exitError{code, err}
}

// ready waits until the checkpoint can be restored. Where the user does not want
// to wait it must be ready now.
func (o *restoreOptions) ready(ctx, waiting context.Context, progress *progress) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	key := client.ObjectKey{Namespace: o.namespace, Name: o.checkpoint}
	err := follow(waiting, o.client, key, checkpoint, &checkpointv1alpha1.PodCheckpointList{},
		func(now *checkpointv1alpha1.PodCheckpoint) (bool, error) {
			done, failure := ended(now)
			if done || failure != nil {
				return done, failure
			}
			if !o.wait || *o.dryRun != dryRunNone {
				return true, fmt.Errorf("podcheckpoint %s is not ready: %s", now.Name, readyCondition(now).Reason)
			}
			progress.step("waiting for podcheckpoint %s: %s", now.Name, readyCondition(now).Reason)
			return false, nil
		})
	return checkpoint, waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s is not ready, no pod was created", o.checkpoint))
}

// print writes what was made in the form asked for: one Pod as itself, several as a List.
func (o *restoreOptions) print(pods []*corev1.Pod, suffix string) error {
	if len(pods) == 1 {
		return o.output.print(o.Out, pods[0], suffix)
	}
	list := &corev1.PodList{}
	var objects []runtime.Object
	for _, pod := range pods {
		pod.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
		list.Items = append(list.Items, *pod)
		objects = append(objects, pod)
	}
	return o.output.printAll(o.Out, list, objects, suffix)
}

// tell prints what a person wants to know of the Pods that are ready.
func (o *restoreOptions) tell(checkpoint *checkpointv1alpha1.PodCheckpoint, outcomes []outcome) {
	for _, made := range outcomes {
		pod := made.pod
		if made.err != nil {
			continue
		}
		state := "ready"
		if pod.Status.Phase == corev1.PodSucceeded {
			state = "completed"
		}
		if len(outcomes) > 1 {
			fmt.Fprintf(o.Out, "pod/%s %s on %s in %s, address %s\n", pod.Name, state, pod.Spec.NodeName, short(made.took), or(pod.Status.PodIP, "none"))
			continue
		}
		containers := make([]string, 0, len(pod.Spec.Containers))
		for _, container := range pod.Spec.Containers {
			containers = append(containers, container.Name)
		}
		fmt.Fprintf(o.Out, "pod/%s %s\n", pod.Name, state)
		facts(o.Out,
			"Checkpoint", checkpoint.Name+" of pod "+checkpoint.Spec.SourcePodName,
			"Containers", strings.Join(containers, ", "),
			"Node", pod.Spec.NodeName,
			"Address", pod.Status.PodIP,
			"Restored in", short(made.took),
		)
	}
}
