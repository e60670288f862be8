package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"podstasis.dev/stasis/test/devcluster/internal/build"
	"podstasis.dev/stasis/test/devcluster/internal/cgroup"
	"podstasis.dev/stasis/test/devcluster/internal/cri"
	"podstasis.dev/stasis/test/devcluster/internal/host"
	"podstasis.dev/stasis/test/devcluster/internal/kube"
	"podstasis.dev/stasis/test/devcluster/internal/network"
	"podstasis.dev/stasis/test/devcluster/internal/node"
	"podstasis.dev/stasis/test/devcluster/internal/pki"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

// Options say what to bring up.
type Options struct {
	// Root is the checkout, Cache the per-user cache, Dir the state directory; absolute paths.
	Root, Cache, Dir string
	// Nodes is the number of nodes.
	Nodes int
	plan.Kind
	// Built is a file that says where all programs are; empty where they are to be built.
	Built string
	// Patience is how many times longer than usual anything may take, as where the machine is
	// an emulated one; zero counts as one.
	Patience int
	// Say tells the user what goes on.
	Say func(format string, args ...any)
}

// up is one run of Up.
type up struct {
	Running
	Options
	groups      cgroup.Hierarchies
	binaries    build.Binaries
	authorities kube.Authorities
	limited     bool
	started     time.Time
}

// Up brings a cluster up, or completes and repairs the one that is there.
func Up(ctx context.Context, o Options) (Running, error) {
	u := &up{Options: o, started: time.Now()}
	if o.Nodes < 1 || o.Nodes > plan.MaxNodes {
		return u.Running, fmt.Errorf("%d nodes: between 1 and %d can be had", o.Nodes, plan.MaxNodes)
	}
	o.Crun = o.Crun || o.CrunFirst
	u.Options.Crun = o.Crun
	if (o.GVisor || o.Crun) && strings.HasPrefix(o.Versions.Containerd, "v1.") {
		return u.Running, fmt.Errorf("gVisor and crun are set up for containerd 2 only, not for %s", o.Versions.Containerd)
	}
	if o.SystemdCgroup {
		if o.GVisor || strings.HasPrefix(o.Versions.Containerd, "v1.") {
			return u.Running, errors.New("control groups by systemd are set up for containerd 2, runc and crun only")
		}
		if err := host.CheckSystemd(); err != nil {
			return u.Running, err
		}
	}
	if err := host.Check(ctx, o.Built == ""); err != nil {
		return u.Running, err
	}
	unlock, err := lockState(o.Dir)
	if err != nil {
		return u.Running, err
	}
	defer unlock()
	if u.limited, err = host.Limited(); err != nil {
		return u.Running, err
	}
	if u.groups, err = cgroup.Find(); err != nil {
		return u.Running, err
	}
	if o.Built != "" {
		u.binaries, err = build.Read(o.Built)
	} else {
		u.binaries, err = build.Builder{Root: o.Root, Cache: o.Cache, Say: u.say}.All(ctx, o.Kind)
	}
	if err != nil {
		return u.Running, err
	}
	if err := host.CheckCRIU(ctx, u.binaries.CRIU); err != nil {
		return u.Running, err
	}
	u.say("programs are built")
	if err := u.claim(); err != nil {
		return u.Running, err
	}
	return u.Running, u.fill(ctx)
}

func (u *up) say(format string, args ...any) {
	u.Say("%6.1fs  %s", time.Since(u.started).Seconds(), fmt.Sprintf(format, args...))
}

// patient is how long something may take here that takes no longer than d elsewhere.
func (u *up) patient(d time.Duration) time.Duration { return d * time.Duration(max(1, u.Patience)) }

