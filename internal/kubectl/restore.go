package kubectl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// restoreOptions is the command line of "kubectl restore".
type restoreOptions struct {
	genericiooptions.IOStreams
	output *output
	client client.WithWatch
	now    func() time.Time

	namespace  string
	checkpoint string
	as         string
	timeout    time.Duration
	wait       bool
	dryRun     dryRun
}

// NewRestoreCommand is "kubectl restore".
func NewRestoreCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return newRestoreCommand(&restoreOptions{IOStreams: streams, output: newOutput(), now: time.Now})
}

func newRestoreCommand(o *restoreOptions) *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true)
	// --as is the new Pod's name here. Impersonation has --as-user instead of
	// kubectl's --as; the other two keep their names.
	flags.Impersonate = nil
	var impersonate, dryRunValue string
	cmd := &cobra.Command{
		Use:   "kubectl-restore CHECKPOINT [--as POD] [--timeout DURATION] [flags]",
		Short: "Make a new Pod from a checkpoint",
		Long: `Make a new Pod from a PodCheckpoint: its processes continue where they were when
the checkpoint was taken. One checkpoint makes any number of Pods, also when the
Pod that it was taken of is gone.

The command waits until the checkpoint is ready, if it is still being taken,
creates the Pod and waits until that is ready. It needs the verb "restore" on the
PodCheckpoint, and "create" on Pods. When the node refuses to restore, the command
fails with the reason; the Pod stays Pending and the node tries again until the Pod
is deleted.

` + exitCodesHelp,
		Example: `  # Make a Pod from checkpoint web-x7k2p, named after it
  kubectl restore web-x7k2p

  # Under a name of your own
  kubectl restore web-x7k2p --as web-2

  # See the Pod that would be created
  kubectl restore web-x7k2p --dry-run=server -o yaml`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("one checkpoint must be named, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.checkpoint, err = resourceName(args[0], "podcheckpoint", "podcheckpoints", "pcp",
				"podcheckpoint."+checkpointv1alpha1.GroupName, "podcheckpoints."+checkpointv1alpha1.GroupName); err != nil {
				return err
			}
			if o.dryRun, err = parseDryRun(dryRunValue); err != nil {
				return err
			}
			if o.timeout <= 0 {
				return usagef("--timeout %s: must be more than 0", o.timeout)
			}
			if err := o.output.validate(); err != nil {
				return err
			}
			if o.client == nil {
				if impersonate != "" {
					flags.Impersonate = &impersonate
				}
				if o.client, o.namespace, err = connect(flags); err != nil {
					return err
				}
			}
			return o.run(cmd.Context())
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return completeNames(cmd.Context(), flags, &checkpointv1alpha1.PodCheckpointList{}, prefix)
		},
	}
	commandLine(cmd)
	cmd.Flags().StringVar(&o.as, "as", "", "Name of the new Pod. Default: the checkpoint's name and a random suffix.")
	cmd.Flags().StringVar(&impersonate, "as-user", "", "Username to impersonate for the operation (kubectl's --as).")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 2*time.Minute, "How long to wait.")
	cmd.Flags().BoolVar(&o.wait, "wait", true, "Wait until the Pod is ready, or its restore is refused.")
	cmd.Flags().StringVar(&dryRunValue, "dry-run", string(dryRunNone), `"none", "server" (send it, but have nothing stored) or "client" (send nothing).`)
	o.output.flags.AddFlags(cmd)
	flags.AddFlags(cmd.Flags())
	return cmd
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
	pod, err := restoredPod(checkpoint, o.as)
	if err != nil {
		return err
	}
	created := o.now()
	if o.dryRun != dryRunClient {
		if err := o.client.Create(ctx, pod, o.dryRun.createOptions()...); err != nil {
			return err
		}
	}
	if o.dryRun != dryRunNone || !o.wait {
		progress.end()
		return o.output.print(o.Out, pod, o.dryRun.suffix())
	}
	progress.step("pod %s created from podcheckpoint %s", pod.Name, checkpoint.Name)
	failure, err := o.follow(ctx, waiting, progress, pod)
	if err != nil {
		return err
	}
	took := o.now().Sub(created)
	progress.end()
	if o.output.asked() {
		if err := o.output.print(o.Out, pod, ""); err != nil {
			return err
		}
	} else if failure == nil {
		o.describe(pod, checkpoint, took)
	}
	return failure
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
			if !o.wait || o.dryRun != dryRunNone {
				return true, fmt.Errorf("podcheckpoint %s is not ready: %s", now.Name, readyCondition(now).Reason)
			}
			progress.step("waiting for podcheckpoint %s: %s", now.Name, readyCondition(now).Reason)
			return false, nil
		})
	return checkpoint, waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s is not ready, no pod was created", o.checkpoint))
}

// refusals are the reasons of events by which the node says that this restore
// will not succeed unless something is changed. Reasons that pass by themselves
// are not among them.
var refusals = []string{
	checkpointv1alpha1.EventCheckpointWrongNode,
	checkpointv1alpha1.EventPodSpecMismatch,
	checkpointv1alpha1.EventCheckpointDataMissing,
	checkpointv1alpha1.EventCheckpointDataCorrupt,
	checkpointv1alpha1.EventRestoreFailed,
}

