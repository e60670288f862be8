package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"podstasis.dev/stasis/test/devcluster/internal/build"
	"podstasis.dev/stasis/test/devcluster/internal/project"
)

// buildCommand builds what a cluster is made of, without a cluster.
func buildCommand() *cobra.Command {
	var gvisor bool
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
			binaries, err := build.Builder{Root: root, Cache: cache, Say: say}.All(cmd.Context(), true, gvisor)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), binaries.Kube)
			return err
		},
	}
	cmd.Flags().BoolVar(&gvisor, "gvisor", false, "build gVisor too")
	return cmd
}
