// Package cluster gives tests a Kubernetes cluster with Stasis in it, and ways to
// act on it: as a user (kubectl and the plugins, as programs), through the API,
// and on the nodes.
package cluster

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-logr/logr"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Cluster is one devcluster.
type Cluster struct {
	root, state string
	config      *rest.Config
	clients     kubernetes.Interface
	client.WithWatch
}

// Patience is how many times longer than usual anything may take: STASIS_E2E_PATIENCE, by
// default once. On an emulated machine everything takes long.
var Patience = func() time.Duration {
	if times, err := strconv.Atoi(os.Getenv("STASIS_E2E_PATIENCE")); err == nil && times > 0 {
		return time.Duration(times)
	}
	return 1
}()

// Images are the archives that a node needs, below dist/images of the checkout.
var Images = []string{"stasis-agent", "stasis-controller", "stasis-demo", "stasis-e2e", "stasis-objects"}

// Root finds the checkout: the directory with go.mod above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod in any directory above")
		}
		dir = parent
	}
}

// Attach uses the devcluster whose state is in the directory state.
func Attach(root, state string) (*Cluster, error) {
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	c := &Cluster{root: root, state: state}
	if c.config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return nil, err
	}
	// Tests wait by asking often; the client's own brake would make them slow.
	c.config.QPS, c.config.Burst = 200, 400
	c.config.WarningHandler = rest.NoWarnings{}
	log.SetLogger(logr.Discard()) // else controller-runtime complains that there is none
	if c.clients, err = kubernetes.NewForConfig(c.config); err != nil {
		return nil, err
	}
	c.WithWatch, err = connect(c.config)
	return c, err
}

func connect(config *rest.Config) (client.WithWatch, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{batchv1.AddToScheme, corev1.AddToScheme, nodev1.AddToScheme, rbacv1.AddToScheme, checkpointv1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return client.NewWithWatch(config, client.Options{Scheme: scheme})
}

// Up starts a devcluster; flags are more of its command "up". The Cluster is there, to
// be taken down, also after an error.
func Up(ctx context.Context, root, state string, nodes int, flags ...string) (*Cluster, error) {
	c := &Cluster{root: root, state: state}
	if out, err := c.Devcluster(ctx, append([]string{"up", "--nodes", fmt.Sprint(nodes)}, flags...)...); err != nil {
		return c, fmt.Errorf("%w\n%s", err, out)
	}
	attached, err := Attach(root, state)
	if err != nil {
		return c, err
	}
	return attached, nil
}

// Down takes the devcluster away.
func (c *Cluster) Down(ctx context.Context) error {
	if out, err := c.Devcluster(ctx, "down"); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// Install puts Stasis into the cluster as the README tells users to.
func (c *Cluster) Install(ctx context.Context) error {
	return c.InstallFrom(ctx, "config/install")
}

// InstallFrom puts Stasis into the cluster as a kustomization has it. STASIS_DIST
// names another directory than dist to take the images from.
func (c *Cluster) InstallFrom(ctx context.Context, kustomization string) error {
	dist := cmp.Or(os.Getenv("STASIS_DIST"), filepath.Join(c.root, "dist"))
	for _, image := range Images {
		if out, err := c.Devcluster(ctx, "load", filepath.Join(dist, "images", image+".tar")); err != nil {
			return fmt.Errorf("%w (is it built? make images images-e2e)\n%s", err, out)
		}
	}
	ready := "--timeout=" + (Patience * 2 * time.Minute).String()
	for _, args := range [][]string{
		{"apply", "-k", kustomization},
		{"-n", "stasis-system", "rollout", "status", "deployment", ready},
		{"-n", "stasis-system", "rollout", "status", "daemonset", ready},
	} {
		if _, err := c.Kubectl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Kubeconfig is the file to reach the cluster with.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.state, "kubeconfig") }

// As is the API as another user sees it.
func (c *Cluster) As(user string) (client.WithWatch, error) {
	config := rest.CopyConfig(c.config)
	config.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:authenticated"}}
	return connect(config)
}

// Devcluster runs a command of devcluster and returns what it printed.
func (c *Cluster) Devcluster(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, "bin/devcluster", append([]string{"--state", c.state}, args...)...)
}

// OnNode runs a shell command on a node.
func (c *Cluster) OnNode(ctx context.Context, node, script string) (string, error) {
	return c.Devcluster(ctx, "exec", node, "--", "/bin/sh", "-euc", script)
}

// Kubectl runs kubectl and returns its standard output; what it says on standard
// error is in the error.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, "bin/kubectl", append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
}

// Plugin runs kubectl-NAME.
func (c *Cluster) Plugin(ctx context.Context, name string, args ...string) (string, error) {
	return c.run(ctx, "bin/kubectl-"+name, append(args, "--kubeconfig", c.Kubeconfig())...)
}

// PluginCommand is kubectl-NAME to be started, and killed.
func (c *Cluster) PluginCommand(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.root, "bin/kubectl-"+name), append(args, "--kubeconfig", c.Kubeconfig())...)
	cmd.Dir = c.root
	return cmd
}

func (c *Cluster) run(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.root, program), args...)
	cmd.Dir = c.root
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Log is what a container has written.
func (c *Cluster) Log(ctx context.Context, pod *corev1.Pod, container string) (string, error) {
	text, err := c.clients.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: container}).DoRaw(ctx)
	return string(text), err
}

// Follow starts kubectl and returns what it prints, as it comes, and a function
// that waits for its end.
func (c *Cluster) Follow(ctx context.Context, args ...string) (io.Reader, func() error, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.root, "bin/kubectl"), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	return out, cmd.Wait, nil
}

// Diagnose writes what a person would look at first.
func (c *Cluster) Diagnose(ctx context.Context, w io.Writer) {
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "podcheckpoints", "-A"},
		{"-n", "stasis-system", "get", "events"},
		{"-n", "stasis-system", "logs", "deployment/stasis-controller", "--tail=20"},
		{"-n", "stasis-system", "logs", "daemonset/stasis-agent", "--tail=40", "--all-pods"},
	} {
		out, err := c.Kubectl(ctx, args...)
		fmt.Fprintf(w, "$ kubectl %s\n%s", strings.Join(args, " "), out)
		if err != nil {
			fmt.Fprintln(w, err)
		}
	}
}

// Exec runs a command in a container and returns its standard output; what it says
// on standard error is in the error. It starts no program of its own, so that it
// can be done often.
func (c *Cluster) Exec(ctx context.Context, pod *corev1.Pod, container string, command ...string) (string, error) {
	url := c.clients.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	executor, err := remotecommand.NewWebSocketExecutor(c.config, "GET", url.String())
	if err != nil {
		return "", err
	}
	var out, complaint bytes.Buffer
	if err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &complaint}); err != nil {
		return out.String(), fmt.Errorf("%s in %s of Pod %s: %w: %s", strings.Join(command, " "), container, pod.Name, err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}