// follow waits until pod is ready and fills it in. failure is the refusal or the
// Pod's end; err is why neither is known.
func (o *restoreOptions) follow(ctx, waiting context.Context, progress *progress, pod *corev1.Pod) (failure, err error) {
	uid := pod.UID
	seen := map[string]bool{}
	err = follow(waiting, o.client, client.ObjectKeyFromObject(pod), pod, &corev1.PodList{}, func(now *corev1.Pod) (bool, error) {
		if now.UID != uid {
			return true, fmt.Errorf("pod %s was deleted and created anew by someone else", now.Name)
		}
		done, err := podEnded(now)
		if done || err != nil {
			failure = err
			return true, nil
		}
		reason, message := o.news(waiting, now, seen, progress)
		if slices.Contains(refusals, reason) {
			failure = fmt.Errorf("pod %s is not restored: %s: %s\nIt stays Pending and the node tries again; to give up: kubectl delete pod %s -n %s",
				now.Name, reason, message, now.Name, now.Namespace)
			return true, nil
		}
		showPod(progress, now)
		return false, nil
	})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("pod %s was deleted before it was ready", pod.Name)
	}
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		if _, message := o.news(ctx, pod, map[string]bool{}, nil); message != "" {
			err = fmt.Errorf("%s: %w", message, err)
		}
	}
	return failure, waitEnded(ctx, err, fmt.Sprintf("pod %s is not ready yet: kubectl describe pod %s -n %s", pod.Name, pod.Name, pod.Namespace))
}

// podEnded says whether there is nothing more to wait for.
func podEnded(pod *corev1.Pod) (bool, error) {
	switch pod.Status.Phase {
	case corev1.PodSucceeded:
		return true, nil
	case corev1.PodFailed:
		return true, fmt.Errorf("pod %s has failed: %s %s", pod.Name, pod.Status.Reason, pod.Status.Message)
	}
	for _, status := range pod.Status.ContainerStatuses {
		if status.RestartCount > 0 {
			return true, fmt.Errorf("pod %s did not continue from its checkpoint: container %s has been started anew %d times%s",
				pod.Name, status.Name, status.RestartCount, lastEnd(status))
		}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
			return true, nil
		}
	}
	return false, nil
}

func lastEnd(status corev1.ContainerStatus) string {
	if end := status.LastTerminationState.Terminated; end != nil {
		return fmt.Sprintf(", last exit code %d (%s)", end.ExitCode, end.Reason)
	}
	return ""
}

// showPod says how far the Pod has come.
func showPod(progress *progress, pod *corev1.Pod) {
	switch {
	case len(pod.Spec.SchedulingGates) > 0:
		progress.step("pod %s is held back: %s", pod.Name, pod.Spec.SchedulingGates[0].Name)
	case pod.Spec.NodeName == "":
		progress.step("pod %s is waiting for the scheduler", pod.Name)
	case pod.Status.Phase == corev1.PodPending:
		progress.step("restoring on %s", pod.Spec.NodeName)
	default:
		progress.step("running on %s, not ready yet", pod.Spec.NodeName)
	}
}

// news shows the events of pod that are not in seen and returns the reason and
// message of a refusal among them, else those of the last warning. Users who may
// not read events do without.
func (o *restoreOptions) news(ctx context.Context, pod *corev1.Pod, seen map[string]bool, progress *progress) (reason, message string) {
	var events corev1.EventList
	err := o.client.List(ctx, &events, client.InNamespace(pod.Namespace),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("involvedObject.uid", string(pod.UID))})
	if err != nil {
		return "", ""
	}
	for _, event := range events.Items {
		key := event.Reason + "\n" + event.Message
		if seen[key] || event.InvolvedObject.UID != types.UID(pod.UID) {
			continue
		}
		seen[key] = true
		if event.Type != corev1.EventTypeWarning {
			continue
		}
		if !slices.Contains(refusals, reason) {
			reason, message = event.Reason, event.Message
		}
		if progress != nil {
			progress.step("%s: %s", event.Reason, strings.TrimSpace(event.Message))
		}
	}
	return reason, message
}

func (o *restoreOptions) describe(pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint, took time.Duration) {
	containers := make([]string, 0, len(pod.Spec.Containers))
	for _, container := range pod.Spec.Containers {
		containers = append(containers, container.Name)
	}
	state := "ready"
	if pod.Status.Phase == corev1.PodSucceeded {
		state = "completed"
	}
	fmt.Fprintf(o.Out, "pod/%s %s\n", pod.Name, state)
	facts(o.Out,
		"Checkpoint", checkpoint.Name+" of pod "+checkpoint.Spec.SourcePodName,
		"Containers", strings.Join(containers, ", "),
		"Node", pod.Spec.NodeName,
		"Address", pod.Status.PodIP,
		"Restored in", short(took),
	)
}
