package kubectl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/kubectl/transfer"
)

// downloadOptions is the command line of "kubectl checkpoint download".
type downloadOptions struct {
	*environment
	name      string
	container string
	file      string
	overwrite bool
	patience  time.Duration
}

func newDownloadCommand(env *environment) *cobra.Command {
	o := &downloadOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "download NAME [-c CONTAINER] [-o FILE|-]",
		Short: "Bring a checkpoint home as a file",
		Long: `Bring a checkpoint home as one tar file: the whole Pod's, as "kubectl checkpoint
import" takes it, or with -c one container's, as the kubelet's checkpoint endpoint
writes it and checkpointctl reads it. It holds the Pod's memory and every secret in
it; it needs the verb "get" on "podcheckpoints/archive".

The file is read in ranges. What breaks is tried again; what was killed goes on where
it was when the same command is run again (FILE.partial is what there is so far). At
the end the file is compared with its digest, and a whole Pod's with the digests of
all its members; only then it gets its name.

Exit codes:
  0    downloaded and verified
  1    failed or refused
  2    wrong command line, nothing was sent
  3    nothing has arrived for --retry-for; run it again to go on
  4    what has arrived is not what was written
  130  interrupted; run it again to go on`,
		Example: `  # The whole Pod, to web-x7k2p.tar
  kubectl checkpoint download web-x7k2p

  # One container, for checkpointctl
  kubectl checkpoint download web-x7k2p -c app -o app.tar
  checkpointctl inspect app.tar

  # Straight into an encrypted file
  kubectl checkpoint download web-x7k2p -o - | age -r "$KEY" > web.tar.age`,
		Args:              exactly(1, "one checkpoint"),
		ValidArgsFunction: env.completeCheckpoints(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.name, err = resourceName(args[0], checkpointTypes()); err != nil {
				return err
			}
			if o.patience <= 0 {
				return usagef("--retry-for %s: must be more than 0", o.patience)
			}
			if o.file == "" {
				o.file = strings.Join(append([]string{o.name}, slices.DeleteFunc([]string{o.container}, func(s string) bool { return s == "" })...), "-") + ".tar"
			}
			if err := o.connect(); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVarP(&o.container, "container", "c", "", "Container to download, in the kubelet's layout, instead of the whole Pod.")
	flags.StringVarP(&o.file, "output", "o", "", `File to write, or "-" for standard output. Default: NAME.tar or NAME-CONTAINER.tar.`)
	flags.BoolVar(&o.overwrite, "overwrite", false, "Replace FILE if it is there.")
	flags.DurationVar(&o.patience, "retry-for", 2*time.Minute, "How long to go on trying while nothing arrives.")
	completeFlag(cmd, "container", env.completeCheckpointContainers())
	return cmd
}

func (o *downloadOptions) run(ctx context.Context) error {
	if err := o.mayWrite(); err != nil {
		return err
	}
	progress := newProgress(o.ErrOut, o.now)
	defer progress.end()
	checkpoint, err := o.readable(ctx)
	if err != nil {
		return err
	}
	remote := &remoteArchive{calls: o.calls, namespace: o.namespace, name: o.name, container: o.container}
	// The first answer is not waited for: what is wrong now is said now.
	object, _, err := remote.stat(ctx, false)
	if err != nil {
		return err
	}
	d := &download{options: o, remote: remote, object: object, progress: progress}
	if o.container == "" {
		d.wholePod, d.manifestDigest = true, checkpoint.Status.ManifestDigest
	}
	if o.file == "-" {
		err = d.toStream(ctx, o.Out)
	} else {
		err = d.toFile(ctx, o.file)
	}
	return o.judged(ctx, err)
}

// readable is the PodCheckpoint, as far as the user may read it; it must be Ready.
func (o *downloadOptions) readable(ctx context.Context) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	err := o.client.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: o.name}, checkpoint)
	if apierrors.IsForbidden(err) {
		return checkpoint, nil // the right to its archive may be all that there is
	}
	if err != nil {
		return nil, explain(err)
	}
	if done, failure := ended(checkpoint); !done || failure != nil {
		return nil, errors.Join(failure, fmt.Errorf("podcheckpoint %s is not ready: %s", o.name, readyCondition(checkpoint).Reason))
	}
	if known := capturedContainers(checkpoint); o.container != "" && len(known) > 0 && !slices.Contains(known, o.container) {
		return nil, fmt.Errorf("podcheckpoint %s has no container %q: it has %s", o.name, o.container, strings.Join(known, ", "))
	}
	return checkpoint, nil
}

// judged gives an error its exit code and says how to go on.
func (o *downloadOptions) judged(ctx context.Context, err error) error {
	again := "; what has arrived stays in " + o.file + ".partial, run the command again to go on"
	if o.file == "-" {
		again = ""
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, transfer.ErrCorrupt):
		return &exitError{ExitCorrupt, err}
	case ctx.Err() != nil:
		return &exitError{ExitInterrupted, fmt.Errorf("interrupted%s", again)}
	case errors.Is(err, transfer.ErrStalled):
		return &exitError{ExitInProgress, fmt.Errorf("%w%s", err, again)}
	case errors.Is(err, transfer.ErrChanged):
		return fmt.Errorf("podcheckpoint %s: %w while it was being downloaded: run the command again to begin anew", o.name, err)
	}
	return err
}
