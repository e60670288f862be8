package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/engine/criu/adapt"
	"podstasis.dev/stasis/internal/engine/criu/cow"
	"podstasis.dev/stasis/internal/engine/criu/privileges"
	"podstasis.dev/stasis/internal/engine/gvisor"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/nodeinstall"
	"podstasis.dev/stasis/internal/platform"
	"podstasis.dev/stasis/internal/restoring"
	checkpointstore "podstasis.dev/stasis/internal/store"
)

// Names of the agent's sockets in its run directory.
const (
	criSocket   = "cri.sock"   // CheckpointPod and RestorePod
	agentSocket = "agent.sock" // what stasis-runtime asks; nodeapi.SocketPath
)

const (
	// runtimePatience is how long a starting agent waits for a container runtime
	// that does not answer: it may be being restarted.
	runtimePatience = 2 * time.Minute
	// stopPatience is how long a stopping agent waits for the CRI service to have
	// thawed what it froze.
	stopPatience = 30 * time.Second
)

// Options say how the agent runs.
type Options struct {
	NodeName        string
	RuntimeEndpoint string // unix:// URL of the container runtime's CRI
	Root            string // state, kept across reboots
	RunDir          string // sockets and what lives as long as the node is up
	MaxStagingMiB   int64  // of memory that captures may take in RunDir; -1: a quarter of the node's
	MetricsAddress  string // of metrics and health; empty: none
	NoKubernetes    bool   // the CRI layer alone
	MaxConcurrent   int    // checkpoints at a time on this node
	Disk            DiskLimits
	GiveUpAfter     time.Duration // how long a restore may keep failing; 0: for ever
	LazyThreshold   int           // MiB of memory from which on it is restored lazily, from data of this node; 0: never by size
	LazyBandwidth   int           // MiB a second that are streamed to a container; 0: unbounded
	KeepCopies      time.Duration // how long a fetched checkpoint stays that nobody uses
	LacksFeatures   []string      // of its CPU, that this node is said to lack
	API             APIOptions
	Log             *slog.Logger
}

// daemon is a running agent's parts.
type daemon struct {
	Options
	runtime  runtimeapi.RuntimeServiceClient // the container runtime's
	conn     *grpc.ClientConn                // to it
	host     *hostns.Host
	engine   *criu.Engine
	engines  engine.Engines // all, that one among them
	store    *store
	metrics  *Metrics
	calls    *Calls
	sessions *restoring.Sessions
	cri      *criservice.Service
	observer *observer
	room     *room
	lazily   restoring.Memory
	stages   stages
	platform platform.Description // what this node is to checkpoints
	// kube is nil without Kubernetes, and until its API server has been reached.
	kube atomic.Pointer[kubernetes]
}

// Run runs the agent until ctx ends. When it returns no Pod is frozen and no
// operation is under way.
func Run(ctx context.Context, o Options) error {
	ctrl.SetLogger(logr.FromSlogHandler(o.Log.Handler()))
	if f := checkRoot(os.Geteuid()); f.err {
		return errors.New(f.says)
	}
	if err := o.Disk.check(); err != nil {
		return err
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(checkpointstore.MemoryLimit)
	}
	s, err := openStore(o.Root)
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(o.Root, "agent.lock"), o.Log)
	if err != nil {
		return err
	}
	defer unlock()
	runtimeConn, err := dial(o.RuntimeEndpoint)
	if err != nil {
		return err
	}
	defer runtimeConn.Close()
	d := &daemon{
		Options: o, store: s, calls: &Calls{}, metrics: NewMetrics(ctrlmetrics.Registry),
		runtime: runtimeapi.NewRuntimeServiceClient(runtimeConn), conn: runtimeConn,
		room: newRoom(o.Disk, s.checkpointRoot()),
	}
	if d.host, err = awaitRuntime(ctx, d.runtime, o.RuntimeEndpoint); err != nil {
		return err
	}
	defer d.host.Close()
	if err := d.prepareEngine(ctx); err != nil {
		return err
	}
	// From here on a death of this process leaves no Pod frozen. Its guard is told
	// good-bye when nothing is.
	guard, err := d.engine.StartGuard(ctx, filepath.Join(nodeinstall.HostPrefix, "bin", criu.GuardName))
	if err != nil {
		return err
	}
	defer func() {
		if err := guard.Close(); err != nil {
			d.Log.Warn("the guard could not be told good-bye", "error", err)
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-guard.Done():
			cancel(errGuardEnded)
		case <-ctx.Done():
		}
	}()
	err = d.run(ctx)
	if cause := context.Cause(ctx); errors.Is(cause, errGuardEnded) {
		err = errors.Join(err, cause)
	}
	return err
}

