// Package cri_test tests the CRI layer on a real node without Kubernetes:
// containerd, runc and CRIU, and Stasis as a user of containerd alone has it,
// installed by "stasis-agent install" and run as "stasis-agent --no-kubernetes".
//
// The node comes from bin/devcluster; "make test-cri" builds what is needed.
package cri_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hostns"
)

// theNode is the one that all tests share.
var theNode *node

func TestMain(m *testing.M) {
	becomeARuntime()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	n, err := newNode()
	if err == nil {
		theNode = n
		code = m.Run()
	}
	if downErr := n.down(); downErr != nil || err != nil {
		fmt.Fprintf(os.Stderr, "test/cri: %v\n", errors.Join(err, downErr))
		return 1
	}
	return code
}

// node is a host with containerd, and Stasis' CRI layer beside it.
type node struct {
	root, state, payload string
	dist                 string // what was built: programs, and CRIU
	host                 *hostns.Host
	agent                *exec.Cmd
	agentLog             string
	runtime              runtimeapi.RuntimeServiceClient // containerd's CRI
	stasis               runtimeapi.RuntimeServiceClient // the CRI service of Stasis
}

func newNode() (n *node, err error) {
	n = &node{}
	if n.root, err = filepath.Abs("../.."); err != nil {
		return n, err
	}
	if n.dist = os.Getenv("STASIS_DIST"); n.dist == "" {
		n.dist = n.root + "/dist"
	}
	for _, name := range []string{n.root + "/bin/devcluster", n.dist + "/bin/stasis-agent", n.dist + "/bin/stasis-runtime", n.dist + "/bin/stasis-restore", n.dist + "/criu/VERSION"} {
		if _, err := os.Stat(name); err != nil {
			return n, fmt.Errorf("not everything is built: run \"make test-cri\": %w", err)
		}
	}
	if n.state = os.Getenv("STASIS_CRI_STATE"); n.state == "" { // two runs at a time need one each
		n.state = filepath.Join(n.root, ".devcluster-cri")
	}
	if err := n.devcluster("down"); err != nil {
		return n, err
	}
	flags := []string{"--gvisor", "--crun"}
	if given := os.Getenv("STASIS_CRI_CLUSTER"); given != "" { // another OCI runtime, other versions
		flags = strings.Fields(given)
	}
	bySystemd = slices.Contains(flags, "--systemd-cgroup")
	if err := n.devcluster(append([]string{"up", "--no-kubernetes"}, flags...)...); err != nil {
		return n, err
	}
	if n.payload, err = os.MkdirTemp(n.dist, "payload-"); err != nil {
		return n, err
	}
	for _, args := range [][]string{
		{"install", "-D", n.dist + "/bin/stasis-runtime", n.payload + "/bin/stasis-runtime"},
		{"install", "-D", n.dist + "/bin/stasis-restore", n.payload + "/bin/stasis-restore"},
		{"cp", "-a", n.dist + "/criu/.", n.payload + "/criu"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return n, fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	if err := n.devcluster("exec", "node-1", "--", n.dist+"/bin/stasis-agent", "install", "--payload", n.payload); err != nil {
		return n, err
	}
	if err := n.connect(); err != nil {
		return n, err
	}
	return n, n.startAgent()
}

// devcluster runs bin/devcluster on the node's state directory.
func (n *node) devcluster(args ...string) error {
	_, err := n.devclusterOutput(args...)
	return err
}

func (n *node) devclusterOutput(args ...string) ([]byte, error) {
	cmd := exec.Command(n.root+"/bin/devcluster", append([]string{"--state", n.state}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("devcluster %v: %w: %s%s", args, err, out, stderr.Bytes())
	}
	return out, nil
}

// connect finds the node's mount namespace and containerd's socket in it.
func (n *node) connect() error {
	out, err := n.devclusterOutput("status", "-o", "json")
	if err != nil {
		return err
	}
	var places []struct{ RuntimeSocket string }
	if err := json.Unmarshal(out, &places); err != nil || len(places) != 1 {
		return fmt.Errorf("devcluster status: %w: %s", err, out)
	}
	if n.host, err = hostns.FromSocket(places[0].RuntimeSocket); err != nil {
		return err
	}
	n.runtime, err = n.dial("/run/containerd/containerd.sock")
	return err
}

func (n *node) dial(socket string) (runtimeapi.RuntimeServiceClient, error) {
	conn, err := grpc.NewClient("unix://"+n.host.Path(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return runtimeapi.NewRuntimeServiceClient(conn), nil
}

// startAgent starts the agent on the node and waits until it answers.
func (n *node) startAgent(flags ...string) error {
	n.agentLog = n.state + "/log/stasis-agent.log"
	log, err := os.OpenFile(n.agentLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	return n.startAgentWithLog(log, flags...)
}

func (n *node) startAgentWithLog(log *os.File, flags ...string) (err error) {
	n.agent = exec.Command(n.root+"/bin/devcluster", append([]string{"--state", n.state, "exec", "node-1", "--",
		n.dist + "/bin/stasis-agent", "--no-kubernetes", "--metrics-address=",
		"--lazy-restore-bandwidth=8", "--min-free-disk=0.01"}, // whatever else is on this machine's disk
		flags...)...)
	n.agent.Stdout, n.agent.Stderr = log, log
	if err := n.agent.Start(); err != nil {
		return err
	}
	if n.stasis, err = n.dial("/run/stasis/cri.sock"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := n.stasis.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		text, _ := os.ReadFile(n.agentLog)
		return fmt.Errorf("the agent does not answer: %w\n%s", err, text)
	}
	return nil
}

// agentPID is the agent's own process.
func (n *node) agentPID() (int, error) { return hostns.PeerPID(n.host.Path("/run/stasis/agent.sock")) }

// stopAgent ends the agent with a signal and waits for its end.
func (n *node) stopAgent(signal syscall.Signal) error {
	pid, err := n.agentPID()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, signal); err != nil {
		return err
	}
	n.agent.Wait() // its exit code is the signal's
	n.agent = nil
	return nil
}

func (n *node) down() error {
	var errs []error
	if n.agent != nil {
		errs = append(errs, n.stopAgent(syscall.SIGTERM))
	}
	if n.host != nil {
		errs = append(errs, n.host.Close())
	}
	if n.payload != "" {
		errs = append(errs, os.RemoveAll(n.payload))
	}
	if n.state != "" {
		errs = append(errs, n.devcluster("down"))
	}
	return errors.Join(append(errs, removePodCgroups())...)
}

// removeCgroup removes a cgroup, which is busy for a moment after its last process has ended.
func removeCgroup(dir string) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// removePodCgroups removes the cgroups of this run's Pods, which on an ordinary node the
// kubelet makes and removes.
func removePodCgroups() error {
	var errs []error
	for name := range podNames {
		if bySystemd {
			if out, err := exec.Command("systemctl", "stop", sliceOf(name)).CombinedOutput(); err != nil {
				errs = append(errs, fmt.Errorf("systemctl stop %s: %w: %s", sliceOf(name), err, out))
			}
			continue
		}
		pods, err := filepath.Glob("/sys/fs/cgroup/*" + cgroupsOfPods + name)
		errs = append(errs, err)
		for _, pod := range pods {
			var dirs []string // outer ones first
			err := filepath.WalkDir(pod, func(path string, d fs.DirEntry, err error) error {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return err
			})
			errs = append(errs, err)
			for _, dir := range slices.Backward(dirs) {
				errs = append(errs, removeCgroup(dir))
			}
		}
	}
	return errors.Join(errs...)
}
