package kubectl

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
	"podstasis.dev/stasis/internal/contents/page"
)

// inspectOptions is the command line of "kubectl checkpoint inspect".
type inspectOptions struct {
	*environment
	output     *output
	name       string
	archive    string
	containers []string
	html       string
	values     bool
	all        bool
}

func newInspectCommand(env *environment) *cobra.Command {
	o := &inspectOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "inspect (NAME | --archive FILE) [-c CONTAINER]... [--html FILE]",
		Short: "Show what is inside a checkpoint",
		Long: `Show what is inside a checkpoint: processes with their memory and biggest mappings,
open files, sockets, environment, changed files. Nothing is restored or run for it.

Its node reads it and masks the values of environment variables; it needs the verb
"get" on "podcheckpoints/contents". With --archive a file is read instead that
"kubectl checkpoint download" or a kubelet wrote; no cluster is needed.

Lists are shortened; --all, -o json and --html have them whole.`,
		Example: `  # What was running?
  kubectl checkpoint inspect web-x7k2p

  # A page to look at, to keep, or to send to somebody
  kubectl checkpoint inspect web-x7k2p --html web.html

  # A file, with the values of the environment
  kubectl checkpoint inspect --archive web-x7k2p.tar --show-values

  # Who listened where?
  kubectl checkpoint inspect web-x7k2p -o jsonpath='{range .containers[*].sockets[*]}{.local}{"\n"}{end}'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if o.archive != "" && len(args) > 0 {
				return usagef("NAME or --archive, not both")
			}
			if o.archive != "" {
				return nil
			}
			return exactly(1, "one checkpoint")(cmd, args)
		},
		ValidArgsFunction: env.completeCheckpoints(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if o.archive == "" {
			if o.values {
				return usagef("--show-values needs --archive: nodes mask values")
			}
			if o.name, err = resourceName(args[0], checkpointTypes()); err != nil {
				return err
			}
		}
		if err := o.output.validate(); err != nil {
			return err
		}
		return o.run(cmd.Context())
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringArrayVarP(&o.containers, "container", "c", nil, "Only this container. May be repeated.")
	flags.StringVar(&o.archive, "archive", "", "Read this archive instead of asking a cluster.")
	flags.StringVar(&o.html, "html", "", `Write one self-contained HTML page to this file, "-" for standard output.`)
	flags.BoolVar(&o.values, "show-values", false, "With --archive: show the values of environment variables, secrets among them.")
	flags.BoolVar(&o.all, "all", false, "Do not shorten lists.")
	o.output = newOutput(cmd, "")
	completeFlag(cmd, "container", env.completeCheckpointContainers())
	return cmd
}

func (o *inspectOptions) run(ctx context.Context) error {
	inside, err := o.read(ctx)
	if err != nil {
		return err
	}
	if err := o.choose(inside); err != nil {
		return err
	}
	if o.html != "" {
		return o.page(inside)
	}
	if o.output.asked() {
		return o.output.print(o.Out, inside, "")
	}
	return writeContents(o.Out, inside, o.all)
}

// read is what is inside the checkpoint that was named.
func (o *inspectOptions) read(ctx context.Context) (*subresourcesv1alpha1.CheckpointContents, error) {
	if o.archive != "" {
		return readArchive(ctx, o.archive, o.values)
	}
	if err := o.connect(); err != nil {
		return nil, err
	}
	return o.ask(ctx, o.name)
}

// ask asks the node that a checkpoint is on.
func (e *environment) ask(ctx context.Context, name string) (*subresourcesv1alpha1.CheckpointContents, error) {
	inside, err := e.calls.contents(ctx, e.namespace, name)
	if err != nil {
		return nil, err
	}
	inside.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("CheckpointContents"))
	return inside, nil
}

// readArchive reads what is inside an archive on the user's disk.
func readArchive(ctx context.Context, path string, values bool) (*subresourcesv1alpha1.CheckpointContents, error) {
	a, err := lookInto(path)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	inside, err := contents.Read(ctx, a.FS, a.Manifest, contents.Options{ShowValues: values})
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	inside.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("CheckpointContents"))
	if inside.Name == "" {
		inside.Name = strings.TrimSuffix(filepath.Base(path), ".tar")
	}
	return inside, nil
}

// choose leaves the containers that were asked for.
func (o *inspectOptions) choose(inside *subresourcesv1alpha1.CheckpointContents) error {
	if len(o.containers) == 0 {
		return nil
	}
	var known []string
	for i := range inside.Containers {
		known = append(known, inside.Containers[i].Name)
	}
	for _, name := range o.containers {
		if !slices.Contains(known, name) {
			return fmt.Errorf("the checkpoint has no container %q: it has %s", name, clean(strings.Join(known, ", ")))
		}
	}
	inside.Containers = slices.DeleteFunc(inside.Containers, func(c subresourcesv1alpha1.ContainerContents) bool {
		return !slices.Contains(o.containers, c.Name)
	})
	return nil
}

// page writes the HTML page.
func (o *inspectOptions) page(inside *subresourcesv1alpha1.CheckpointContents) error {
	options := page.Options{Made: o.now()}
	if o.html == "-" {
		return page.Write(o.Out, inside, options)
	}
	file, err := os.OpenFile(o.html, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) // it tells of a Pod's insides
	if err != nil {
		return err
	}
	err = page.Write(file, inside, options)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", o.html, err)
	}
	fmt.Fprintf(o.Out, "%s written\n", o.html)
	return nil
}
