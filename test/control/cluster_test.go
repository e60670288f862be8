// Package control tests the control plane against a real kube-apiserver and etcd:
// CRD, roles, policies and webhooks as config/ installs them, and the controller
// with the rights of its own service account. There is no kubelet and no
// scheduler: the tests play the node.
package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/controller"
	"podstasis.dev/stasis/internal/controlplane"
)

// kubeBin names the environment variable with the directory of the Kubernetes
// programs: etcd, kube-apiserver and kubectl, or the one file "kube" that is all
// of them.
const kubeBin = "STASIS_KUBE_BIN"

// configDir names the environment variable with another directory than config;
// test/mutants uses it.
const configDir = "STASIS_CONFIG"

const systemNamespace = "stasis-system"

// cluster is the API server that all tests share.
type cluster struct {
	admin  *rest.Config
	client client.Client // as admin
	clean  []func()
	// plane is the control plane that runs now.
	plane *plane
	// registry holds its metrics.
	registry *prometheus.Registry
	// webhooks and aggregated are where the API server calls the control plane.
	webhooks, aggregated int
	kubectl              string
	// audit is the file that requests to the aggregated API are recorded in.
	audit string
}

// plane is a running control plane.
type plane struct {
	stop context.CancelFunc
	done chan error
}

var (
	shared *cluster
	scheme = runtime.NewScheme()
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	// What libraries log while a control plane comes and goes is of no use here.
	ctrl.SetLogger(logr.Discard())
	klog.SetLogger(logr.Discard())
	log.SetOutput(io.Discard)
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, checkpointv1alpha1.AddToScheme, subresources.AddToScheme} {
		if err := add(scheme); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	shared = &cluster{}
	defer shared.stop()
	return m.Run()
}

// once starts the cluster for the first test. It does not do so before the tests
// begin, for then `go test` would not see which files and variables they depend
// on, and take an old result for this one.
var once = sync.OnceValue(func() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return shared.start(ctx)
})

func (c *cluster) stop() {
	if c.plane != nil {
		c.plane.end()
	}
	for i := len(c.clean) - 1; i >= 0; i-- {
		c.clean[i]()
	}
}

func (c *cluster) start(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "stasis-control-")
	if err != nil {
		return err
	}
	c.clean = append(c.clean, func() { os.RemoveAll(dir) })
	bin, err := programs(dir)
	if err != nil {
		return err
	}
	ports, err := freePorts(5)
	if err != nil {
		return err
	}
	etcd := fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	peer := fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	c.webhooks, c.aggregated = ports[3], ports[4]
	c.kubectl, c.audit = bin["kubectl"], filepath.Join(dir, "audit.log")
	etcdDied, err := c.daemon(filepath.Join(dir, "etcd.log"), bin["etcd"],
		"--data-dir", filepath.Join(dir, "etcd-data"), "--unsafe-no-fsync", "--log-level", "error",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return err
	}
	token := rand.Text()
	key := filepath.Join(dir, "sa.key")
	for path, content := range map[string][]byte{
		filepath.Join(dir, "tokens.csv"): []byte(token + `,admin,admin,"system:masters"` + "\n"),
		key:                              privateKey(),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
	}
	if err := writeFrontProxy(dir); err != nil {
		return err
	}
	apiLog := filepath.Join(dir, "kube-apiserver.log")
	apiDied, err := c.daemon(apiLog, bin["kube-apiserver"],
		"--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1",
		"--secure-port", fmt.Sprint(ports[2]), "--endpoint-reconciler-type", "none",
		"--cert-dir", filepath.Join(dir, "certs"), "--token-auth-file", filepath.Join(dir, "tokens.csv"),
		"--authorization-mode", "RBAC", "--allow-privileged", "--service-cluster-ip-range", "10.96.0.0/16",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", key, "--service-account-signing-key-file", key,
		"--requestheader-client-ca-file", filepath.Join(dir, "front-proxy-ca.crt"), "--requestheader-allowed-names", "front-proxy-client",
		"--requestheader-username-headers", "X-Remote-User", "--requestheader-group-headers", "X-Remote-Group",
		"--requestheader-extra-headers-prefix", "X-Remote-Extra-",
		"--proxy-client-cert-file", filepath.Join(dir, "front-proxy-client.crt"), "--proxy-client-key-file", filepath.Join(dir, "front-proxy-client.key"))
	if err != nil {
		return err
	}
	c.admin = &rest.Config{
		Host:        fmt.Sprintf("https://127.0.0.1:%d", ports[2]),
		BearerToken: token,
		QPS:         -1,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: filepath.Join(dir, "certs", "apiserver.crt"),
		},
	}
	if err := c.waitReady(ctx, etcdDied, apiDied, apiLog); err != nil {
		return err
	}
	if c.client, err = client.New(c.admin, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	if err := c.install(ctx, bin["kubectl"]); err != nil {
		return err
	}
	c.plane, err = c.startPlane(ctx)
	return err
}

