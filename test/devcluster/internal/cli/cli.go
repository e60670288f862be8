// Package cli is devcluster's command line.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"podstasis.dev/stasis/test/devcluster/internal/build"
	"podstasis.dev/stasis/test/devcluster/internal/cluster"
	"podstasis.dev/stasis/test/devcluster/internal/host"
	"podstasis.dev/stasis/test/devcluster/internal/node"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/project"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

// stateDir is the state directory that a command works on.
type stateDir string

// resolve returns the absolute path; by default .devcluster in the checkout.
func (s stateDir) resolve() (string, error) {
	if s != "" {
		return filepath.Abs(string(s))
	}
	root, err := project.Root()
	if err != nil {
		return "", fmt.Errorf("no state directory: %w, or name one with --state", err)
	}
	return filepath.Join(root, ".devcluster"), nil
}

func (s stateDir) open() (cluster.Running, error) {
	dir, err := s.resolve()
	if err != nil {
		return cluster.Running{}, err
	}
	return cluster.Open(dir)
}

// New returns the command devcluster.
func New() *cobra.Command {
	var state stateDir
	root := &cobra.Command{
		Use:           "devcluster",
		Short:         "A real Kubernetes on this machine, for development and tests",
		Long:          "devcluster runs a real Kubernetes on this machine: control plane and nodes as ordinary processes,\neach node in namespaces of its own so that it looks like a host. All state is in one directory.",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar((*string)(&state), "state", os.Getenv("DEVCLUSTER_STATE"), "state directory (default .devcluster in the checkout; environment DEVCLUSTER_STATE)")
	root.AddCommand(
		upCommand(&state), downCommand(&state), statusCommand(&state), loadCommand(&state), execCommand(&state, "exec", false),
		killCommand(&state), startCommand(&state), stopCommand(&state), logsCommand(&state),
		execCommand(&state, cluster.ExecCommand, true), superviseCommand(&state), setupCommand(), probeCommand(), buildCommand(), versionsCommand(),
	)
	return root
}

func upCommand(state *stateDir) *cobra.Command {
	var nodes int
	var bare bool
	o := cluster.Options{}
	kind := plan.Kind{Versions: build.Pinned}
	cmd := &cobra.Command{
		Use: "up", Short: "Bring the cluster up, or complete and repair the one that is there", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := state.resolve()
			if err != nil {
				return err
			}
			kind.Kubernetes = !bare
			return bringUp(cmd, dir, nodes, kind, o)
		},
	}
	cmd.Flags().IntVar(&nodes, "nodes", 1, "number of nodes")
	cmd.Flags().BoolVar(&bare, "no-kubernetes", false, "nodes with a container runtime only")
	cmd.Flags().IntVar(&o.Patience, "patience", 1, "how many times longer than usual anything may take, as on an emulated machine")
	cmd.Flags().StringVar(&o.Built, "built", "", "`file` with what devcluster build -o json has printed: nothing is built, as on a machine that cannot")
	addKind(cmd, &kind)
	return cmd
}

// addKind adds flags for what a cluster consists of.
func addKind(cmd *cobra.Command, k *plan.Kind) {
	cmd.Flags().BoolVar(&k.GVisor, "gvisor", false, "nodes that have gVisor too, as the runtime handler runsc")
	cmd.Flags().BoolVar(&k.Crun, "crun", false, "nodes that have crun too, as the runtime handler crun")
	cmd.Flags().BoolVar(&k.CrunFirst, "crun-first", false, "nodes whose default runtime handler is crun")
	cmd.Flags().BoolVar(&k.SystemdCgroup, "systemd-cgroup", false, "nodes on which systemd, as this machine runs it, makes the control groups of Pods")
	v := &k.Versions
	cmd.Flags().StringVar(&v.Kubernetes, "kubernetes", v.Kubernetes, "version of Kubernetes, of its Go module")
	cmd.Flags().StringVar(&v.Containerd, "containerd", v.Containerd, "version of containerd, likewise")
	cmd.Flags().StringVar(&v.Runc, "runc", v.Runc, "version of runc, likewise")
}

func bringUp(cmd *cobra.Command, dir string, nodes int, kind plan.Kind, o cluster.Options) error {
	root, err := project.Root()
	if err != nil {
		return err
	}
	cache, err := project.Cache()
	if err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
	o.Root, o.Cache, o.Dir, o.Nodes, o.Kind, o.Say = root, cache, dir, nodes, kind, say
	running, err := cluster.Up(cmd.Context(), o)
	if err != nil {
		return err
	}
	names := strings.Join(running.NodeNames(), ", ")
	if !kind.Kubernetes {
		say("up: %s with a container runtime each; devcluster status -o json names the sockets", names)
		return nil
	}
	say("up: %s; export KUBECONFIG=%s", names, running.Kubeconfig())
	return nil
}

func downCommand(state *stateDir) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "End the cluster and remove all of it but the logs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := state.resolve()
			if err != nil {
				return err
			}
			return cluster.Down(cmd.Context(), dir)
		},
	}
}

func statusCommand(state *stateDir) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "status", Short: "Show what runs where", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			status := running.Status(cmd.Context())
			switch output {
			case "json":
				encoder := json.NewEncoder(cmd.OutOrStdout())
				encoder.SetIndent("", "  ")
				return encoder.Encode(status)
			case "":
				return printStatus(cmd.OutOrStdout(), status, time.Now())
			}
			return fmt.Errorf("output %q is not known: json, or none for a table", output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "json for programs")
	return cmd
}

