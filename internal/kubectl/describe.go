package kubectl

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func newDescribeCommand(env *environment) *cobra.Command {
	o := &describeOptions{environment: env}
	return &cobra.Command{
		Use:   "describe NAME...",
		Short: "Tell the story of a checkpoint",
		Long: `Tell the story of a checkpoint: what it is of, how long each phase took, what became
of it, which Pods were restored from it, and its events.`,
		Example: `  # Why did it fail? Where is it? Who was restored from it?
  kubectl checkpoint describe web-x7k2p`,
		Args:              atLeastOne("checkpoint"),
		ValidArgsFunction: env.completeCheckpoints(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := checkpointNames(args)
			if err != nil {
				return err
			}
			if err := o.connect(); err != nil {
				return err
			}
			return o.run(cmd.Context(), names)
		},
	}
}

// describeOptions is the command line of "kubectl checkpoint describe".
type describeOptions struct{ *environment }

func (o *describeOptions) run(ctx context.Context, names []string) error {
	var errs []error
	for i, name := range names {
		checkpoint := &checkpointv1alpha1.PodCheckpoint{}
		if err := o.client.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: name}, checkpoint); err != nil {
			errs = append(errs, explain(err))
			continue
		}
		if i > 0 {
			fmt.Fprint(o.Out, "\n\n")
		}
		if err := o.one(ctx, checkpoint); err != nil {
			return err
		}
	}
	return joined(errs)
}

func (o *describeOptions) one(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint) error {
	ready := readyCondition(c)
	header := [][]string{
		{"Name:", c.Name},
		{"Namespace:", c.Namespace},
		{"UID:", string(c.UID)},
		{"Labels:", joinMap(c.Labels)},
		{"Annotations:", joinMap(c.Annotations)},
		{"Created:", moment(c.CreationTimestamp, o.now())},
		{"Source Pod:", c.Spec.SourcePodName + uidOf(c)},
		{"Selected:", or(strings.Join(c.Spec.Containers, ", "), "all containers")},
		{"Options:", joinMap(c.Spec.Options)},
		{"Imported:", imported(c.Spec.Import)},
		{"Timeout:", timeoutOf(c)},
		{"Ready:", string(ready.Status) + " (" + ready.Reason + ")"},
		{"Message:", clean(ready.Message)},
		{"Started:", optionalMoment(c.Status.StartTime, o.now())},
		{"Completed:", optionalMoment(c.Status.CompletionTime, o.now())},
		{"Node:", or(c.Status.NodeName, c.Spec.NodeName)},
		{"Location:", location(c.Status.CheckpointLocation)},
		{"Store:", storedIn(c)},
		{"Digest:", c.Status.ManifestDigest},
		{"Size:", sizeOf(c.Status.Size)},
		{"Frozen:", frozenFor(c)},
		{"Retried:", frozenEarlier(c)},
		{"Capture:", captureOf(c.Status.Capture)},
		{"Engine:", engineOf(c.Status.Engine)},
		{"Platform:", clean(c.Status.Platform)},
	}
	if c.DeletionTimestamp != nil {
		header = append(header, []string{"Deleting:", whatHolds(c) + ", since " + moment(*c.DeletionTimestamp, o.now())})
	}
	header = slices.DeleteFunc(header, func(row []string) bool { return row[1] == "" })
	if err := table(o.Out, "", header); err != nil {
		return err
	}
	for _, part := range []func(context.Context, io.Writer, *checkpointv1alpha1.PodCheckpoint) error{o.containers, o.warnings, o.phases, o.restored, o.events} {
		if err := part(ctx, o.Out, c); err != nil {
			return err
		}
	}
	return nil
}

func (o *describeOptions) containers(_ context.Context, out io.Writer, c *checkpointv1alpha1.PodCheckpoint) error {
	var rows [][]string
	for _, container := range c.Status.CheckpointedInitContainers {
		rows = append(rows, []string{container.Name, "init", clean(container.Image)})
	}
	for _, container := range c.Status.CheckpointedContainers {
		rows = append(rows, []string{container.Name, "", clean(container.Image)})
	}
	return section(out, "Containers", rows)
}

// warnings shows what will not come back as it was.
func (o *describeOptions) warnings(_ context.Context, out io.Writer, c *checkpointv1alpha1.PodCheckpoint) error {
	var rows [][]string
	for _, w := range c.Status.Warnings {
		rows = append(rows, []string{clean(w)})
	}
	return section(out, "Warnings", rows)
}

// phases shows how long each phase took, with a bar in proportion.
func (o *describeOptions) phases(_ context.Context, out io.Writer, c *checkpointv1alpha1.PodCheckpoint) error {
	var longest time.Duration
	for _, phase := range c.Status.Phases {
		longest = max(longest, phase.Duration.Duration)
	}
	var rows [][]string
	for _, phase := range c.Status.Phases {
		bar := ""
		if longest > 0 {
			bar = strings.Repeat("=", int(max(0, phase.Duration.Duration)*40/longest))
		}
		rows = append(rows, []string{clean(phase.Name), short(phase.Duration.Duration), bar})
	}
	return section(out, "Phases", rows)
}

