package kubectl

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

// diffFailed is the exit code of a comparison that could not be made: as in kubectl
// diff, 1 says that there are differences.
const diffFailed = 3

// diffOptions is the command line of "kubectl checkpoint diff".
type diffOptions struct{ *environment }

func newDiffCommand(env *environment) *cobra.Command {
	o := &diffOptions{environment: env}
	return &cobra.Command{
		Use:   "diff BEFORE AFTER",
		Short: "Show what changed between two checkpoints",
		Long: `Show what changed between two checkpoints: processes that came and went, memory that
grew, files that were opened, sockets, changed files.

BEFORE and AFTER are names of PodCheckpoints, or archives: an argument that begins
with "/" or "." is a file's.

Exit codes, those of kubectl diff:
  0    nothing differs
  1    something differs
  2    wrong command line, nothing was sent
  3    failed or refused`,
		Example: `  # What has this Pod been doing?
  kubectl checkpoint diff web-before web-after

  # The same of two files, without a cluster
  kubectl checkpoint diff ./web-before.tar ./web-after.tar`,
		Args:              exactly(2, "two checkpoints"),
		ValidArgsFunction: env.completeCheckpoints(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				if !isPath(arg) {
					if _, err := resourceName(arg, checkpointTypes()); err != nil {
						return err
					}
				}
			}
			err := o.run(cmd.Context(), args)
			if ExitCode(err) == ExitFailed && err != nil {
				return o.judged(err)
			}
			return err
		},
	}
}

// judged gives failures their exit code; that there are differences is none.
func (o *diffOptions) judged(err error) error {
	if exit, ok := err.(*exitError); ok && exit.err == errSilent {
		return err
	}
	return &exitError{diffFailed, err}
}

// isPath tells a file from a PodCheckpoint, whose name begins with neither.
func isPath(arg string) bool { return strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") }

func (o *diffOptions) run(ctx context.Context, args []string) error {
	var sides [2]*subresourcesv1alpha1.CheckpointContents
	for i, arg := range args {
		var err error
		if sides[i], err = o.side(ctx, arg); err != nil {
			return err
		}
	}
	difference := contents.Compare(sides[0], sides[1])
	if difference.Empty() {
		return nil
	}
	if err := difference.Write(o.Out); err != nil {
		return err
	}
	return silently(ExitFailed)
}

func (o *diffOptions) side(ctx context.Context, arg string) (*subresourcesv1alpha1.CheckpointContents, error) {
	if isPath(arg) {
		return readArchive(ctx, arg, false)
	}
	if err := o.connect(); err != nil {
		return nil, err
	}
	name, err := resourceName(arg, checkpointTypes())
	if err != nil {
		return nil, err
	}
	return o.ask(ctx, name)
}