// claim takes up the recorded cluster, or gives a new one its names, addresses and network.
func (u *up) claim() error {
	old, err := plan.Load(u.Dir)
	switch {
	case err == nil && node.Exists(old.NamespaceDir(), plan.ControlPlane) && network.Connected(old):
		if old.Kind != u.Options.Kind {
			return fmt.Errorf("the cluster in %s is of another kind (%+v, and not %+v): run devcluster down first", u.Dir, old.Kind, u.Options.Kind)
		}
		if old.Nodes > u.Options.Nodes {
			u.say("the cluster has %d nodes already: they stay", old.Nodes)
		}
		old.Nodes = max(old.Nodes, u.Options.Nodes)
		u.Cluster = old
		return u.Save()
	case err == nil || !errors.Is(err, plan.ErrNone):
		u.say("clearing away what an interrupted run (or one before the machine's last start) has left")
		fallthrough
	default:
		if err := clear(context.Background(), u.Dir); err != nil {
			return fmt.Errorf("clearing away what an earlier run has left: %w", err)
		}
	}
	u.Cluster = plan.Cluster{ID: plan.ID(u.Dir), Nodes: u.Options.Nodes, Kind: u.Options.Kind, Dir: u.Dir}
	u.RuntimeGroup = !u.groups.Exists(plan.RuntimeCgroup)
	if err := os.RemoveAll(filepath.Join(u.Dir, "log")); err != nil {
		return fmt.Errorf("removing logs of an earlier cluster: %w", err)
	}
	return network.Claim(func(index int) error {
		u.Index = index
		if err := u.Save(); err != nil {
			return err
		}
		if err := u.createControlPlane(); err != nil {
			return err
		}
		return network.ConnectMachine(u.Cluster, node.NetworkNamespace(u.NamespaceDir(), plan.ControlPlane))
	})
}

// createControlPlane makes the place of the control plane. Without Kubernetes it only
// carries the network.
func (u *up) createControlPlane() error {
	spec := node.Spec{
		Name: plan.ControlPlane, Dir: u.PlaceDir(plan.ControlPlane), Keep: u.NamespaceDir(), Address: u.APIServer().String(),
	}
	if u.Cluster.Kubernetes {
		programs := []string{"kubectl"}
		for _, c := range kube.ControlPlane(u.Cluster) {
			programs = append(programs, c.Name)
		}
		u.addKube(&spec, programs)
		var err error
		if u.authorities, err = kube.LoadAuthorities(u.Cluster, time.Now()); err != nil {
			return err
		}
		if spec.Files, err = kube.ControlPlaneFiles(u.Cluster, u.authorities, time.Now()); err != nil {
			return err
		}
	}
	return u.create(spec)
}

// addKube gives a place programs of Kubernetes: links to the one file that holds them all.
func (u *up) addKube(spec *node.Spec, programs []string) {
	const tree = "/opt/devcluster/kube"
	if spec.Trees == nil {
		spec.Trees = map[string]string{}
	}
	spec.Trees[tree] = filepath.Dir(u.binaries.Kube)
	if spec.Links == nil {
		spec.Links = map[string]string{}
	}
	for _, program := range programs {
		spec.Links[program] = filepath.Join(tree, filepath.Base(u.binaries.Kube))
	}
}