// waitReady waits for the API server, or for one of the two to give up.
func (c *cluster) waitReady(ctx context.Context, etcdDied, apiDied <-chan error, apiLog string) error {
	for {
		select {
		case err := <-etcdDied:
			return fmt.Errorf("etcd ended: %w", err)
		case err := <-apiDied:
			return fmt.Errorf("kube-apiserver ended: %w\n%s", err, tail(apiLog))
		case <-ctx.Done():
			return fmt.Errorf("kube-apiserver did not become ready:\n%s", tail(apiLog))
		case <-time.After(50 * time.Millisecond):
		}
		set, err := kubernetes.NewForConfig(c.admin)
		if err != nil {
			continue // its certificate is not there yet
		}
		if _, err := set.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err == nil {
			return nil
		}
	}
}

// install applies what users apply, with the webhooks' addresses turned from the
// Service, which nothing routes here, to this process.
func (c *cluster) install(ctx context.Context, kubectl string) error {
	// kubectl reads these, but `go test` only sees what is read here.
	config := configRoot()
	err := filepath.WalkDir(config, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		return err
	}
	rendered, err := exec.CommandContext(ctx, kubectl, "kustomize", config+"/install").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("kubectl kustomize config/install: %s", exit.Stderr)
		}
		return fmt.Errorf("kubectl kustomize config/install: %w", err)
	}
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(rendered), 4096)
	for {
		var object unstructured.Unstructured
		if err := decoder.Decode(&object); err != nil {
			break
		}
		if len(object.Object) == 0 {
			continue
		}
		if err := c.redirect(&object); err != nil {
			return err
		}
		if err := c.client.Create(ctx, &object); err != nil {
			return fmt.Errorf("create %s %s: %w", object.GetKind(), object.GetName(), err)
		}
	}
	// Served once the CRD is established, and in force once the API server has read
	// the policies.
	return eventually(ctx, func() error {
		err := c.client.List(ctx, &checkpointv1alpha1.PodCheckpointList{})
		if err == nil && !apierrors.IsForbidden(c.client.Delete(ctx, crd(), client.DryRunAll)) {
			err = errors.New("the policies are not in force")
		}
		return err
	})
}

func configRoot() string {
	if config := os.Getenv(configDir); config != "" {
		return config
	}
	return "../../config"
}

func (c *cluster) redirect(object *unstructured.Unstructured) error {
	if object.GetKind() == "APIService" {
		return unstructured.SetNestedField(object.Object, int64(c.aggregated), "spec", "service", "port")
	}
	if object.GetKind() == "Service" && object.GetName() == "stasis-apiserver" {
		// Nothing routes Services here: this one is a name for this machine.
		object.Object["spec"] = map[string]any{"type": "ExternalName", "externalName": "localhost"}
		return nil
	}
	webhooks, found, err := unstructured.NestedSlice(object.Object, "webhooks")
	if !found || err != nil {
		return err
	}
	for _, w := range webhooks {
		config := w.(map[string]any)["clientConfig"].(map[string]any)
		path, _, err := unstructured.NestedString(config, "service", "path")
		if err != nil {
			return err
		}
		delete(config, "service")
		config["url"] = fmt.Sprintf("https://127.0.0.1:%d%s", c.webhooks, path)
	}
	return unstructured.SetNestedSlice(object.Object, webhooks, "webhooks")
}