func printStatus(out io.Writer, status []cluster.PlaceStatus, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tADDRESS\tCOMPONENT\tSTATE\tPID\tSINCE\tRESTARTS\tLAST EXIT")
	var broken []string
	for _, place := range status {
		if place.Error != "" {
			broken = append(broken, place.Error)
			fmt.Fprintf(w, "%s\t%s\t-\tunknown\t-\t-\t-\t-\n", place.Place, place.Address)
		}
		for _, c := range place.Components {
			pid, exit := "-", "-"
			if c.PID != 0 {
				pid = fmt.Sprint(c.PID)
			}
			if c.LastExit != "" {
				exit = c.LastExit
			}
			if c.State == supervise.Down {
				broken = append(broken, fmt.Sprintf("%s on %s is down: devcluster start %s %s", c.Name, place.Place, place.Place, c.Name))
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", place.Place, place.Address, c.Name, c.State, pid, now.Sub(c.Since).Round(time.Second), c.Restarts, exit)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(broken) > 0 {
		return errors.New(strings.Join(broken, "\n"))
	}
	return nil
}

func loadCommand(state *stateDir) *cobra.Command {
	return &cobra.Command{
		Use: "load IMAGE.tar [NODE...]", Short: "Import an image archive (OCI layout or docker save) into all nodes, or the named ones", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			return running.Load(cmd.Context(), args[0], args[1:])
		},
	}
}

func execCommand(state *stateDir, name string, hidden bool) *cobra.Command {
	cmd := &cobra.Command{
		Use: name + " NODE -- COMMAND [ARG...]", Short: "Run a command in a node (or control-plane), in its root and network", Args: cobra.MinimumNArgs(2), Hidden: hidden,
		RunE: func(_ *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			command := args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return errors.New("no command given: devcluster exec NODE -- COMMAND [ARG...]")
			}
			return running.Exec(args[0], command)
		},
	}
	cmd.Flags().SetInterspersed(false) // flags after the node's name are the command's
	return cmd
}

func killCommand(state *stateDir) *cobra.Command {
	var down bool
	cmd := &cobra.Command{
		Use: "kill NODE [COMPONENT]", Short: "End a component by SIGKILL (it is started again as systemd would), or a whole node as a loss of power does", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				return running.PowerOff(args[0])
			}
			return running.Kill(cmd.Context(), args[0], args[1], down)
		},
	}
	cmd.Flags().BoolVar(&down, "down", false, "do not start the component again")
	return cmd
}

func startCommand(state *stateDir) *cobra.Command {
	return &cobra.Command{
		Use: "start NODE [COMPONENT]", Short: "Start a component that was killed with --down or stopped, or a node that was killed", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				return powerOn(cmd, running, args[0])
			}
			return running.Start(cmd.Context(), args[0], args[1])
		},
	}
}

// powerOn switches a node on: what up does for all that are off.
func powerOn(cmd *cobra.Command, running cluster.Running, name string) error {
	if !slices.Contains(running.NodeNames(), name) {
		return fmt.Errorf("no node %q; there are: %s", name, strings.Join(running.NodeNames(), ", "))
	}
	return bringUp(cmd, running.Dir, running.Nodes, running.Kind, cluster.Options{})
}

func stopCommand(state *stateDir) *cobra.Command {
	return &cobra.Command{
		Use: "stop NODE COMPONENT", Short: "End a component in good order (SIGTERM); it stays down", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			return running.Stop(cmd.Context(), args[0], args[1])
		},
	}
}

func logsCommand(state *stateDir) *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use: "logs NODE COMPONENT", Short: "Show a component's log (also the supervisor's, and after the cluster went down)", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := state.resolve()
			if err != nil {
				return err
			}
			file, err := os.Open(plan.Cluster{Dir: dir}.LogFile(args[0], args[1]))
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("no log of %s on %s; there are: %s", args[1], args[0], strings.Join(cluster.Logs(dir), ", "))
			}
			if err != nil {
				return fmt.Errorf("reading a log: %w", err)
			}
			defer file.Close()
			return show(cmd.Context(), cmd.OutOrStdout(), file, lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on showing what is added")
	cmd.Flags().IntVarP(&lines, "lines", "n", 0, "only the last lines (0: all)")
	return cmd
}

func superviseCommand(state *stateDir) *cobra.Command {
	return &cobra.Command{
		Use: cluster.SuperviseCommand + " PLACE", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			running, err := state.open()
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			return running.Supervise(cmd.Context(), args[0], func() (*supervise.Supervisor, error) {
				return supervise.New(running.PIDs(args[0]), func() error { return node.Enter(running.NamespaceDir(), args[0]) }, log)
			})
		},
	}
}

func setupCommand() *cobra.Command {
	return &cobra.Command{
		Use: node.SetupCommand + " DESCRIPTION", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return node.Setup(args[0], cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

func probeCommand() *cobra.Command {
	return &cobra.Command{
		Use: host.ProbeCommand + " [CRIU]", Args: cobra.MaximumNArgs(1), Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				return host.ProbeCRIU(args[0])
			}
			return host.Probe()
		},
	}
}