func (u *up) create(spec node.Spec) error {
	if _, err := os.Stat(u.offFile(spec.Name)); err == nil {
		spec.Again = true
	} else if err := os.RemoveAll(spec.Dir); err != nil {
		return fmt.Errorf("removing what an earlier %s has left: %w", spec.Name, err)
	}
	if err := u.groups.Make(u.SystemCgroup(spec.Name)); err != nil {
		return err
	}
	if u.Cluster.SystemdCgroup && spec.Name != plan.ControlPlane {
		// A kubelet wants the group that it is to make others in. systemd takes it for its own
		// with the first of these.
		if err := u.groups.Make(u.NodeSlice(spec.Name)); err != nil {
			return err
		}
	}
	if err := node.Create(spec); err != nil {
		return err
	}
	if err := os.Remove(u.offFile(spec.Name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("switching %s on: %w", spec.Name, err)
	}
	return nil
}

// fill starts everything that does not run and waits until it is ready.
func (u *up) fill(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(u.Cluster.Dir, "log"), 0o755); err != nil {
		return fmt.Errorf("making the directory of logs: %w", err)
	}
	if u.Cluster.Kubernetes {
		var err error
		if u.authorities, err = kube.LoadAuthorities(u.Cluster, time.Now()); err != nil {
			return err
		}
		if err := u.writeKubeconfig(); err != nil {
			return err
		}
		if err := u.linkKubectl(); err != nil {
			return err
		}
	}
	group, groupCtx := errgroup.WithContext(ctx)
	if u.Cluster.Kubernetes {
		group.Go(func() error { return u.startControlPlane(groupCtx) })
	}
	for i := 1; i <= u.Cluster.Nodes; i++ {
		group.Go(func() error { return u.startRuntime(groupCtx, i) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := network.RoutePods(u.Cluster, func(place string) string { return node.NetworkNamespace(u.NamespaceDir(), place) }); err != nil {
		return err
	}
	if !u.Cluster.Kubernetes {
		return nil
	}
	group, groupCtx = errgroup.WithContext(ctx)
	for i := 1; i <= u.Cluster.Nodes; i++ {
		group.Go(func() error { return u.startNode(groupCtx, i) })
	}
	group.Go(func() error { return u.awaitNamespace(groupCtx) })
	return group.Wait()
}

func (u *up) writeKubeconfig() error {
	if _, err := os.Stat(u.Kubeconfig()); err == nil {
		return nil
	}
	text, err := kube.AdminKubeconfig(u.Cluster, u.authorities, time.Now())
	if err != nil {
		return err
	}
	temp := u.Kubeconfig() + ".tmp"
	if err := os.WriteFile(temp, []byte(text), 0o600); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	if err := os.Rename(temp, u.Kubeconfig()); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	return nil
}

// linkKubectl puts kubectl beside the project's own programs.
func (u *up) linkKubectl() error {
	bin := filepath.Join(u.Root, "bin")
	link := filepath.Join(bin, "kubectl")
	if target, err := os.Readlink(link); err == nil && target == u.binaries.Kube {
		return nil
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return fmt.Errorf("linking kubectl: %w", err)
	}
	temp := link + ".tmp"
	_ = os.Remove(temp) // of an interrupted run
	if err := os.Symlink(u.binaries.Kube, temp); err != nil {
		return fmt.Errorf("linking kubectl: %w", err)
	}
	if err := os.Rename(temp, link); err != nil {
		return fmt.Errorf("linking kubectl: %w", err)
	}
	return nil
}

// supervisor makes sure that the place's supervisor runs.
func (u *up) supervisor(ctx context.Context, place string) (supervise.Client, error) {
	client := u.client(place)
	if _, err := client.Status(ctx); err == nil {
		return client, nil
	} else if !errors.Is(err, supervise.ErrNotRunning) {
		return client, named(place, err)
	}
	log, err := os.OpenFile(u.LogFile(place, "supervisor"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return client, fmt.Errorf("starting the supervisor of %s: %w", place, err)
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", SuperviseCommand, "--state", u.Cluster.Dir, place)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return client, fmt.Errorf("starting the supervisor of %s: %w", place, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for deadline := time.Now().Add(u.patient(20 * time.Second)); ; {
		if _, err := client.Status(ctx); err == nil {
			return client, nil
		}
		select {
		case err := <-ended:
			return client, fmt.Errorf("the supervisor of %s ended at once (%v); its last lines:\n%s", place, err, u.Tail(place, "supervisor", 10))
		case <-ctx.Done():
			return client, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return client, fmt.Errorf("the supervisor of %s does not answer; its last lines:\n%s", place, u.Tail(place, "supervisor", 10))
		}
	}
}

// run starts a component and waits until ready returns nil.
func (u *up) run(ctx context.Context, client supervise.Client, place string, c supervise.Component, within time.Duration, ready func(context.Context) error) error {
	if err := client.Start(ctx, c); err != nil {
		return u.failure(place, c.Name, err)
	}
	deadline := time.Now().Add(within)
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err() // another step has failed: its error is the one to show
		}
		if time.Now().After(deadline) {
			return u.failure(place, c.Name, fmt.Errorf("not ready after %s: %w", within, err))
		}
		if s, statusErr := u.component(ctx, client, c.Name); statusErr == nil && s.Restarts >= 6 && s.State == supervise.Waiting {
			return u.failure(place, c.Name, fmt.Errorf("ended %d times, at last with %s", s.Restarts, s.LastExit))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (u *up) component(ctx context.Context, client supervise.Client, name string) (supervise.Status, error) {
	all, err := client.Status(ctx)
	if err != nil {
		return supervise.Status{}, err
	}
	for _, s := range all {
		if s.Name == name {
			return s, nil
		}
	}
	return supervise.Status{}, fmt.Errorf("component %s is not there", name)
}

// failure says which component failed, what it said last, and what to try.
func (u *up) failure(place, component string, err error) error {
	lines := u.Tail(place, component, 20)
	return fmt.Errorf("%s on %s: %w\nits last lines:\n%s\nwhat to try: %s", component, place, err, indent(lines), kube.Explain(lines))
}

func indent(text string) string { return "    " + strings.ReplaceAll(text, "\n", "\n    ") }

func (u *up) startControlPlane(ctx context.Context) error {
	client, err := u.supervisor(ctx, plan.ControlPlane)
	if err != nil {
		return err
	}
	api, err := u.api()
	if err != nil {
		return err
	}
	for _, c := range kube.ControlPlane(u.Cluster) {
		ready := func(context.Context) error { return nil }
		if c.Name == "kube-apiserver" {
			ready = func(ctx context.Context) error { _, err := api.get(ctx, "/readyz"); return err }
		}
		if err := u.run(ctx, client, plan.ControlPlane, c, u.patient(2*time.Minute), ready); err != nil {
			return err
		}
	}
	u.say("the control plane is ready at %s", kube.URL(u.Cluster))
	return nil
}

// startRuntime makes node i and starts its container runtime.
func (u *up) startRuntime(ctx context.Context, i int) error {
	name := plan.NodeName(i)
	if !node.Exists(u.NamespaceDir(), name) {
		if err := u.createNode(i); err != nil {
			return err
		}
	}
	namespace := func(place string) string { return node.NetworkNamespace(u.NamespaceDir(), place) }
	if err := network.ConnectNode(u.Cluster, i, namespace(name), namespace(plan.ControlPlane)); err != nil {
		return err
	}
	client, err := u.supervisor(ctx, name)
	if err != nil {
		return err
	}
	c := kube.Containerd(u.Cluster, name)
	err = u.run(ctx, client, name, c, u.patient(time.Minute), func(ctx context.Context) error {
		s, err := u.component(ctx, client, c.Name)
		if err != nil {
			return err
		}
		if s.PID == 0 {
			return errors.New("it does not run")
		}
		runtime, err := cri.Dial(cri.Socket(s.PID, kube.ContainerdSocket))
		if err != nil {
			return err
		}
		defer runtime.Close()
		return runtime.Ready(ctx)
	})
	if err != nil {
		return err
	}
	if err := u.loadImages(ctx, name); err != nil {
		return err
	}
	u.say("%s has its container runtime", name)
	return nil
}

// loadImages gives a node the images that every node has, unless it has them.
func (u *up) loadImages(ctx context.Context, name string) error {
	done := filepath.Join(u.PlaceDir(name), "images-loaded")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	for _, archive := range u.binaries.Images {
		if err := u.loadInto(ctx, name, archive); err != nil {
			return err
		}
	}
	if err := os.WriteFile(done, nil, 0o644); err != nil {
		return fmt.Errorf("%s: recording that images are loaded: %w", name, err)
	}
	return nil
}

func (u *up) createNode(i int) error {
	name := plan.NodeName(i)
	spec := node.Spec{
		Name: name, Dir: u.PlaceDir(name), Keep: u.NamespaceDir(), Address: u.NodeAddress(i).String(), Forward: true,
		Programs: map[string]string{},
		Trees:    map[string]string{"/opt/devcluster/criu": u.binaries.CRIU},
		// Test programs are built in the checkout and run on nodes.
		Shared: []string{u.Root},
		Files:  kube.RuntimeFiles(u.Cluster, i, u.limited),
	}
	for _, program := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc"} {
		spec.Programs[program] = filepath.Join(u.binaries.Runtime, program)
	}
	if u.limited {
		spec.Preload = u.binaries.Prlimit
	}
	if u.Cluster.SystemdCgroup {
		spec.Shared = append(spec.Shared, "/run/systemd", "/run/dbus") // where it is asked
	}
	if u.Cluster.Crun {
		// It refuses machines with cgroups of both versions where version 2 has a controller.
		spec.Empty = []string{"/sys/fs/cgroup/unified/cgroup.controllers"}
		spec.Trees["/opt/devcluster/crun"] = u.binaries.Crun
		spec.Links = map[string]string{"crun": "/opt/devcluster/crun/bin/crun"}
	}
	if u.Cluster.GVisor {
		for _, program := range []string{"runsc", "containerd-shim-runsc-v1", "shim-launch"} {
			spec.Programs[program] = filepath.Join(u.binaries.GVisor, program)
		}
	}
	if u.Cluster.Kubernetes {
		u.addKube(&spec, []string{"kubelet", "kube-proxy", "kubectl"})
		files, err := kube.NodeFiles(u.Cluster, i, u.authorities, time.Now())
		if err != nil {
			return err
		}
		for path, text := range files {
			spec.Files[path] = text
		}
	}
	return u.create(spec)
}

// startNode starts what makes node i a node of the cluster and waits until it is ready.
func (u *up) startNode(ctx context.Context, i int) error {
	name := plan.NodeName(i)
	client, err := u.supervisor(ctx, name)
	if err != nil {
		return err
	}
	api, err := u.api()
	if err != nil {
		return err
	}
	for _, c := range kube.Node(u.Cluster, i) {
		ready := func(context.Context) error { return nil }
		if c.Name == "kubelet" {
			ready = func(ctx context.Context) error { return api.nodeReady(ctx, name) }
		}
		if err := u.run(ctx, client, name, c, u.patient(2*time.Minute), ready); err != nil {
			return err
		}
	}
	u.say("%s is Ready", name)
	return nil
}

// awaitNamespace waits until Pods can be created in the default namespace.
func (u *up) awaitNamespace(ctx context.Context) error {
	api, err := u.api()
	if err != nil {
		return err
	}
	for _, path := range []string{"/api/v1/namespaces/default/serviceaccounts/default", "/api/v1/namespaces/default/configmaps/kube-root-ca.crt"} {
		for deadline := time.Now().Add(u.patient(time.Minute)); ; {
			_, err := api.get(ctx, path)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return u.failure(plan.ControlPlane, "kube-controller-manager", fmt.Errorf("it does not make %s: %w", path, err))
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	u.say("Pods can be created")
	return nil
}

// api asks the API server, as an administrator.
type api struct {
	url    string
	client *http.Client
}

func (u *up) api() (api, error) {
	pair, err := u.authorities.Cluster.Issue(pki.Identity{CommonName: "devcluster-up", Organization: []string{"system:masters"}, Client: true}, time.Now())
	if err != nil {
		return api{}, err
	}
	cert, err := tls.X509KeyPair([]byte(pair.Cert), []byte(pair.Key))
	if err != nil {
		return api{}, fmt.Errorf("preparing requests to the API server: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(u.authorities.Cluster.CertPEM))
	return api{kube.URL(u.Cluster), &http.Client{
		Timeout:   u.patient(5 * time.Second),
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}, DisableKeepAlives: true},
	}}, nil
}

func (a api) get(ctx context.Context, path string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", path, response.Status)
	}
	return text, nil
}

func (a api) nodeReady(ctx context.Context, name string) error {
	text, err := a.get(ctx, "/api/v1/nodes/"+name)
	if err != nil {
		return err
	}
	var object struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := json.Unmarshal(text, &object); err != nil {
		return fmt.Errorf("reading node %s: %w", name, err)
	}
	for _, c := range object.Status.Conditions {
		if c.Type == "Ready" {
			if c.Status == "True" {
				return nil
			}
			return errors.New(c.Message)
		}
	}
	return errors.New("the node says nothing yet")
}