// startPlane runs the control plane with the rights of its service account.
func (c *cluster) startPlane(ctx context.Context) (*plane, error) {
	set, err := kubernetes.NewForConfig(c.admin)
	if err != nil {
		return nil, err
	}
	token, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(ctx, "stasis-controller", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("get a token of stasis-controller: %w", err)
	}
	config := rest.CopyConfig(c.admin)
	config.BearerToken = token.Status.Token

	c.registry = prometheus.NewRegistry()
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	audit, err := c.auditOptions()
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.Background())
	manager, err := controlplane.New(running, config, controlplane.Options{
		Namespace:        systemNamespace,
		WebhookHost:      "127.0.0.1",
		WebhookPort:      c.webhooks,
		WebhookService:   "stasis-webhook",
		WebhookHosts:     []string{"127.0.0.1"},
		CertificateName:  "stasis-webhook-cert",
		APIServerPort:    c.aggregated,
		APIServerService: "stasis-apiserver",
		Audit:            audit,
		Stores:           controller.StoreConfig{Every: 10 * time.Minute, Grace: time.Hour},
		MetricsAddress:   "0",
		HealthAddress:    "0",
		LeaderElection:   true,
		Repeatable:       true,
		Registry:         c.registry,
	}, log)
	if err != nil {
		stop()
		return nil, err
	}
	p := &plane{stop: stop, done: make(chan error, 1)}
	go func() { p.done <- manager.Start(running) }()
	err = eventually(ctx, func() error {
		select {
		case err := <-p.done:
			return fmt.Errorf("the control plane ended: %w\n%s", err, logged.String())
		default:
		}
		if err := c.webhooksAnswer(); err != nil {
			return fmt.Errorf("%w\n%s", err, logged.String())
		}
		if _, err := set.Discovery().ServerResourcesForGroupVersion(subresources.SchemeGroupVersion.String()); err != nil {
			return fmt.Errorf("the aggregated API does not answer: %w\n%s", err, logged.String())
		}
		return nil
	})
	if err != nil {
		stop()
		return nil, err
	}
	return p, nil
}

// webhooksAnswer says whether the API server calls both kinds of webhooks: a Pod without
// the mark of the first is refused by a policy, and of this one the second says what is
// wrong.
func (c *cluster) webhooksAnswer() error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: "probe", Annotations: map[string]string{
			checkpointv1alpha1.AnnotationRestoreFrom: "none", checkpointv1alpha1.AnnotationRestoreTicket: "x"}},
		Spec: corev1.PodSpec{ServiceAccountName: "stasis-controller", Containers: []corev1.Container{{Name: "a", Image: "i"}}},
	}
	err := c.client.Create(context.Background(), pod, client.DryRunAll)
	if err == nil || !strings.Contains(err.Error(), "is not for Pods") {
		return fmt.Errorf("the webhooks do not answer: %v", err)
	}
	return nil
}

func (p *plane) end() {
	p.stop()
	<-p.done
}

// daemon starts a program and ends it with the tests. The channel tells when it
// ends before.
func (c *cluster) daemon(log, program string, args ...string) (<-chan error, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	command := exec.Command(program, args...)
	command.Stdout, command.Stderr = out, out
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	died, ended := make(chan error, 1), make(chan struct{})
	go func() {
		err := command.Wait()
		died <- fmt.Errorf("%v: %s", err, tail(log))
		close(ended)
	}()
	c.clean = append(c.clean, func() {
		command.Process.Kill()
		<-ended
		out.Close()
	})
	return died, nil
}

// programs finds the Kubernetes programs.
func programs(dir string) (map[string]string, error) {
	from := os.Getenv(kubeBin)
	found := make(map[string]string)
	for _, name := range []string{"etcd", "kube-apiserver", "kubectl"} {
		if path := filepath.Join(from, name); from != "" && exists(path) {
			found[name] = path
			continue
		}
		all := filepath.Join(from, "kube")
		if from == "" || !exists(all) {
			return nil, fmt.Errorf("these tests run a real API server: set %s to the directory that holds the program %q (it is %q), as `make test` does", kubeBin, name, from)
		}
		all, err := filepath.Abs(all)
		if err != nil {
			return nil, err
		}
		found[name] = filepath.Join(dir, name)
		if err := os.Symlink(all, found[name]); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func freePorts(n int) ([]int, error) {
	ports := make([]int, n)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // after all have been chosen
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports, nil
}

func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}

// eventually tries until it works, or until a minute has gone: on a machine that does much
// else, what takes a moment takes that long.
func eventually(ctx context.Context, try func() error) error {
	return within(ctx, time.Minute, try)
}

// patiently is for what the API server does once a minute.
func patiently(ctx context.Context, try func() error) error {
	return within(ctx, 3*time.Minute, try)
}

func within(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(30 * time.Millisecond):
		}
	}
}
