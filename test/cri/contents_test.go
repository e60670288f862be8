package cri_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
	"podstasis.dev/stasis/internal/nodeapi"
)

// specimen describes a container that runs test/cri/specimen.
func (n *node) specimen(t *testing.T, name string) *runtimeapi.ContainerConfig {
	t.Helper()
	built := filepath.Join(t.TempDir(), "specimen")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", built, "./specimen")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", build, err, out)
	}
	data, err := os.ReadFile(built)
	must(t, err)
	program := filepath.Join(n.directory(t), "specimen")
	must(t, n.host.Do(func() error { return os.WriteFile(program, data, 0o755) }))
	c := container(name, "", &runtimeapi.Mount{HostPath: program, ContainerPath: "/bin/specimen", Readonly: true},
		n.sharedDirectory(t, "/shared"))
	c.Command = []string{"/bin/specimen", "--config=/etc/specimen.conf"}
	c.Envs = []*runtimeapi.KeyValue{
		{Key: "GODEBUG", Value: []byte("multipathtcp=0")}, // which CRIU does not capture
		{Key: "SPECIMEN_TOKEN", Value: []byte("s3cr3t")},
		{Key: "HOME", Value: []byte("/data")},
	}
	return c
}

// shellTree is a script of a few processes that log.
const shellTree = `echo begun > /tmp/log; tail -f /tmp/log & sleep 1000000 & while :; do sleep 1000; done`

// waitForTree waits until all processes of a shellTree have begun to be what they will be.
func (p *pod) waitForTree(t *testing.T, container string) {
	t.Helper()
	p.waitForLine(t, container, "begun")
	eventually(t, "container "+container+" has its processes", func() bool {
		names := strings.Fields(p.exec(t, container, "cat /proc/[0-9]*/comm 2>/dev/null || true"))
		return len(slices.DeleteFunc(names, func(name string) bool { return name != "sleep" })) == 2
	})
}

// waitForLine waits until a container has printed a line.
func (p *pod) waitForLine(t *testing.T, container, line string) {
	t.Helper()
	eventually(t, fmt.Sprintf("container %s prints %q", container, line), func() bool {
		return slices.Contains(p.lines(t, container), line)
	})
}

func (n *node) contents(t *testing.T, dir string, m *checkpoint.Manifest, o contents.Options) *api.CheckpointContents {
	t.Helper()
	c, err := contents.Read(context.Background(), os.DirFS(n.host.Path(dir)), m, o)
	must(t, err)
	return c
}

func TestWhatACheckpointHoldsIsReadBackFromItsImages(t *testing.T) {
	n := theNode
	p := n.runNamed(t, "orders", "", n.specimen(t, "web"), container("log", shellTree))
	p.waitForLine(t, "web", "ready")
	p.waitForTree(t, "log")
	dir, m := p.checkpoint(t)
	keepSpecimen(t, n.host.Path(dir), m)
	masked := n.contents(t, dir, m, contents.Options{})
	c := n.contents(t, dir, m, contents.Options{ShowValues: true})

	lines := describe(c)
	for _, want := range expected {
		if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) }) {
			t.Errorf("it does not say: %s", want)
		}
	}
	if t.Failed() {
		t.Logf("it says:\n%s", strings.Join(lines, "\n"))
	}
	if text, err := json.Marshal(masked); err != nil || strings.Contains(string(text), "s3cr3t") || strings.Contains(string(text), "hunter2") {
		t.Errorf("masked contents hold a secret (%v)", err)
	}
	if len(c.Truncated) > 0 {
		t.Errorf("cut: %v", c.Truncated)
	}
	for _, container := range c.Containers {
		if len(container.Notes) > 0 {
			t.Errorf("container %s, notes: %v", container.Name, container.Notes)
		}
	}

	p.exec(t, "web", "kill -USR1 1")
	p.waitForLine(t, "web", "changed")
	dir, m = p.checkpoint(t)
	var text strings.Builder
	must(t, contents.Compare(c, n.contents(t, dir, m, contents.Options{ShowValues: true})).Write(&text))
	for _, want := range []string{
		"~ 1 specimen\n", "(+4.", " regular /data/second O_RDWR|O_CLOEXEC", "+ tcp LISTEN 0.0.0.0:9090", "/data/queue: position 0 → position 0, deleted",
		"+ /data/second, 0 B", "~ /data/queue: no longer differs", "~ /etc/written: 8 B → 14 B",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the difference does not say %q", want)
		}
	}
	for _, not := range []string{"container log", "- tcp"} {
		if strings.Contains(text.String(), not) {
			t.Errorf("the difference says %q", not)
		}
	}
	if t.Failed() {
		t.Logf("the difference:\n%s", text.String())
	}
}

func TestTheProcessesOfARestoredPodAreFoundToBeTheSource(t *testing.T) {
	n := theNode
	config := container("log", shellTree)
	source := n.run(t, "", config)
	source.waitForTree(t, "log")
	dir, m := source.checkpoint(t)
	before := n.contents(t, dir, m, contents.Options{})
	restored := n.restore(t, dir, config)
	dir, m = restored.checkpoint(t)
	d := contents.Compare(before, n.contents(t, dir, m, contents.Options{}))
	for _, c := range d.Containers {
		for _, p := range c.Processes {
			if len(p.FilesOpened)+len(p.FilesClosed)+len(p.Environment) == 0 {
				continue // threads and memory may differ: it ran on
			}
			t.Errorf("process %d %s differs: %+v", p.PID, p.Command, p)
		}
		if len(c.Ended)+len(c.Begun)+len(c.SocketsOpened)+len(c.SocketsClosed) > 0 {
			t.Errorf("it differs: %+v", c)
		}
		// The one file that a restore writes: it tells the container who it is now.
		if len(c.RootFileSystem) != 1 || c.RootFileSystem[0].Path != "/"+nodeapi.IdentityPath || c.RootFileSystem[0].Change != "written" {
			t.Errorf("its files differ: %+v", c.RootFileSystem)
		}
	}
	if n := len(before.Containers[0].Processes); n < 3 {
		t.Errorf("only %d processes were compared", n)
	}
}

