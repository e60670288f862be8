package cri_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The sentences of RestorePod and its messages in cri-api v0.37's api.proto, one
// test each (C1).

// checkpointOf makes a checkpoint of a Pod that is gone when it returns.
func checkpointOf(t *testing.T, configs ...*runtimeapi.ContainerConfig) string {
	t.Helper()
	p := theNode.run(t, "", configs...)
	for _, c := range configs {
		p.numbers(t, c.Metadata.Name, 5)
	}
	dir, _ := p.checkpoint(t)
	return dir
}

func (n *node) sandboxes(t *testing.T) map[string]bool {
	t.Helper()
	answer, err := n.runtime.ListPodSandbox(testContext(t), &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	ids := map[string]bool{}
	for _, s := range answer.Items {
		ids[s.Id] = true
	}
	return ids
}

func TestRestorePodRefusesRequestsThatBreakItsContractAndMakesNoSandbox(t *testing.T) {
	a := container("a", counting)
	dir := checkpointOf(t, a)
	with := func(change func(c *runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
		c := container("a", counting)
		change(c)
		return c
	}
	before := theNode.sandboxes(t)
	for name, c := range map[string]struct {
		spoil   func(*runtimeapi.RestorePodRequest)
		code    codes.Code
		message string
	}{
		"a relative path":                  {func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath = "x" }, codes.InvalidArgument, "absolute"},
		"a path that is not there":         {func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath += "-nosuch" }, codes.NotFound, "missing"},
		"no sandbox configuration":         {func(r *runtimeapi.RestorePodRequest) { r.Config = nil }, codes.InvalidArgument, "config"},
		"an unknown handler":               {func(r *runtimeapi.RestorePodRequest) { r.RuntimeHandler = "nosuch" }, codes.InvalidArgument, "nosuch"},
		"a handler that cannot restore it": {func(r *runtimeapi.RestorePodRequest) { r.RuntimeHandler = "runc" }, codes.InvalidArgument, "runc"},
		"an unknown option":                {func(r *runtimeapi.RestorePodRequest) { r.Options = map[string]string{"lazy": "yes"} }, codes.InvalidArgument, `"lazy"`},
		"no containers":                    {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs = nil }, codes.InvalidArgument, "container_configs is empty"},
		"a container without a name": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs = []*runtimeapi.ContainerConfig{container("", counting)}
		}, codes.InvalidArgument, "empty or repeated"},
		"a container twice": {func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs = []*runtimeapi.ContainerConfig{a, a} }, codes.InvalidArgument, "empty or repeated"},
		"a container too many": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs = append(r.ContainerConfigs, container("b", counting))
		}, codes.InvalidArgument, `"b"`},
		"another container": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs = []*runtimeapi.ContainerConfig{container("z", counting)}
		}, codes.InvalidArgument, `"z"`},
		"another command": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs = []*runtimeapi.ContainerConfig{container("a", "sleep 1")}
		}, codes.FailedPrecondition, "command"},
		"another image": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[0] = with(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "localhost/pause:1" })
		}, codes.FailedPrecondition, "image"},
		"another user": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[0] = with(func(c *runtimeapi.ContainerConfig) {
				c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 12}
			})
		}, codes.FailedPrecondition, "user"},
		"another working directory": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[0] = with(func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/tmp" })
		}, codes.FailedPrecondition, "working directory"},
		"a terminal": {func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs[0] = with(func(c *runtimeapi.ContainerConfig) { c.Tty = true })
		}, codes.FailedPrecondition, "terminal"},
	} {
		t.Run(name, func(t *testing.T) {
			in := &runtimeapi.RestorePodRequest{
				CheckpointPath: dir, Config: sandboxConfig(podName()), RuntimeHandler: handler,
				ContainerConfigs: []*runtimeapi.ContainerConfig{a},
			}
			c.spoil(in)
			_, err := theNode.stasis.RestorePod(testContext(t), in)
			if status.Code(err) != c.code || !strings.Contains(status.Convert(err).Message(), c.message) {
				t.Errorf("got %v, want code %v and a message with %q", err, c.code, c.message)
			}
		})
	}
	if after := theNode.sandboxes(t); len(after) != len(before) {
		t.Errorf("there are %d sandboxes, before there were %d", len(after), len(before))
	}
}

func TestRestorePodRequiresADeadline(t *testing.T) {
	_, err := theNode.stasis.RestorePod(context.Background(), &runtimeapi.RestorePodRequest{})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v", err)
	}
}