// restored shows the Pods that were restored from this checkpoint.
func (o *describeOptions) restored(ctx context.Context, out io.Writer, c *checkpointv1alpha1.PodCheckpoint) error {
	var rows [][]string
	for more := ""; ; {
		var pods corev1.PodList
		if err := o.client.List(ctx, &pods, client.InNamespace(c.Namespace), client.Limit(pageSize), client.Continue(more)); err != nil {
			return section(out, "Restored Pods", [][]string{{"unknown: " + clean(err.Error())}})
		}
		for i := range pods.Items {
			pod := &pods.Items[i]
			if pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] != c.Name {
				continue
			}
			if uid := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]; uid != "" && uid != string(c.UID) {
				continue // of an earlier one by the same name
			}
			state := string(pod.Status.Phase)
			if podReady(pod) {
				state = "Ready"
			}
			rows = append(rows, []string{pod.Name, state, or(pod.Spec.NodeName, "<none>"), age(o.now(), pod.CreationTimestamp)})
		}
		if more = pods.Continue; more == "" {
			break
		}
	}
	if len(rows) == 0 {
		rows = [][]string{{"none"}}
	}
	return section(out, "Restored Pods", rows)
}

// maxEvents bounds how many events are shown, the last ones.
const maxEvents = 50

func (o *describeOptions) events(ctx context.Context, out io.Writer, c *checkpointv1alpha1.PodCheckpoint) error {
	var list corev1.EventList
	err := o.client.List(ctx, &list, client.InNamespace(c.Namespace), client.Limit(pageSize),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("involvedObject.uid", string(c.UID))})
	if err != nil {
		return section(out, "Events", [][]string{{"unknown: " + clean(err.Error())}})
	}
	sort.SliceStable(list.Items, func(i, j int) bool { return eventTime(&list.Items[i]).Before(eventTime(&list.Items[j])) })
	if len(list.Items) > maxEvents {
		list.Items = list.Items[len(list.Items)-maxEvents:]
	}
	var rows [][]string
	for i := range list.Items {
		event := &list.Items[i]
		if event.InvolvedObject.UID != c.UID {
			continue
		}
		rows = append(rows, []string{event.Type, event.Reason, age(o.now(), metav1.NewTime(eventTime(event))), clean(strings.TrimSpace(event.Message))})
	}
	if len(rows) == 0 {
		rows = [][]string{{"none (the cluster keeps them for a while only)"}}
	}
	return section(out, "Events", rows)
}

// eventTime is when an event last happened: which field says so depends on who
// wrote it.
func eventTime(event *corev1.Event) time.Time {
	switch {
	case event.Series != nil && !event.Series.LastObservedTime.IsZero():
		return event.Series.LastObservedTime.Time
	case !event.LastTimestamp.IsZero():
		return event.LastTimestamp.Time
	case !event.EventTime.IsZero():
		return event.EventTime.Time
	}
	return event.CreationTimestamp.Time
}

// section prints a titled table; nothing where there are no rows.
func section(out io.Writer, title string, rows [][]string) error {
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintf(out, "%s:\n", title)
	return table(out, "  ", rows)
}

// timeoutOf is how long taking it may take; an import has its own time.
func timeoutOf(c *checkpointv1alpha1.PodCheckpoint) string {
	if c.Spec.Import != nil {
		return ""
	}
	return c.Timeout().String()
}

// imported says which archive a checkpoint was brought in from.
func imported(from *checkpointv1alpha1.CheckpointImport) string {
	if from == nil {
		return ""
	}
	return fmt.Sprintf("%s, %s", size(from.SizeBytes), from.Digest)
}

func uidOf(c *checkpointv1alpha1.PodCheckpoint) string {
	switch {
	case c.Status.SourcePodUID != nil:
		return " (UID " + string(*c.Status.SourcePodUID) + ")"
	case c.Spec.SourcePodUID != nil:
		return " (UID " + string(*c.Spec.SourcePodUID) + ")"
	}
	return ""
}

func joinMap(m map[string]string) string {
	parts := make([]string, 0, len(m))
	for key, value := range m {
		if key == corev1.LastAppliedConfigAnnotation {
			continue
		}
		parts = append(parts, clean(key+"="+value))
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

func moment(at metav1.Time, now time.Time) string {
	if at.IsZero() {
		return ""
	}
	return at.UTC().Format(time.RFC3339) + " (" + age(now, at) + " ago)"
}

func optionalMoment(at *metav1.Time, now time.Time) string {
	if at == nil {
		return ""
	}
	return moment(*at, now)
}
