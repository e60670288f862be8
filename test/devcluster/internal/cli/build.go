package cli

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"podstasis.dev/stasis/test/devcluster/internal/build"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/project"
)

// versionsCommand prints the versions that are built unless others are asked for.
func versionsCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "versions", Short: "Print the versions that up and build take by themselves", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch v := build.Pinned; output {
			case "json":
				return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
			case "":
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "Kubernetes %s\ncontainerd %s\nrunc %s\n", v.Kubernetes, v.Containerd, v.Runc)
				return err
			}
			return fmt.Errorf("output %q is not known: json, or none for lines", output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "json for programs")
	return cmd
}

// buildCommand builds what a cluster is made of, without a cluster.
func buildCommand() *cobra.Command {
	var output string
	kind := plan.Kind{Kubernetes: true, Versions: build.Pinned}
	cmd := &cobra.Command{
		Use: "build", Short: "Build what a cluster is made of and print where the Kubernetes programs are", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := project.Root()
			if err != nil {
				return err
			}
			cache, err := project.Cache()
			if err != nil {
				return err
			}
			say := func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
			binaries, err := build.Builder{Root: root, Cache: cache, Say: say}.All(cmd.Context(), kind)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				return json.NewEncoder(cmd.OutOrStdout()).Encode(binaries)
			case "":
				_, err = fmt.Fprintln(cmd.OutOrStdout(), binaries.Kube)
				return err
			}
			return fmt.Errorf("output %q is not known: json, or none for a line", output)
		},
	}
	addKind(cmd, &kind)
	cmd.Flags().StringVarP(&output, "output", "o", "", "json: where all of it is, for up --built")
	return cmd
}