// errGuardEnded ends an agent that has lost its guard; its successor starts another.
var errGuardEnded = errors.New("the guard has ended: without it this agent's death would leave a Pod frozen")

// prepareEngine makes the engine, thaws what an agent before this one may have
// left frozen, and only then looks at whether the node is fit.
func (d *daemon) prepareEngine(ctx context.Context) error {
	d.engine = criu.New(criu.Config{
		Host: d.host, RunDir: d.RunDir, Log: d.Log, Stage: d.stages.report, CheckConnections: adapt.CheckConnections,
		MaxStaging: d.MaxStagingMiB << 20, COWHelper: filepath.Join(nodeinstall.HostPrefix, "bin", cow.HelperName),
	})
	d.engines = engine.Engines{d.engine, gvisor.New(gvisor.Config{
		Host: d.host, RunDir: d.RunDir, Runsc: filepath.Join(nodeinstall.HostPrefix, "bin", nodeapi.RunscName), Log: d.Log, Stage: d.stages.report,
	})}
	for _, e := range d.engines {
		if err := e.ThawLeftovers(ctx); err != nil {
			d.Log.Error("a Pod that an earlier agent froze could not be thawed", "engine", e.Name(), "error", err)
		}
	}
	var unfit []error
	for _, f := range preflight(ctx, d.host, d.engine) {
		switch {
		case f.fatal:
			unfit = append(unfit, fmt.Errorf("%s: %s", f.name, f.says))
		case f.err:
			d.Log.Warn("this node lacks something", "check", f.name, "message", f.says)
		default:
			d.Log.Info("preflight", "check", f.name, "found", f.says)
		}
	}
	if err := errors.Join(unfit...); err != nil {
		return fmt.Errorf("this node cannot checkpoint or restore: %w", err)
	}
	described, err := d.engine.Describe(ctx)
	if err != nil {
		return fmt.Errorf("find out what this node can restore: %w", err)
	}
	for _, e := range d.engines[1:] {
		program, err := e.Identify(ctx)
		if err != nil {
			d.Log.Info("this node does not have an engine", "engine", e.Name(), "because", err)
			continue
		}
		d.Log.Info("this node has another engine", "engine", e.Name(), "version", program.Version)
		described.More = append(described.More, program)
	}
	d.platform = described.Without(d.LacksFeatures)
	return nil
}

func (d *daemon) run(ctx context.Context) error {
	removed, err := d.store.removeLeftovers()
	if err != nil {
		return err
	}
	if len(removed) > 0 {
		d.Log.Info("leftovers of interrupted work removed", "names", removed)
	}
	d.observer = &observer{store: d.store, metrics: d.metrics, log: d.Log, now: time.Now, giveUpAfter: d.GiveUpAfter}
	d.lazily = d.memory()
	d.sessions, err = restoring.New(restoring.Config{
		StateDir:      filepath.Join(d.RunDir, "restore"),
		ImagesDir:     filepath.Join(d.Root, "restoring"),
		FreezeHook:    filepath.Join(nodeinstall.HostPrefix, "bin", criu.FreezeHookName),
		Path:          d.host.SearchPath(),
		NodeName:      d.NodeName,
		Resolver:      d,
		Blocks:        d,
		Observer:      d.observer,
		Compatibility: compatibility{d.engines},
		Node:          &restoresNode{runtime: d.runtime, host: d.host},
		Memory:        d.lazily,
		Now:           time.Now,
		Log:           d.Log,
	})
	if err != nil {
		return err
	}
	return d.serve(ctx)
}

// compatibility says whether checkpoints can be restored here. What reads images is
// apart from the engine, a half of which stasis-runtime is made of.
type compatibility struct{ engines engine.Engines }

