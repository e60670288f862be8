package kubectl

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/printers"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func newStoresCommand(env *environment) *cobra.Command {
	wide := false
	cmd := &cobra.Command{
		Use:   "stores [--namespaces]",
		Short: "List checkpoint stores and how full they are",
		Long: `List the CheckpointStores of the cluster: whether they can be used, what their
checkpoints would take without them and what they take, and, with --namespaces, which
namespaces fill them. It needs the verb "list" on "checkpointstores".`,
		Example: `  # Where can checkpoints be kept?
  kubectl checkpoint stores

  # Whose are they?
  kubectl checkpoint stores --namespaces`,
		Args:              none,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := env.connect(); err != nil {
				return err
			}
			return env.listStores(cmd.Context(), wide)
		},
	}
	cmd.Flags().BoolVar(&wide, "namespaces", false, "Tell the usage of each namespace.")
	return cmd
}

func (e *environment) listStores(ctx context.Context, namespaces bool) error {
	var list checkpointv1alpha1.CheckpointStoreList
	if err := e.client.List(ctx, &list); err != nil {
		return explain(err)
	}
	if len(list.Items) == 0 {
		fmt.Fprintln(e.ErrOut, "No checkpoint stores found.")
		return nil
	}
	t := &metav1.Table{ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name"}, {Name: "Type", Type: "string"}, {Name: "Ready", Type: "string"}, {Name: "Reason", Type: "string"},
		{Name: "Checkpoints", Type: "integer"}, {Name: "Logical", Type: "string"}, {Name: "Stored", Type: "string"}, {Name: "Capacity", Type: "string"}, {Name: "Age", Type: "string"},
	}}
	var usage [][]string
	for i := range list.Items {
		s := &list.Items[i]
		ready, reason, capacity := "False", "", "<none>"
		if c := meta.FindStatusCondition(s.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady); c != nil {
			ready, reason = string(c.Status), c.Reason
		}
		if s.DeletionTimestamp != nil {
			reason = "Deleting"
		}
		if s.Spec.Capacity != nil {
			capacity = s.Spec.Capacity.String()
		}
		t.Rows = append(t.Rows, metav1.TableRow{
			Cells: []any{s.Name, string(s.Spec.Type), ready, or(reason, "<none>"), int64(s.Status.Checkpoints),
				size(s.Status.LogicalBytes), size(s.Status.StoredBytes), capacity, age(e.now(), s.CreationTimestamp)},
			Object: runtime.RawExtension{Object: s},
		})
		for _, of := range s.Status.Namespaces {
			usage = append(usage, []string{s.Name, of.Name, fmt.Sprint(of.Checkpoints), size(of.StoredBytes)})
		}
	}
	if err := printers.NewTablePrinter(printers.PrintOptions{}).PrintObj(t, e.Out); err != nil {
		return err
	}
	if !namespaces || len(usage) == 0 {
		return nil
	}
	fmt.Fprintln(e.Out)
	return table(e.Out, "", append([][]string{{"STORE", "NAMESPACE", "CHECKPOINTS", "STORED"}}, usage...))
}

// completeStores offers the names of stores.
func (e *environment) completeStores() completer {
	return e.offer(0, func(ctx context.Context, _ []string) (names []string) {
		var list checkpointv1alpha1.CheckpointStoreList
		if e.client.List(ctx, &list, client.Limit(completionMost)) != nil {
			return nil
		}
		for i := range list.Items {
			names = append(names, list.Items[i].Name)
		}
		return names
	})
}

// storedIn says which store a checkpoint is in, or is to be in.
func storedIn(c *checkpointv1alpha1.PodCheckpoint) string {
	if in := c.Status.Store; in != nil {
		return fmt.Sprintf("%s (checkpoint %.16s…, which it grew by %s for)", clean(in.Name), clean(in.CheckpointID), size(in.NewBytes))
	}
	if c.Spec.StoreName == "" {
		return ""
	}
	return clean(c.Spec.StoreName) + " (not there yet)"
}
