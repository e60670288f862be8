package kubectl

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// reportGrace is how long the command waits after the operation's own timeout,
// so that the outcome, also that of a timeout, can still be reported.
const reportGrace = 15 * time.Second

// defaultTimeout is the operation's timeout where none is asked for, as the API
// documents it.
const defaultTimeout = 120 * time.Second

// checkpointOptions is the command line of "kubectl checkpoint".
type checkpointOptions struct {
	genericiooptions.IOStreams
	output *output
	client client.WithWatch
	now    func() time.Time
	grace  time.Duration

	namespace  string
	pod        string
	containers []string
	name       string
	timeout    time.Duration
	options    []string
	wait       bool
	dryRun     dryRun
}

// NewCheckpointCommand is "kubectl checkpoint".
func NewCheckpointCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return newCheckpointCommand(&checkpointOptions{IOStreams: streams, output: newOutput(), now: time.Now, grace: reportGrace})
}

func newCheckpointCommand(o *checkpointOptions) *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true)
	var dryRunValue string
	cmd := &cobra.Command{
		Use:   "kubectl-checkpoint POD [-c CONTAINER]... [--name NAME] [--timeout DURATION] [--option KEY=VALUE]... [flags]",
		Short: "Take a checkpoint of a running Pod",
		Long: `Take a checkpoint of a running Pod: its containers' processes with their memory,
open files and writable layers. The Pod stands still for a moment and runs on.

The command creates a PodCheckpoint and waits until it is ready. "kubectl restore"
makes new Pods from it, as often as wanted, also when the Pod itself is gone.

` + exitCodesHelp,
		Example: `  # Take a checkpoint of Pod web
  kubectl checkpoint web

  # Under a name of your own, giving up after 30 seconds
  kubectl checkpoint web --name web-before-upgrade --timeout 30s

  # Only one container, for forensics: such a checkpoint cannot be restored
  kubectl checkpoint web -c app

  # Ask and go on; look later
  kubectl checkpoint web --wait=false -o name`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("one Pod must be named, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.pod, err = resourceName(args[0], "pod", "pods", "po"); err != nil {
				return err
			}
			if o.dryRun, err = parseDryRun(dryRunValue); err != nil {
				return err
			}
			if err := o.validate(); err != nil {
				return err
			}
			if o.client == nil {
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
			return completeNames(cmd.Context(), flags, &corev1.PodList{}, prefix)
		},
	}
	commandLine(cmd)
	cmd.Flags().StringArrayVarP(&o.containers, "container", "c", nil, "Container to checkpoint, instead of all. May be repeated.")
	cmd.Flags().StringVar(&o.name, "name", "", "Name of the PodCheckpoint. Default: the Pod's name and a random suffix.")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 0, "How long the operation may take, in whole seconds. Default: 2m.")
	cmd.Flags().StringArrayVar(&o.options, "option", nil, "Option for the engine, as KEY=VALUE. May be repeated. An option that the engine does not know fails the checkpoint.")
	cmd.Flags().BoolVar(&o.wait, "wait", true, "Wait until the checkpoint is ready or has failed.")
	cmd.Flags().StringVar(&dryRunValue, "dry-run", string(dryRunNone), `"none", "server" (send it, but have nothing stored) or "client" (send nothing).`)
	o.output.flags.AddFlags(cmd)
	flags.AddFlags(cmd.Flags())
	return cmd
}

func (o *checkpointOptions) validate() error {
	if o.timeout < 0 || o.timeout%time.Second != 0 || o.timeout > time.Hour {
		return usagef("--timeout %s: must be whole seconds, at most 1h", o.timeout)
	}
	if _, err := parseOptions(o.options); err != nil {
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

// object builds the PodCheckpoint to create for pod.
func (o *checkpointOptions) object(pod *corev1.Pod) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	checkpoint.SetGroupVersionKind(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"))
	checkpoint.Namespace = o.namespace
	checkpoint.Name = o.name
	if o.name == "" {
		checkpoint.GenerateName = pod.Name + "-"
	}
	checkpoint.Spec.SourcePodName = pod.Name
	// The Pod that the user means is the one that exists now.
	uid := pod.UID
	checkpoint.Spec.SourcePodUID = &uid
	if o.timeout > 0 {
		seconds := int32(min(o.timeout/time.Second, math.MaxInt32))
		checkpoint.Spec.TimeoutSeconds = &seconds
	}
	var known []string
	for _, container := range pod.Spec.InitContainers {
		if container.RestartPolicy != nil && *container.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			known = append(known, container.Name)
		}
	}
	for _, container := range pod.Spec.Containers {
		known = append(known, container.Name)
	}
	for _, name := range o.containers {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("pod %s has no container %q that can be checkpointed: it has %s", pod.Name, name, strings.Join(known, ", "))
		}
		if !slices.Contains(checkpoint.Spec.Containers, name) {
			checkpoint.Spec.Containers = append(checkpoint.Spec.Containers, name)
		}
	}
	var err error
	checkpoint.Spec.Options, err = parseOptions(o.options)
	return checkpoint, err
}