// CheckRestore implements restoring.Compatibility.
func (c compatibility) CheckRestore(ctx context.Context, m *checkpoint.Manifest) error {
	e, err := c.engines.Named(m.Engine.Name)
	if err != nil {
		return err
	}
	return e.CheckRestore(ctx, m)
}

// Whole implements restoring.Compatibility.
func (compatibility) Whole(m *checkpoint.Manifest) bool { return m.Engine.Name == gvisor.Name }

// AdaptWhole implements restoring.Compatibility.
func (compatibility) AdaptWhole(_ context.Context, _ *checkpoint.Manifest, from string, to nodeapi.CreateSandbox, dir string) error {
	return gvisor.Adapt(from, to.EngineAnnotations, dir)
}

// CheckPrivileges implements restoring.Compatibility.
func (compatibility) CheckPrivileges(ctx context.Context, imageDir string, allowed *nodeapi.Privileges) error {
	root, err := os.OpenRoot(imageDir)
	if err != nil {
		return fmt.Errorf("open the checkpoint's images: %w", err)
	}
	defer root.Close()
	return privileges.Check(ctx, root.FS(), allowed)
}

// Adapt implements restoring.Compatibility.
func (compatibility) Adapt(ctx context.Context, to restoring.Adaptation, dir string) (*nodeapi.ContainerRestore, error) {
	pod := adapt.Pod{ImageDirs: to.ImageDirs, Created: to.Created, Was: to.Was, Is: to.Is}
	return pod.Container(ctx, to.Container, dir)
}

