// Package install tests that Stasis comes onto a node, stays through the death of
// its parts, and goes from it again, on a cluster of one node that it has to
// itself. Needed are bin/devcluster, bin/kubectl and the images.
//
//	make test-install
package install

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/e2e/cluster"
)

const (
	nodeName  = "node-1"
	namespace = "default"
	patience  = 90 * time.Second
)

var it *cluster.Cluster

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	root, err := cluster.Root()
	if err != nil {
		return 1, err
	}
	if err := os.Chdir(root); err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	it, err = cluster.Up(ctx, root, filepath.Join(root, ".devcluster-install"), 1)
	defer func() { err = errors.Join(err, it.Down(context.Background())) }()
	if err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// TestInstallationLivesAndGoes is one story: each part starts from where the one
// before it left the node.
func TestInstallationLivesAndGoes(t *testing.T) {
	for _, part := range []struct {
		name string
		test func(*testing.T, *story)
	}{
		{"ordinary Pods come and go", ordinary},
		{"an install adds a handler and nothing else", installs},
		{"the agent reads Pods of its own node by name and nothing more", rights},
		{"an agent that starts again touches nothing", startsAgain},
		{"a stopped agent finishes its checkpoint first", stopped},
		{"a killed containerd does not disturb a checkpoint", containerdKilled},
		{"a killed agent leaves the Pod running and nothing on disk", killed},
		{"ordinary Pods come and go while webhooks and agents are killed, as before", away},
		{"disabling and enabling again loses nothing, and ordinary Pods come and go meanwhile", disabled},
		{"an uninstall waits for the last restored Pod and leaves the node as it was", uninstalls},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(t, &state) }) {
			it.Diagnose(context.Background(), os.Stderr)
			t.FailNow() // the rest would start from somewhere else
		}
	}
}

// story is what later parts need of earlier ones.
type story struct {
	before   string    // the container runtime's configuration before anything
	ordinary []passage // ordinary Pods before anything
}

var state story

func ordinary(t *testing.T, s *story) {
	warming := 0
	eventually(t, "the cluster has warmed up", func() error {
		warming++
		if p := pass(t.Context(), fmt.Sprint("warming-", warming)); len(p.wrong) > 0 {
			return fmt.Errorf("%v", p.wrong)
		}
		return nil
	})
	s.ordinary = ordinaryPods(t, "before").end(t, 8)
	undisturbed(t, s.ordinary, s.ordinary)
}

func installs(t *testing.T, s *story) {
	s.before = onNode(t, "cd /etc/containerd && find . -type f | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	pid := containerdPID(t)
	if err := it.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if containerdPID(t) == pid {
		t.Error("containerd was not restarted, though it has a new handler")
	}
	changed := onNode(t, "cd /etc/containerd && find . -type f ! -path ./conf.d/stasis.toml | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	if changed != s.before {
		t.Errorf("other files of containerd's configuration changed:\n%s\nwas\n%s", changed, s.before)
	}
	if out := onNode(t, "cat /opt/stasis/etc/runtime.json; stat -c %a /run/stasis/agent.sock /run/stasis/cri.sock /var/lib/stasis"); out != "{\"runtime\":\"/usr/local/bin/runc\"}\n600\n600\n700\n" {
		t.Errorf("on the node:\n%s", out)
	}
	makeBig(t)
}

func rights(t *testing.T, _ *story) {
	agent, err := it.As("system:serviceaccount:stasis-system:stasis-agent")
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.List(t.Context(), &corev1.SecretList{}); err == nil {
		t.Error("the agent may list Secrets")
	}
	if err := agent.List(t.Context(), &corev1.PodList{}); err == nil {
		t.Error("the agent may list Pods")
	}
	// Its rights to write are for tokens that are bound to a node.
	pcp := &v1alpha1.PodCheckpoint{}
	pcp.Namespace, pcp.Name, pcp.Spec.SourcePodName = namespace, "of-nobody", "nobody"
	if err := it.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	defer it.Delete(context.Background(), pcp)
	// A patch: the controller ends the object at about the same time.
	claim := client.RawPatch(types.MergePatchType, []byte(`{"status":{"nodeName":"`+nodeName+`"}}`))
	if err := agent.Status().Patch(t.Context(), pcp.DeepCopy(), claim); err == nil || !strings.Contains(err.Error(), "token names no node") {
		t.Errorf("a token without a node: %v", err)
	}
}

func startsAgain(t *testing.T, _ *story) {
	const installed = "find /opt/stasis /etc/containerd -printf '%p %T@\\n' | sort"
	pid, files := containerdPID(t), onNode(t, installed)
	kubectl(t, "-n", "stasis-system", "rollout", "restart", "daemonset", "stasis-agent")
	kubectl(t, "-n", "stasis-system", "rollout", "status", "daemonset", "stasis-agent", "--timeout=120s")
	if now := containerdPID(t); now != pid {
		t.Errorf("containerd was restarted: process %s, was %s", now, pid)
	}
	if now := onNode(t, installed); now != files {
		t.Errorf("files were touched:\n%s\nwere\n%s", now, files)
	}
}