// describe makes lines of contents, without what differs from run to run.
func describe(c *api.CheckpointContents) (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, v := range c.Volumes {
		add("volume %s %d", v.Name, v.Files)
	}
	for _, container := range c.Containers {
		in := container.Name + " "
		for _, p := range container.Processes {
			at := fmt.Sprintf("%sprocess %s ", in, strings.Join(append([]string{p.Command}, p.Arguments...), " "))
			add("%s%s user %d:%d in %s runs %s", at, p.State, p.UID, p.GID, p.WorkingDirectory, p.Executable)
			if p.Credentials != nil {
				add("%sgroups %v capabilities %s", at, p.Credentials.Groups, strings.Join(p.Credentials.Capabilities, " "))
			}
			for _, name := range p.ThreadNames {
				add("%sthread %s", at, name)
			}
			for _, f := range p.Files {
				add("%sfile %s %s %d %s", at, f.Type, f.Path, f.Position, f.Flags)
			}
			for _, e := range p.Environment {
				add("%senvironment %s=%s", at, e.Name, e.Value)
			}
			for _, m := range p.Mappings {
				add("%smapping %s %s %s %s", at, m.Kind, m.Protection, m.Path, contents.Bytes(m.CapturedBytes))
			}
		}
		for _, s := range container.Sockets {
			add("%ssocket %s %s %s %s %v", in, s.Protocol, s.State, s.Local, s.Remote, s.PIDs)
		}
		for _, m := range container.Mounts {
			add("%smount %s %s %v", in, m.Destination, m.Type, m.Options)
		}
		for _, f := range container.Changes {
			add("%schange %s %s %d %s %s", in, f.Change, f.Path, f.Size, f.Mode, f.Digest)
		}
	}
	return lines
}

// expected are beginnings of lines that the specimen's contents must have.
var expected = []string{
	"volume emptydir-shared",
	"web process specimen /bin/specimen --config=/etc/specimen.conf running user 0:0 in / runs /bin/specimen",
	"web process specimen /bin/specimen --config=/etc/specimen.conf thread ticker",
	"web process specimen /bin/specimen --config=/etc/specimen.conf groups [0] capabilities CAP_CHOWN CAP_DAC_OVERRIDE",
	"web process specimen /bin/specimen --config=/etc/specimen.conf environment SPECIMEN_TOKEN=s3cr3t",
	"web process specimen /bin/specimen --config=/etc/specimen.conf environment HOME=/data",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file regular /data/orders.log 12 O_RDWR|O_APPEND|O_CLOEXEC",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file regular /data/deleted (deleted)",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file directory /data",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file character device /dev/null",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file eventfd count 7",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file timerfd runs out in 2",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file inotify watches 1",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file eventpoll watches",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file memfd memfd:orders 0 O_RDWR",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file pipe pipe:[",
	"web process specimen /bin/specimen --config=/etc/specimen.conf file socket tcp 0.0.0.0:8080 listen",
	"web process specimen /bin/specimen --config=/etc/specimen.conf mapping anonymous rw-p  8.0 MiB",
	"web process specimen /bin/specimen --config=/etc/specimen.conf mapping shared rw-s memfd:orders 2.0 MiB",
	"web process specimen /bin/specimen --config=/etc/specimen.conf mapping file rw-s /data/table 0 B",
	"web process specimen /bin/specimen --config=/etc/specimen.conf mapping stack rw-p",
	"web process specimen /bin/specimen worker --queue=orders running user 1000:1000 in /data runs /bin/specimen",
	"web process specimen /bin/specimen worker --queue=orders groups [1000 2000] capabilities ",
	"web process specimen /bin/specimen worker --queue=orders environment QUEUE_PASSWORD=hunter2",
	"web process specimen /bin/specimen worker --queue=orders file regular /data/queue 0 O_RDONLY|O_CLOEXEC",
	"web process specimen /bin/specimen worker --queue=orders mapping shared rw-s memfd:orders 2.0 MiB",
	"web process specimen zombie",
	"web socket tcp LISTEN 0.0.0.0:8080  [1]",
	"web socket tcp ESTABLISHED 127.0.0.1:8080 127.0.0.1:",
	"web socket udp UNCONNECTED 127.0.0.1:5353  [1]",
	"web socket unix LISTEN /data/control.sock  [1]",
	"web socket unix LISTEN @specimen  [1]",
	"web socket netlink  route:",
	"web mount / overlay [rw",
	"web mount /bin/specimen bind [ro",
	"web mount /shared bind [rw",
	"web mount /proc proc [rw",
	"web change removed /etc/group",
	"web change replaced /usr/bin",
	"web change written /usr/bin/env 3 -rwxr-xr-x sha256:11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437",
	"web change written /data/orders.log 12 -rw-r-----",
	"log process sh /bin/sh -c echo begun",
	"log process tail tail -f /tmp/log running user 0:0 in / runs /bin/busybox",
	"log process sleep sleep 1000000",
	"log change written /tmp/log 6 -rw-r--r--",
}
