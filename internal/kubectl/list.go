package kubectl

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/controller-runtime/pkg/client"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/printers"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// pageSize is how many objects are asked for at a time, as kubectl does.
const pageSize = 500

// listOptions is the command line of "kubectl checkpoint list".
type listOptions struct {
	*environment
	output    *output
	all       bool
	pod       string
	selector  string
	noHeaders bool
}

func newListCommand(env *environment) *cobra.Command {
	o := &listOptions{environment: env}
	cmd := &cobra.Command{
		Use:     "list [-A] [--pod POD] [-l SELECTOR]",
		Aliases: []string{"ls"},
		Short:   "List checkpoints",
		Long: `List PodCheckpoints: what they are of, where their data are, how large they are and
how long their Pods stood still.`,
		Example: `  # The checkpoints of this namespace
  kubectl checkpoint list

  # Those of one Pod, with engine and location
  kubectl checkpoint list --pod web -o wide

  # All, as names
  kubectl checkpoint list -A -o name`,
		Args:              none,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			wide := *o.output.flags.OutputFormat == "wide"
			if !wide {
				if err := o.output.validate(); err != nil {
					return err
				}
			}
			options, err := o.selection()
			if err != nil {
				return err
			}
			if err := o.connect(); err != nil {
				return err
			}
			return o.run(cmd.Context(), wide, options)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.BoolVarP(&o.all, "all-namespaces", "A", false, "List those of all namespaces.")
	flags.StringVar(&o.pod, "pod", "", "Only those of this Pod.")
	flags.StringVarP(&o.selector, "selector", "l", "", "Only those with these labels, such as app=web.")
	flags.BoolVar(&o.noHeaders, "no-headers", false, "No line with the columns' names.")
	o.output = newOutput(cmd, "")
	flags.Lookup("output").Usage = strings.Replace(flags.Lookup("output").Usage, "(json", "(wide, json", 1)
	completeFlag(cmd, "pod", env.completePods())
	return cmd
}

func (o *listOptions) selection() ([]client.ListOption, error) {
	var options []client.ListOption
	if o.pod != "" {
		name, err := resourceName(o.pod, podTypes())
		if err != nil {
			return nil, err
		}
		options = append(options, client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("spec.sourcePodName", name)})
	}
	if o.selector != "" {
		selector, err := labels.Parse(o.selector)
		if err != nil {
			return nil, usagef("--selector: %v", err)
		}
		options = append(options, client.MatchingLabelsSelector{Selector: selector})
	}
	return options, nil
}

func (o *listOptions) run(ctx context.Context, wide bool, options []client.ListOption) error {
	if !o.all {
		options = append(options, client.InNamespace(o.namespace))
	}
	list, err := o.read(ctx, options)
	if err != nil {
		return err
	}
	if o.output.asked() && !wide {
		var objects []runtime.Object
		for i := range list.Items {
			objects = append(objects, &list.Items[i])
		}
		return o.output.printAll(o.Out, list, objects, "")
	}
	if len(list.Items) == 0 {
		if o.all {
			fmt.Fprintln(o.ErrOut, "No checkpoints found.")
		} else {
			fmt.Fprintf(o.ErrOut, "No checkpoints found in namespace %s.\n", o.namespace)
		}
		return nil
	}
	printer := printers.NewTablePrinter(printers.PrintOptions{NoHeaders: o.noHeaders, WithNamespace: o.all, Wide: wide})
	return printer.PrintObj(o.table(list), o.Out)
}

// read reads the whole list, page by page.
func (o *listOptions) read(ctx context.Context, options []client.ListOption) (*checkpointv1alpha1.PodCheckpointList, error) {
	whole := &checkpointv1alpha1.PodCheckpointList{}
	for more := ""; ; {
		var page checkpointv1alpha1.PodCheckpointList
		if err := o.client.List(ctx, &page, append(slices.Clone(options), client.Limit(pageSize), client.Continue(more))...); err != nil {
			return nil, explain(err)
		}
		for i := range page.Items {
			page.Items[i].SetGroupVersionKind(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"))
		}
		whole.Items = append(whole.Items, page.Items...)
		if more = page.Continue; more == "" {
			return whole, nil
		}
	}
}

// table is the list as kubectl prints tables. The last five columns are wide ones.
func (o *listOptions) table(list *checkpointv1alpha1.PodCheckpointList) *metav1.Table {
	t := &metav1.Table{ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name"}, {Name: "Ready", Type: "string"}, {Name: "Reason", Type: "string"},
		{Name: "Pod", Type: "string"}, {Name: "Node", Type: "string"}, {Name: "Size", Type: "string"},
		{Name: "Frozen", Type: "string"}, {Name: "Age", Type: "string"},
		{Name: "Containers", Type: "string", Priority: 1}, {Name: "Engine", Type: "string", Priority: 1},
		{Name: "Location", Type: "string", Priority: 1}, {Name: "Store", Type: "string", Priority: 1}, {Name: "New", Type: "string", Priority: 1},
	}}
	for i := range list.Items {
		c := &list.Items[i]
		ready := readyCondition(c)
		reason := ready.Reason
		if c.DeletionTimestamp != nil {
			reason = "Deleting"
		}
		var bytes string
		if c.Status.Size != nil {
			bytes = size(c.Status.Size.LogicalBytes)
		}
		var stored string
		if c.Status.Store != nil {
			stored = size(c.Status.Store.NewBytes)
		}
		t.Rows = append(t.Rows, metav1.TableRow{
			Cells: []any{c.Name, string(ready.Status), reason, c.Spec.SourcePodName, or(or(c.Status.NodeName, c.Spec.NodeName), "<none>"),
				or(bytes, "<none>"), or(frozenFor(c), "<none>"), age(o.now(), c.CreationTimestamp),
				or(strings.Join(capturedContainers(c), ","), "<none>"), or(engineOf(c.Status.Engine), "<none>"), or(location(c.Status.CheckpointLocation), "<none>"),
				or(c.Spec.StoreName, "<none>"), or(stored, "<none>")},
			Object: runtime.RawExtension{Object: c},
		})
	}
	return t
}
