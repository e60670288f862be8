package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/nodeinstall"
)

const (
	defaultEndpoint = "unix:///run/containerd/containerd.sock"
	defaultRoot     = "/var/lib/stasis"
	defaultRunDir   = "/run/stasis"
	// uninstallRetry is how often an uninstall that waits looks again.
	uninstallRetry = 10 * time.Second
)

// NewCommand is the command line of stasis-agent.
func NewCommand(out io.Writer) *cobra.Command {
	o := Options{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	slog.SetDefault(o.Log)
	root := &cobra.Command{
		Use:   "stasis-agent",
		Short: "Checkpoints and restores the Pods of its node",
		Long: "stasis-agent checkpoints this node's Pods as PodCheckpoint objects ask for, serves CheckpointPod and RestorePod\n" +
			"of the CRI, and tells the node's OCI runtime which Pods to restore from what. It runs as root, as a DaemonSet\n" +
			"(config/agent) or beside containerd.",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return Run(cmd.Context(), o) },
	}
	root.PersistentFlags().StringVar(&o.RuntimeEndpoint, "runtime-endpoint", defaultEndpoint, "the container runtime's CRI socket")
	root.PersistentFlags().StringVar(&o.Root, "root", defaultRoot, "directory of the checkpoints, the same path here and on the host")
	root.PersistentFlags().StringVar(&o.RunDir, "run-dir", defaultRunDir, "directory of the agent's sockets, the same path here and on the host")
	flags := root.Flags()
	flags.StringVar(&o.NodeName, "node-name", os.Getenv("NODE_NAME"), "the name of this node's Node object; $NODE_NAME by default")
	flags.BoolVar(&o.NoKubernetes, "no-kubernetes", false, "serve the CRI alone, for use beside a container runtime without Kubernetes")
	flags.StringVar(&o.MetricsAddress, "metrics-address", ":8080", "address of /metrics, /healthz and /readyz; empty for none")
	flags.IntVar(&o.MaxConcurrent, "max-concurrent-checkpoints", 4, "how many Pods are checkpointed at a time")
	flags.Int64Var(&o.MaxStagingMiB, "max-staging-mib", -1, "how much of what is captured is kept in memory until the Pod runs again, in MiB, of all checkpoints that are under way; where it does not fit it goes to the disk at once; 0 for none, -1 for a quarter of the node's memory")
	flags.Float64Var(&o.Disk.MaxShare, "max-disk-share", defaultMaxDiskShare, "the part of their disk that all checkpoints together may take, 0 to 1")
	flags.Float64Var(&o.Disk.MinFree, "min-free-disk", defaultMinFreeDisk, "the part of the disk that checkpoints leave free, 0 to 1; not less than what the kubelet evicts Pods at (imagefs.available: 0.15)")
	flags.DurationVar(&o.GiveUpAfter, "restore-give-up-after", defaultGiveUpAfter, "how long a restore may keep failing before its Pod becomes Failed; 0 for ever")
	flags.IntVar(&o.LazyThreshold, "lazy-restore-from", defaultLazyFrom, "MiB of memory from which on processes that are restored from data of this node run before all of it is there, unless their Pod's annotation says otherwise; 0: only where it asks for that")
	flags.IntVar(&o.LazyBandwidth, "lazy-restore-bandwidth", 0, "MiB a second that are read at most for a container that runs already, besides what it waits for; 0 for no bound")
	flags.DurationVar(&o.KeepCopies, "keep-copies", defaultKeepCopies, "how long a checkpoint that was fetched from another node stays on this one when nobody restores from it")
	flags.StringSliceVar(&o.LacksFeatures, "lacks-cpu-features", nil, "CPU features, by their names in /proc/cpuinfo, that this node is to be taken to lack: checkpoints of other nodes that need them are not restored here")
	flags.StringVar(&o.API.Listen, "api-address", ":9443", "address that the API server of Stasis calls this agent at, over TLS; empty for none")
	flags.StringVar(&o.API.Host, "advertise-address", os.Getenv("POD_IP"), "the IP address of it that others reach; $POD_IP by default; without one the agent does not announce itself")
	flags.StringVar(&o.API.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "the namespace that Stasis is installed in; $POD_NAMESPACE by default")
	flags.StringVar(&o.API.Holder, "pod-name", os.Getenv("POD_NAME"), "the name of this agent's Pod; $POD_NAME by default")
	root.AddCommand(installCommand(&o), uninstallCommand(&o), preflightCommand(&o, out))
	return root
}