func (o *checkpointOptions) run(ctx context.Context) error {
	var pod corev1.Pod
	if err := o.client.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: o.pod}, &pod); err != nil {
		return err
	}
	checkpoint, err := o.object(&pod)
	if err != nil {
		return err
	}
	if o.dryRun != dryRunClient {
		if err := o.client.Create(ctx, checkpoint, o.dryRun.createOptions()...); err != nil {
			return explain(err)
		}
	}
	if o.dryRun != dryRunNone || !o.wait {
		return o.output.print(o.Out, checkpoint, o.dryRun.suffix())
	}
	failure, err := o.follow(ctx, checkpoint)
	if err != nil {
		return err
	}
	if o.output.asked() {
		if err := o.output.print(o.Out, checkpoint, ""); err != nil {
			return err
		}
	} else if failure == nil {
		describeCheckpoint(o.Out, checkpoint)
	}
	return failure
}

// follow waits until checkpoint has ended and fills it in. failure is what it
// ended with; err is why that is not known.
func (o *checkpointOptions) follow(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) (failure, err error) {
	limit := o.timeout
	if limit == 0 {
		limit = defaultTimeout
	}
	waiting, cancel := context.WithTimeout(ctx, limit+o.grace)
	defer cancel()
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	progress.step("podcheckpoint %s created for pod %s", checkpoint.Name, o.pod)
	err = follow(waiting, o.client, client.ObjectKeyFromObject(checkpoint), checkpoint, &checkpointv1alpha1.PodCheckpointList{},
		func(now *checkpointv1alpha1.PodCheckpoint) (bool, error) {
			showCheckpoint(progress, now)
			var done bool
			done, failure = ended(now)
			return done, nil
		})
	return failure, waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s goes on: kubectl get podcheckpoint %s -n %s -w", checkpoint.Name, checkpoint.Name, checkpoint.Namespace))
}

// showCheckpoint turns the Ready condition into a step.
func showCheckpoint(progress *progress, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	condition := readyCondition(checkpoint)
	node := checkpoint.Status.NodeName
	if node == "" {
		node = checkpoint.Spec.NodeName
	}
	switch condition.Reason {
	case checkpointv1alpha1.ReasonPending:
		if node != "" {
			progress.step("waiting for the agent of %s", node)
		}
	case checkpointv1alpha1.ReasonCheckpointInProgress:
		progress.step("checkpoint in progress on %s", node)
	case checkpointv1alpha1.ReasonCheckpointCompleted:
		progress.step("checkpoint completed")
	default:
		progress.step("%s", condition.Reason)
	}
}

// describeCheckpoint prints what a person wants to know of a ready checkpoint.
func describeCheckpoint(out io.Writer, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	status := &checkpoint.Status
	var frozen, took, bytes, engine string
	if status.FreezeDuration != nil {
		frozen = short(status.FreezeDuration.Duration)
	}
	if status.StartTime != nil && status.CompletionTime != nil {
		took = phases(status.Phases)
	}
	if status.Size != nil {
		bytes = fmt.Sprintf("%s (%d bytes)", size(status.Size.LogicalBytes), status.Size.LogicalBytes)
	}
	if status.Engine != nil {
		engine = status.Engine.Name + " " + status.Engine.Version
	}
	containers := make([]string, 0, len(status.CheckpointedContainers))
	for _, container := range slices.Concat(status.CheckpointedInitContainers, status.CheckpointedContainers) {
		containers = append(containers, container.Name)
	}
	fmt.Fprintf(out, "podcheckpoint/%s ready\n", checkpoint.Name)
	facts(out,
		"Pod", checkpoint.Spec.SourcePodName,
		"Containers", strings.Join(containers, ", "),
		"Node", status.NodeName,
		"Location", location(status.CheckpointLocation),
		"Size", bytes,
		"Frozen", frozen,
		"Phases", took,
		"Engine", engine,
	)
	if len(checkpoint.Spec.Containers) == 0 {
		fmt.Fprintf(out, "Restore it with: kubectl restore %s -n %s\n", checkpoint.Name, checkpoint.Namespace)
	}
}

func location(source *checkpointv1alpha1.CheckpointSource) string {
	switch {
	case source == nil:
		return ""
	case source.NodeLocal != nil:
		return string(source.Type) + " " + source.NodeLocal.Path
	}
	return string(source.Type)
}

func phases(timings []checkpointv1alpha1.PhaseTiming) string {
	parts := make([]string, 0, len(timings))
	for _, timing := range timings {
		parts = append(parts, timing.Name+" "+short(timing.Duration.Duration))
	}
	return strings.Join(parts, ", ")
}

// completeNames offers the names of the objects of list's type.
func completeNames(ctx context.Context, flags *genericclioptions.ConfigFlags, list client.ObjectList, prefix string) ([]string, cobra.ShellCompDirective) {
	c, namespace, err := connect(flags)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := c.List(ctx, list, client.InNamespace(namespace)); err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	add := func(object metav1.Object) {
		if strings.HasPrefix(object.GetName(), prefix) {
			names = append(names, object.GetName())
		}
	}
	switch list := list.(type) {
	case *corev1.PodList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	case *checkpointv1alpha1.PodCheckpointList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