func TestRestorePodRefusesDataThatWereAlteredOrRemovedAndNamesTheFile(t *testing.T) {
	for name, c := range map[string]struct {
		spoil   func(t *testing.T, dir string)
		code    codes.Code
		message string
	}{
		"one bit of a memory image": {func(t *testing.T, dir string) { flipBit(t, dir+"/containers/a/criu/pages-1.img") }, codes.DataLoss, "pages-1.img"},
		"one bit of the manifest":   {func(t *testing.T, dir string) { flipBit(t, dir+"/manifest.json") }, codes.DataLoss, ""},
		"a file removed":            {func(t *testing.T, dir string) { must(t, os.Remove(dir+"/containers/a/criu/core-1.img")) }, codes.NotFound, "core-1.img"},
		"a file added": {func(t *testing.T, dir string) {
			must(t, os.WriteFile(dir+"/containers/a/criu/core-99.img", nil, 0o600))
		}, codes.DataLoss, "core-99.img"},
		"a file become a link": {func(t *testing.T, dir string) {
			must(t, os.Rename(dir+"/containers/a/criu/core-1.img", dir+"/../moved"))
			must(t, os.Symlink(dir+"/../moved", dir+"/containers/a/criu/core-1.img"))
		}, codes.DataLoss, "core-1.img"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := checkpointOf(t, container("a", counting))
			c.spoil(t, theNode.host.Path(dir))
			_, err := theNode.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
				CheckpointPath: dir, Config: sandboxConfig(podName()), RuntimeHandler: handler,
				ContainerConfigs: []*runtimeapi.ContainerConfig{container("a", counting)},
			})
			// A flipped bit may also hit the manifest's syntax or a digest in it.
			if code := status.Code(err); code != c.code && c.message != "" || err == nil {
				t.Errorf("got %v, want code %v", err, c.code)
			}
			if !strings.Contains(status.Convert(err).Message(), c.message) {
				t.Errorf("got %v, want a message with %q", err, c.message)
			}
		})
	}
}

func flipBit(t *testing.T, name string) {
	t.Helper()
	data, err := os.ReadFile(name)
	must(t, err)
	data[len(data)/2] ^= 1
	must(t, os.WriteFile(name, data, 0o600))
}

func TestARestoredContainerIsCreatedAndHasNotRunUntilItIsStarted(t *testing.T) {
	a := container("a", counting)
	p := theNode.prepareRestore(t, checkpointOf(t, a), a)
	time.Sleep(500 * time.Millisecond)
	if s := p.state(t, "a"); s != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("it is %v", s)
	}
	if lines := p.lines(t, "a"); len(lines) > 0 {
		t.Errorf("it has printed %v", lines)
	}
	p.start(t)
	p.goesOn(t, "a")
}

func TestRestorePodThatFailsHalfWayRemovesWhatItMade(t *testing.T) {
	a := container("a", counting)
	b := container("b", counting)
	dir := checkpointOf(t, a, b)
	b.Devices = []*runtimeapi.Device{{HostPath: "/dev/no-such-device", ContainerPath: "/dev/x", Permissions: "r"}}
	before := theNode.sandboxes(t)
	_, err := theNode.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: sandboxConfig(podName()), RuntimeHandler: handler,
		ContainerConfigs: []*runtimeapi.ContainerConfig{a, b},
	})
	if err == nil || !strings.Contains(err.Error(), "container b") {
		t.Fatalf("got %v", err)
	}
	for id := range theNode.sandboxes(t) {
		if !before[id] {
			t.Errorf("sandbox %s was left behind", id)
		}
	}
}

func TestARestoreLeavesTheCheckpointAsItWas(t *testing.T) {
	a := container("a", counting)
	dir := checkpointOf(t, a)
	stamp := func() string {
		var b strings.Builder
		must(t, filepath.Walk(theNode.host.Path(dir), func(name string, info os.FileInfo, err error) error {
			fmt.Fprintln(&b, name, info.Size(), info.ModTime().UnixNano(), info.Mode())
			return err
		}))
		return b.String()
	}
	before := stamp()
	first := theNode.restore(t, dir, a)
	second := theNode.restore(t, dir, a)
	first.goesOn(t, "a")
	second.goesOn(t, "a")
	if stamp() != before {
		t.Errorf("it was\n%s\nand is\n%s", before, stamp())
	}
	if _, err := verify(theNode, dir); err != nil {
		t.Error(err)
	}
	if one, two := first.numbers(t, "a", 1)[0], second.numbers(t, "a", 1)[0]; one != two {
		t.Errorf("one went on at %d, the other at %d", one, two)
	}
}

func TestWhatTheNewConfigurationSuppliesIsTheRestoredPodsOwn(t *testing.T) {
	n := theNode
	hosts := func(content string) *runtimeapi.Mount {
		file := filepath.Join(n.directory(t), "hosts")
		must(t, os.WriteFile(n.host.Path(file), []byte(content), 0o644))
		return &runtimeapi.Mount{HostPath: file, ContainerPath: "/etc/hosts"}
	}
	dir := checkpointOf(t, container("a", counting, hosts("old")))
	a := container("a", counting, hosts("new"))
	a.Labels = map[string]string{"which": "restored"}
	a.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: 50_000}
	p := n.restore(t, dir, a)
	p.goesOn(t, "a")
	if got := p.exec(t, "a", "cat /etc/hosts"); got != "new" {
		t.Errorf("/etc/hosts holds %q", got)
	}
	if q := p.quota(t, "a"); q != 50_000 {
		t.Errorf("its CPU limit is %d", q)
	}
	answer, err := n.runtime.ContainerStatus(testContext(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers["a"]})
	must(t, err)
	if answer.Status.Labels["which"] != "restored" {
		t.Errorf("its labels are %v", answer.Status.Labels)
	}
	if answer.Status.LogPath != p.config.LogDirectory+"/a.log" {
		t.Errorf("it logs to %s", answer.Status.LogPath)
	}
}

func TestASandboxThatClaimsAPreparedRestoreWithoutOneIsRefused(t *testing.T) {
	config := sandboxConfig(podName())
	config.Annotations = map[string]string{"checkpoint.podstasis.dev/restore-ticket": "guessed"}
	_, err := theNode.runtime.RunPodSandbox(testContext(t), &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err == nil || !strings.Contains(err.Error(), "names no prepared restore") {
		t.Errorf("got %v", err)
	}
}
