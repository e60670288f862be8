package cri_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
)

// checkpointctl runs the tool of that name (make bin/checkpointctl).
func (n *node) checkpointctl(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(n.root+"/bin/checkpointctl", args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("checkpointctl %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// export writes the archive of a checkpoint's container to a file.
func (n *node) export(t *testing.T, dir string, m *checkpoint.Manifest, container string) string {
	t.Helper()
	return exportFrom(t, n.host.Path(dir), m, container)
}

func exportFrom(t *testing.T, dir string, m *checkpoint.Manifest, container string) string {
	t.Helper()
	a, err := archive.OpenContainer(os.DirFS(dir), m, container)
	must(t, err)
	file := filepath.Join(t.TempDir(), container+".tar")
	f, err := os.Create(file)
	must(t, err)
	size, err := io.Copy(f, a.NewReader())
	must(t, errors.Join(err, f.Close()))
	if size != a.Size() {
		t.Fatalf("%d bytes were written, its size is %d", size, a.Size())
	}
	return file
}

func expectAll(t *testing.T, what, text string, wants ...string) {
	t.Helper()
	missing := slices.DeleteFunc(wants, func(want string) bool { return strings.Contains(text, want) })
	if len(missing) > 0 {
		t.Errorf("%s does not say %q:\n%s", what, missing, text)
	}
}

func TestTheToolsOfTheFieldReadAContainersExport(t *testing.T) {
	n := theNode
	p := n.runNamed(t, "orders", "", n.specimen(t, "web"), container("log", shellTree))
	p.waitForLine(t, "web", "ready")
	dir, m := p.checkpoint(t)
	before := n.export(t, dir, m, "web")

	expectAll(t, "show", n.checkpointctl(t, "show", before), "web", "localhost/busybox:1", p.containers["web"][:12], "runc", "containerd", "ROOT FS DIFF SIZE")
	expectAll(t, "inspect", n.checkpointctl(t, "inspect", before, "--stats", "--mounts", "--ps-tree-cmd", "--ps-tree-env", "--files", "--sockets", "--metadata"),
		"Created: 20", "Checkpointed: 20", "Engine: containerd", "Root FS diff size", "Frozen time", "Pages written", // show and stats
		"/bin/specimen --config=/etc/specimen.conf", "worker --queue=orders", "SPECIMEN_TOKEN=s3cr3t", // process tree
		"/data/queue", "TCP (LISTEN)", // files and sockets
		"Destination: /shared", "Destination: /proc", "Pod name: orders", "Kubernetes namespace: test", // mounts and metadata
	)
	var trees []struct {
		ContainerName string `json:"container_name"`
		ProcessTree   struct {
			PID      int   `json:"pid"`
			Children []any `json:"children"`
		} `json:"process_tree"`
	}
	must(t, json.Unmarshal([]byte(n.checkpointctl(t, "inspect", before, "--ps-tree", "--format=json")), &trees))
	if len(trees) != 1 || trees[0].ContainerName != "web" || trees[0].ProcessTree.PID != 1 || len(trees[0].ProcessTree.Children) != 2 {
		t.Errorf("the process tree is %+v", trees)
	}
	expectAll(t, "memparse", n.checkpointctl(t, "memparse", before, "--pid=1", "--search=SPECIMEN_TOKEN"), "SPECIMEN_TOKEN")

	p.exec(t, "web", "kill -USR1 1")
	p.waitForLine(t, "web", "changed")
	dir, m = p.checkpoint(t)
	after := n.export(t, dir, m, "web")
	expectAll(t, "diff", n.checkpointctl(t, "diff", before, after, "--files", "--sockets"), "/data/second", "9090")
}

func TestARootFileSystemsDifferenceIsALayerOfAnImage(t *testing.T) {
	n := theNode
	p := n.run(t, "", container("a", `rm /bin/nc /bin/wget; rm -r /usr; mkdir /usr; echo new > /usr/new; ln /usr/new /usr/hard; touch /tmp/.wh.real; echo 1; `+counting))
	p.numbers(t, "a", 3)
	dir, m := p.checkpoint(t)
	f, err := os.Open(n.host.Path(dir + "/" + m.Containers[0].Rootfs))
	must(t, err)
	defer f.Close()
	tar := exec.Command("tar", "-t")
	tar.Stdin = f
	list, err := tar.Output()
	must(t, err)
	names := strings.Fields(string(list))
	for _, want := range []string{"bin/.wh.nc", "bin/.wh.wget", "usr/.wh..wh..opq", "usr/new", "usr/hard", "tmp/.wh.real"} {
		if !slices.Contains(names, want) {
			t.Errorf("it has no %s: %s", want, names)
		}
	}
	r := n.restore(t, dir, p.configs...)
	got := r.exec(t, "a", `ls /bin/nc /bin/wget 2>/dev/null; ls /usr/bin 2>/dev/null; cat /usr/hard; stat -c %h /usr/new; ls -A /tmp`)
	if got != "new\n2\n.wh.real" {
		t.Errorf("restored it has %q", got)
	}
}

// criuInPath makes CRIU known to the node's containerd, which looks in PATH alone.
func (n *node) criuInPath(t *testing.T) {
	t.Helper()
	const dir = "/usr/local/sbin"
	must(t, n.host.Do(func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return err
		}
		return os.Symlink("/opt/devcluster/criu/bin/criu", dir+"/criu")
	}))
	t.Cleanup(func() {
		if err := n.host.Do(func() error { return unix.Unmount(dir, unix.MNT_DETACH) }); err != nil {
			t.Error(err)
		}
	})
}

func TestTheArchiveThatContainerdWritesForTheKubeletIsImported(t *testing.T) {
	n := theNode
	n.criuInPath(t)
	// Nothing with connections: containerd does not ask CRIU to take those.
	c := container("web", `echo secret > /usr/written; rm /bin/wget; exec 5> /tmp/open; nc -l -p 8080 & `+awaitListener(8080)+` echo ready; `+shellTree)
	c.Envs = []*runtimeapi.KeyValue{{Key: "SPECIMEN_TOKEN", Value: []byte("s3cr3t")}}
	p := n.runNamed(t, "shop", "", c)
	p.waitForLine(t, "web", "ready")
	p.waitForTree(t, "web")
	file := n.directory(t) + "/kubelet.tar"
	// What the kubelet's endpoint asks of a container runtime.
	_, err := n.runtime.CheckpointContainer(testContext(t), &runtimeapi.CheckpointContainerRequest{ContainerId: p.containers["web"], Location: file})
	must(t, err)
	f, err := os.Open(n.host.Path(file))
	must(t, err)
	defer f.Close()
	info, err := f.Stat()
	must(t, err)

	inPlace, err := archive.OpenFile(f, info.Size())
	must(t, err)
	into := t.TempDir()
	root, err := os.OpenRoot(into)
	must(t, err)
	defer root.Close()
	u, err := archive.Unpack(context.Background(), f, root, archive.Limits{Bytes: 10 * info.Size()})
	must(t, err)
	m, err := checkpoint.Verify(context.Background(), into, u.ManifestDigest)
	must(t, err)
	web := m.Containers[0]
	if web.Name != "web" || web.ID != p.containers["web"] || web.Image != image || m.Sandbox.Name != "shop" || m.Sandbox.Namespace != "test" ||
		m.Sandbox.UID != p.config.Metadata.Uid || m.Platform.Architecture != "amd64" || m.CutTime.IsZero() || m.FreezeDuration <= 0 || web.Created == nil {
		t.Errorf("the manifest is %+v", m)
	}
	if m.Engine.Version == "unknown" || m.Platform.Kernel == "unknown" {
		t.Errorf("engine %+v, platform %+v", m.Engine, m.Platform)
	}
	for where, read := range map[string]func() (*api.CheckpointContents, error){
		"unpacked": func() (*api.CheckpointContents, error) {
			return contents.Read(context.Background(), root.FS(), m, contents.Options{ShowValues: true})
		},
		"in place": func() (*api.CheckpointContents, error) {
			return contents.Read(context.Background(), inPlace.FS, inPlace.Manifest, contents.Options{ShowValues: true})
		},
	} {
		c, err := read()
		must(t, err)
		lines := strings.Join(describe(c), "\n")
		expectAll(t, "what is inside, "+where, lines, "process sh /bin/sh -c", "environment SPECIMEN_TOKEN=s3cr3t", "file regular /tmp/open", "LISTEN", "mount /dev/shm", "change written /usr/written", "change removed /bin/wget")
		if notes := c.Containers[0].Notes; len(notes) > 0 {
			t.Errorf("%s: notes %q", where, notes)
		}
	}

	// Out again, it is one that the field's tools read.
	again := exportFrom(t, into, m, "web")
	expectAll(t, "show", n.checkpointctl(t, "show", again), "web", image, web.ID[:12])
	expectAll(t, "inspect", n.checkpointctl(t, "inspect", again, "--ps-tree-cmd", "--stats"), "tail -f /tmp/log", "Frozen time")
}