// installFlags are common to install and uninstall.
func installFlags(cmd *cobra.Command, o *Options, c *nodeinstall.Config) {
	cmd.Flags().StringVar(&c.Prefix, "prefix", nodeinstall.HostPrefix, "where the host's "+nodeinstall.HostPrefix+" is reached from here")
	cmd.Flags().StringVar(&c.ContainerdConfig, "containerd-config", "", "containerd's main configuration file on the host; by default the one that it was started with")
	cmd.Flags().StringVar(&c.Restart, "containerd-restart", nodeinstall.RestartAuto, "how to restart containerd when its configuration changed: auto, systemd, signal or none")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		switch c.Restart {
		case nodeinstall.RestartAuto, nodeinstall.RestartSystemd, nodeinstall.RestartSignal, nodeinstall.RestartNone:
		default:
			return fmt.Errorf("--containerd-restart=%s: choose auto, systemd, signal or none", c.Restart)
		}
		c.Socket, c.Log = o.RuntimeEndpoint, o.Log
		if f := checkRoot(os.Geteuid()); f.err {
			return errors.New(f.says)
		}
		return nil
	}
}

func installCommand(o *Options) *cobra.Command {
	var c nodeinstall.Config
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install runtime, CRIU and containerd's handler on this node",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			installer, done, err := nodeinstall.New(c)
			if err != nil {
				return err
			}
			defer done()
			return installer.Install(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&c.Payload, "payload", "/payload", "directory with what is to be installed")
	installFlags(cmd, o, &c)
	return cmd
}

func uninstallCommand(o *Options) *cobra.Command {
	var c nodeinstall.Config
	var removal nodeinstall.Removal
	var wait bool
	var stay string
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take runtime, CRIU and containerd's handler off this node",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			installer, done, err := nodeinstall.New(c)
			if err != nil {
				return err
			}
			defer done()
			removal.RunDir, removal.StateDir = o.RunDir, o.Root
			for told := ""; ; {
				err := installer.Uninstall(cmd.Context(), removal)
				if err == nil {
					break
				}
				if !wait || !errors.Is(err, nodeinstall.ErrInUse) {
					return err
				}
				if err.Error() != told {
					told = err.Error()
					o.Log.Info("waiting until this node can be uninstalled", "reason", told)
				}
				select {
				case <-cmd.Context().Done():
					return err
				case <-time.After(uninstallRetry):
				}
			}
			if stay == "" {
				return nil
			}
			return serveHTTP(cmd.Context(), stay, func(context.Context) error { return nil })
		},
	}
	cmd.Flags().BoolVar(&removal.Force, "force", false, "uninstall although restored Pods exist on this node")
	cmd.Flags().BoolVar(&removal.Purge, "purge", false, "remove the checkpoints too")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait while the agent runs or restored Pods exist, instead of failing")
	cmd.Flags().StringVar(&stay, "then-stay", "", "when done, answer /readyz on this address until stopped: for a DaemonSet, whose readiness then says so")
	installFlags(cmd, o, &c)
	return cmd
}

func preflightCommand(o *Options, out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "preflight",
		Short: "Check that this node can checkpoint and restore, one line a check",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f := checkRoot(os.Geteuid()); f.err {
				fmt.Fprintln(out, f)
				return errors.New("this node cannot be checked by an ordinary user")
			}
			conn, err := dial(o.RuntimeEndpoint)
			if err != nil {
				return err
			}
			defer conn.Close()
			failed := false
			show := func(f finding) {
				failed = failed || f.err
				fmt.Fprintln(out, f)
			}
			findings, host := checkRuntime(cmd.Context(), conn, o.RuntimeEndpoint)
			for _, f := range findings {
				show(f)
			}
			if host != nil {
				defer host.Close()
				engine := criu.New(criu.Config{Host: host, RunDir: o.RunDir, Log: o.Log})
				for _, f := range preflight(cmd.Context(), host, engine) {
					show(f)
				}
			}
			if failed {
				return errors.New("this node is not ready for Stasis")
			}
			return nil
		},
	}
}

// Context ends with SIGINT or SIGTERM; a second one ends the process.
func Context() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