// serve opens the sockets and works until ctx ends. The order of ending is that
// of dependence: no new work, operations to their end, then what they use.
func (d *daemon) serve(ctx context.Context) error {
	criListener, err := listen(filepath.Join(d.RunDir, criSocket))
	if err != nil {
		return err
	}
	agentListener, err := listen(filepath.Join(d.RunDir, agentSocket))
	if err != nil {
		criListener.Close()
		return err
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(d.calls.Intercept))
	native := &criservice.Native{Runtime: d.runtime, Log: d.Log}
	d.cri = criservice.New(criservice.Config{
		Runtime: d.runtime, Engines: d.engines, Tickets: d.sessions, Host: d.host,
		Room:     d.room,
		Memory:   d.lazily.Policy,
		Handlers: map[string]string{criu.Name: nodeinstall.HandlerName, gvisor.Name: nodeinstall.GVisorHandlerName},
		Native:   native, Log: d.Log,
	})
	runtimeapi.RegisterRuntimeServiceServer(server, d.cri)

	// What serves is not ended by ctx, what works is; the first to fail ends both.
	working, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	var servers sync.WaitGroup
	part := func(name string, run func() error) {
		servers.Go(func() {
			if err := run(); err != nil {
				fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	part("serve "+criSocket, func() error { return server.Serve(criListener) })
	part("serve "+agentSocket, func() error { return nodeapi.Serve(serving, agentListener, d.sessions, d.Log) })
	part("follow what the container runtime implements", func() error { native.Follow(serving, d.conn); return nil })
	part("follow restores", func() error { d.sessions.Run(serving); return nil })
	if d.MetricsAddress != "" {
		part("serve metrics and health", func() error { return serveHTTP(serving, d.MetricsAddress, d.ready) })
	}
	d.Log.Info("the agent is up", "node", d.NodeName, "kubernetes", !d.NoKubernetes, "cri", criListener.Addr().String())

	var workErr error
	if d.NoKubernetes {
		<-working.Done()
	} else {
		workErr = d.watch(working)
	}
	stopGracefully(server, stopPatience)
	stopServing()
	servers.Wait()
	d.Log.Info("the agent has ended")
	if cause := context.Cause(working); cause != nil && !errors.Is(cause, context.Canceled) && ctx.Err() == nil {
		return errors.Join(workErr, cause)
	}
	return workErr
}

// watch connects to the API server and works for it until ctx ends. While the
// server is away the sockets are served all the same: containers of Pods that were
// restored before are started anew by the kubelet without it.
func (d *daemon) watch(ctx context.Context) error {
	config, err := d.kubeConfig()
	if err != nil {
		return err
	}
	const first, most = time.Second, 10 * time.Second
	for delay := first; ; delay = min(2*delay, most) {
		k, err := newKubernetes(d, config)
		if err == nil {
			d.observer.connect(k.recorder, k.marker, k.hooks, k.resolver.copies)
			d.kube.Store(k)
			d.sessions.Wake() // there is somebody to tell now
			return k.start(ctx, filepath.Join(d.RunDir, criSocket))
		}
		d.Log.Warn("the API server cannot be reached, trying again", "error", err, "in", delay)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// Resolve implements restoring.Resolver.
func (d *daemon) Resolve(ctx context.Context, sandbox nodeapi.Sandbox) (restoring.Source, error) {
	if d.NoKubernetes {
		return restoring.Source{}, deny(v1alpha1.EventRestoreFailed, "this agent runs without Kubernetes and knows no PodCheckpoints; restore with RestorePod of the CRI")
	}
	k := d.kube.Load()
	if k == nil {
		return restoring.Source{}, deny(v1alpha1.EventRestoreFailed, "the agent of node %s has not reached the API server since it started", d.NodeName)
	}
	return k.resolver.Resolve(ctx, sandbox)
}

// Block implements restoring.Blocks.
func (d *daemon) Block(ctx context.Context, dir string, block nodeapi.Block) (there bool, trouble string, err error) {
	k := d.kube.Load()
	if k == nil {
		select { // it is asked again at once
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
		return false, "the agent of node " + d.NodeName + " has not reached the API server since it started", nil
	}
	return k.resolver.copies.Block(ctx, dir, block)
}

// ready says whether a Pod could be restored here now: the container runtime
// knows the handler, and the agent has seen its objects.
func (d *daemon) ready(ctx context.Context) error {
	status, err := d.runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return fmt.Errorf("the container runtime does not answer: %w", err)
	}
	known, err := nodeinstall.HandlerKnown(status)
	if err != nil {
		return err
	}
	if !known {
		return fmt.Errorf("the container runtime does not know the handler %s: run stasis-agent install on this node", nodeinstall.HandlerName)
	}
	if k := d.kube.Load(); !d.NoKubernetes && (k == nil || !k.synced()) {
		return errors.New("the node's PodCheckpoints have not been read yet")
	}
	return nil
}

// lock makes sure that one agent works on a state directory: a new one waits
// until the old one, which may be thawing a Pod, has ended.
func lock(ctx context.Context, name string, log *slog.Logger) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	told := false
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock the state directory: %w", err)
		}
		if !told {
			log.Warn("another agent of this node still runs, waiting for it to end", "lock", name)
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock the state directory: another agent holds %s: %w", name, context.Cause(ctx))
		case <-time.After(time.Second):
		}
	}
}

// connectTimeout is how long one attempt to connect may take, on a busy node too. Unset,
// it would be the first pause between attempts, and a call would fail for 100 ms.
const connectTimeout = 20 * time.Second

func dial(endpoint string) (*grpc.ClientConn, error) {
	if !strings.Contains(endpoint, "://") {
		endpoint = "unix://" + endpoint
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: connectTimeout, Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: 3 * time.Second}}))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", endpoint, err)
	}
	return conn, nil
}

// awaitRuntime waits until the container runtime answers, and opens its mount
// namespace.
func awaitRuntime(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, endpoint string) (*hostns.Host, error) {
	waiting, cancel := context.WithTimeout(ctx, runtimePatience)
	defer cancel()
	if _, err := runtime.Version(waiting, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		return nil, fmt.Errorf("the container runtime does not answer on %s (is it running, and is that its socket?): %w", endpoint, err)
	}
	return hostns.FromSocket(endpoint)
}

// listen opens a socket that only root may use, in place of one that an earlier
// agent left.
func listen(name string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	// The mode is right from the first moment: nobody else enters the directory.
	if err := os.Chmod(filepath.Dir(name), 0o700); err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: name})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return l, nil
}

// stopGracefully lets the calls under way come to their end, within limits.
func stopGracefully(server *grpc.Server, patience time.Duration) {
	done := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		server.Stop() // cancels their contexts, upon which they thaw
		<-done
	}
}

// serveHTTP serves metrics and health until ctx ends.
func serveHTTP(ctx context.Context, address string, ready func(context.Context) error) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(ctrlmetrics.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if err := ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	server := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
