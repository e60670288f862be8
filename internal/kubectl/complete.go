package kubectl

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const (
	completionPatience = 3 * time.Second
	completionMost     = 500 // names offered at most
)

type completer = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// offer completes from what find answers within a moment. Failing to find out
// offers nothing: the command itself will say what is wrong.
func (e *environment) offer(most int, find func(ctx context.Context, args []string) []string) completer {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most || e.connect() != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionPatience)
		defer cancel()
		var names []string
		for _, name := range find(ctx, args) {
			// A name that begins with a hyphen would be read as a flag; none does.
			if bare, _, _ := strings.Cut(name, "\t"); strings.HasPrefix(bare, prefix) && !slices.Contains(args, bare) {
				names = append(names, name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completePods offers the names of running Pods.
func (e *environment) completePods() completer {
	return e.offer(1, func(ctx context.Context, _ []string) (names []string) {
		var list corev1.PodList
		if e.client.List(ctx, &list, client.InNamespace(e.namespace), client.Limit(completionMost)) != nil {
			return nil
		}
		for i := range list.Items {
			if list.Items[i].Status.Phase != corev1.PodSucceeded && list.Items[i].Status.Phase != corev1.PodFailed {
				names = append(names, list.Items[i].Name)
			}
		}
		return names
	})
}

// completeCheckpoints offers the names of PodCheckpoints, with what they are of.
func (e *environment) completeCheckpoints(most int) completer {
	return e.offer(most, func(ctx context.Context, _ []string) (names []string) {
		var list checkpointv1alpha1.PodCheckpointList
		if e.client.List(ctx, &list, client.InNamespace(e.namespace), client.Limit(completionMost)) != nil {
			return nil
		}
		for i := range list.Items {
			names = append(names, list.Items[i].Name+"\tof pod "+list.Items[i].Spec.SourcePodName)
		}
		return names
	})
}

// completePodContainers offers the containers of the Pod that is named before.
func (e *environment) completePodContainers() completer {
	return e.offer(0, func(ctx context.Context, args []string) []string {
		var pod corev1.Pod
		if len(args) == 0 {
			return nil
		}
		name, err := resourceName(args[0], podTypes())
		if err != nil || e.client.Get(ctx, client.ObjectKey{Namespace: e.namespace, Name: name}, &pod) != nil {
			return nil
		}
		return checkpointable(&pod)
	})
}

// completeCheckpointContainers offers the containers of the PodCheckpoint that is
// named before.
func (e *environment) completeCheckpointContainers() completer {
	return e.offer(0, func(ctx context.Context, args []string) []string {
		var checkpoint checkpointv1alpha1.PodCheckpoint
		if len(args) == 0 {
			return nil
		}
		name, err := resourceName(args[0], checkpointTypes())
		if err != nil || e.client.Get(ctx, client.ObjectKey{Namespace: e.namespace, Name: name}, &checkpoint) != nil {
			return nil
		}
		return capturedContainers(&checkpoint)
	})
}

// completeNodes offers the names of nodes.
func (e *environment) completeNodes() completer {
	return e.offer(0, func(ctx context.Context, _ []string) (names []string) {
		var list corev1.NodeList
		if e.client.List(ctx, &list, client.Limit(completionMost)) != nil {
			return nil
		}
		for i := range list.Items {
			names = append(names, list.Items[i].Name)
		}
		return names
	})
}

// completeFlag lets a flag of cmd be completed by one of the above.
func completeFlag(cmd *cobra.Command, flag string, by completer) {
	if err := cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		names, directive := by(cmd, args, prefix)
		return names, directive
	}); err != nil {
		panic(err) // the flag is not defined: this cannot depend on input
	}
}

// completionCommand writes completion scripts for the plugin called by its own
// name. Through kubectl it completes by kubectl_complete-NAME.
func completionCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Write a completion script for the shell, for the plugin called by its own name",
		Long: `Write a completion script for bash, zsh or fish, for the plugin called by its own
name (kubectl-checkpoint).

"kubectl checkpoint" itself is completed by kubectl's own script: it calls the
program kubectl_complete-checkpoint, a link to the plugin that lies beside it.`,
		Example: `  # Complete kubectl checkpoint: kubectl's own script, and a link beside the plugin
  source <(kubectl completion bash)
  ln -s kubectl-checkpoint "$(dirname "$(which kubectl-checkpoint)")/kubectl_complete-checkpoint"

  # Complete kubectl-checkpoint
  source <(kubectl-checkpoint completion bash)`,
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      exactly(1, "one shell (bash, zsh or fish)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				return root.GenBashCompletionV2(env.Out, true)
			case "zsh":
				return root.GenZshCompletion(env.Out)
			case "fish":
				return root.GenFishCompletion(env.Out, true)
			}
			return usagef("no completion script for %q: bash, zsh and fish are there", args[0])
		},
	}
}
