// Package conformance tests CheckpointPod and RestorePod of any server of the CRI by what
// the comments of k8s.io/cri-api v0.37's api.proto say of them, and by nothing else: it
// speaks gRPC to a socket and makes its Pods by the CRI's other calls. It knows no
// runtime's format, options or messages, and imports nothing of Stasis.
//
// docs/conformance.md says how to run it against a container runtime.
package conformance

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config says what is tested, and with what.
type Config struct {
	// Server implements CheckpointPod and RestorePod.
	Server runtimeapi.RuntimeServiceClient
	// Runtime implements the rest; it may be the same.
	Runtime runtimeapi.RuntimeServiceClient
	// Images, if set, pulls Image where it is not there.
	Images runtimeapi.ImageServiceClient
	// Image has a shell and a sleep that takes fractions of a second, as BusyBox has.
	Image string
	// Handler runs Pods, RestoreHandler is named to RestorePod; empty: the default.
	Handler, RestoreHandler string
	// CgroupParent is where Pods have their cgroups, with a % for a Pod's name; empty: left
	// to the runtime.
	CgroupParent string
	// Directory is where the runtime finds what the suite makes, and Local the path at
	// which it is here; nil: the same.
	Directory string
	Local     func(path string) string
}

// Run runs the suite.
func Run(t *testing.T, c Config) {
	if c.Local == nil {
		c.Local = func(path string) string { return path }
	}
	_, checkpointErr := c.Server.CheckpointPod(within(t), &runtimeapi.CheckpointPodRequest{})
	_, restoreErr := c.Server.RestorePod(within(t), &runtimeapi.RestorePodRequest{})
	for call, err := range map[string]error{"CheckpointPod": checkpointErr, "RestorePod": restoreErr} {
		if code := status.Code(err); code == codes.Unimplemented || code == codes.Unavailable {
			t.Fatalf("there is no %s to be tested: %v", call, err)
		}
	}
	if c.Images != nil {
		c.pull(t)
	}
	s := &suite{Config: c}
	t.Run("CheckpointPod", s.checkpointPod)
	t.Run("RestorePod", s.restorePod)
}

type suite struct {
	Config
	pods int
}

func (c *Config) pull(t *testing.T) {
	t.Helper()
	image := &runtimeapi.ImageSpec{Image: c.Image}
	there, err := c.Images.ImageStatus(within(t), &runtimeapi.ImageStatusRequest{Image: image})
	must(t, err)
	if there.Image == nil {
		_, err := c.Images.PullImage(within(t), &runtimeapi.PullImageRequest{Image: image})
		must(t, err)
	}
}

// checkpointPod takes one Pod of two containers through all that must fail, which must not
// harm it, and then checkpoints it.
func (s *suite) checkpointPod(t *testing.T) {
	p := s.run(t, "a", "b")
	other := s.run(t, "a", "b")
	_, err := s.Runtime.StopContainer(within(t), &runtimeapi.StopContainerRequest{ContainerId: other.containers["a"]})
	must(t, err)
	for name, spoil := range map[string]func(*runtimeapi.CheckpointPodRequest){
		"no sandbox":                           func(r *runtimeapi.CheckpointPodRequest) { r.PodSandboxId = "" },
		"a sandbox that does not exist":        func(r *runtimeapi.CheckpointPodRequest) { r.PodSandboxId = "0123456789abcdef" },
		"no containers":                        func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = nil },
		"a container twice":                    func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = append(r.ContainerIds, r.ContainerIds[0]) },
		"a container that does not exist":      func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds[1] = "0123456789abcdef" },
		"a container of another sandbox":       func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds[1] = other.containers["b"] },
		"a container that does not run":        func(r *runtimeapi.CheckpointPodRequest) { r.PodSandboxId, r.ContainerIds = other.sandbox, other.ids() },
		"an option that no runtime documents":  func(r *runtimeapi.CheckpointPodRequest) { r.Options = map[string]string{"no-such-option": "x"} },
		"a directory that is not there":        func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath += "/no-such-directory" },
		"a directory that is not absolute":     func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath = "no/such/directory" },
		"an empty name for where to write it":  func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath = "" },
		"a container without an ID among them": func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds[1] = "" },
	} {
		t.Run("fails for "+name, func(t *testing.T) {
			dir := s.directory(t)
			in := &runtimeapi.CheckpointPodRequest{PodSandboxId: p.sandbox, OutputPath: dir, ContainerIds: p.ids()}
			spoil(in)
			answer, err := s.Server.CheckpointPod(within(t), in)
			s.failed(t, answer, err)
			s.empty(t, dir)
		})
	}
	t.Run("that outlasts its deadline fails, resumes the Pod and leaves the directory empty", func(t *testing.T) {
		dir, err := s.directory(t), error(nil)
		for limit := 40 * time.Millisecond; ; limit /= 2 {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			_, err = s.Server.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{PodSandboxId: p.sandbox, OutputPath: dir, ContainerIds: p.ids()})
			cancel()
			if err != nil {
				break
			}
			must(t, clearDirectory(s.Local(dir))) // it was faster
		}
		if code := status.Code(err); code != codes.DeadlineExceeded {
			t.Errorf("%v", err)
		}
		// The caller's clock ends the call before the runtime has done with it.
		eventually(t, "the directory is empty", func() error { return isEmpty(s.Local(dir)) })
		p.goesOn(t, "a", "b")
	})
	t.Run("leaves its Pod running, its data in the directory alone, and the directory", func(t *testing.T) {
		outside := s.directory(t)
		dir := filepath.Join(outside, "checkpoint")
		must(t, os.Mkdir(s.Local(dir), 0o700))
		eventually(t, "the runtime is done with the call before", func() error {
			return s.checkpoint(t, p, dir, p.ids()...)
		})
		if len(tree(t, s.Local(dir))) == 0 {
			t.Error("nothing was written")
		}
		if entries, err := os.ReadDir(s.Local(outside)); err != nil || len(entries) != 1 {
			t.Errorf("beside the directory: %v, %v", entries, err)
		}
		p.goesOn(t, "a", "b")
	})
}

// restorePod restores one checkpoint of three containers, and one of one of them. Of three
// that are captured one after the other, the first and the last are far apart.
func (s *suite) restorePod(t *testing.T) {
	source := s.run(t, "a", "b", "c")
	all, one := s.directory(t), s.directory(t)
	source.counts(t, "a", 20)
	must(t, s.checkpoint(t, source, all, source.ids()...))
	must(t, s.checkpoint(t, source, one, source.containers["b"]))
	before, beforeOne := tree(t, s.Local(all)), tree(t, s.Local(one))

	for name, spoil := range map[string]func(*runtimeapi.RestorePodRequest){
		"a directory that is not there":       func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath += "-no-such-directory" },
		"an empty directory":                  func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath = s.directory(t) },
		"a handler that nobody knows":         func(r *runtimeapi.RestorePodRequest) { r.RuntimeHandler = "no-such-handler" },
		"an option that no runtime documents": func(r *runtimeapi.RestorePodRequest) { r.Options = map[string]string{"no-such-option": "x"} },
		"no containers":                       func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs = nil },
		"a container without a name":          func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[1] = s.container("") },
		"a container twice":                   func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[1] = s.container("a") },
		"a container that is missing":         func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs = r.ContainerConfigs[:2] },
		"a container that is not in it":       func(r *runtimeapi.RestorePodRequest) { r.ContainerConfigs[1] = s.container("d") },
		"a container too many": func(r *runtimeapi.RestorePodRequest) {
			r.ContainerConfigs = append(r.ContainerConfigs, s.container("d"))
		},
		"a container that was not selected": func(r *runtimeapi.RestorePodRequest) { r.CheckpointPath = one },
		"a device of its own that is not there": func(r *runtimeapi.RestorePodRequest) { // when others have been made
			r.ContainerConfigs[1].Devices = []*runtimeapi.Device{{HostPath: "/dev/no-such-device", ContainerPath: "/dev/x", Permissions: "r"}}
		},
	} {
		t.Run("fails for "+name+" and leaves nothing", func(t *testing.T) {
			in := s.restoreRequest(all, "a", "b", "c")
			spoil(in)
			sandboxes, containers := s.there(t)
			answer, err := s.Server.RestorePod(within(t), in)
			s.failed(t, answer, err)
			if nowSandboxes, nowContainers := s.there(t); !maps.Equal(sandboxes, nowSandboxes) || !maps.Equal(containers, nowContainers) {
				t.Errorf("it left sandboxes or containers: %v, %v", nowSandboxes, nowContainers)
			}
		})
	}

	in := s.restoreRequest(all, "c", "b", "a") // they are matched by name
	in.ContainerConfigs[2].Labels = map[string]string{"conformance": "restored"}
	restored := s.restore(t, in)
	t.Run("returns created containers that have not run", func(t *testing.T) {
		time.Sleep(200 * time.Millisecond)
		for name := range restored.containers {
			c := restored.status(t, name)
			if c.State != runtimeapi.ContainerState_CONTAINER_CREATED || c.StartedAt != 0 {
				t.Errorf("container %s is %s, started at %d", name, c.State, c.StartedAt)
			}
			if printed := restored.printed(t, name); len(printed) > 0 {
				t.Errorf("container %s has run: %v", name, printed)
			}
		}
		if c := restored.status(t, "a"); c.Labels["conformance"] != "restored" {
			t.Errorf("its labels are not those of the request: %v", c.Labels)
		}
	})
	t.Run("has them go on, each from the one moment of all", func(t *testing.T) {
		restored.start(t)
		restored.goesOn(t, "a", "b", "c")
		// The times at which each was as it was captured have to have one in common.
		latest, earliest := 0.0, math.Inf(1)
		for name := range restored.containers {
			begin, end := source.captured(t, name, restored.counts(t, name, 1)[0])
			t.Logf("container %s was captured between %.2f s and %.2f s", name, begin, end)
			latest, earliest = max(latest, begin), min(earliest, end)
		}
		if latest > earliest {
			t.Errorf("they were captured at times that are %.2f s apart", latest-earliest)
		}
		source.goesOn(t, "a", "b", "c")
	})
	t.Run("restores a selection, and a checkpoint once more", func(t *testing.T) {
		for range 2 {
			p := s.restore(t, s.restoreRequest(one, "b"))
			p.start(t)
			p.goesOn(t, "b")
			if first := p.counts(t, "b", 1)[0].number; first < 5 {
				t.Errorf("it began at %d", first)
			}
		}
	})
	t.Run("leaves the checkpoint as it was", func(t *testing.T) {
		if after := tree(t, s.Local(all)); !maps.Equal(before, after) {
			t.Errorf("it was %v and is %v", before, after)
		}
		if after := tree(t, s.Local(one)); !maps.Equal(beforeOne, after) {
			t.Errorf("that of the selection was %v and is %v", beforeOne, after)
		}
	})
}

// failed checks an answer that has to be an error, and says what.
func (s *suite) failed(t *testing.T, answer any, err error) {
	t.Helper()
	switch status.Code(err) {
	case codes.OK:
		t.Errorf("it succeeded: %v", answer)
	case codes.Unimplemented, codes.Unavailable, codes.DeadlineExceeded:
		t.Errorf("it did not fail for that: %v", err)
	default:
		t.Log(status.Code(err), status.Convert(err).Message())
	}
}

func (s *suite) empty(t *testing.T, dir string) {
	t.Helper()
	must(t, isEmpty(s.Local(dir)))
}

func isEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		err = fmt.Errorf("%s holds %v", dir, entries)
	}
	return err
}

func clearDirectory(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if err == nil {
			err = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}
	return err
}

// checkpoint captures containers of a Pod into an empty directory.
func (s *suite) checkpoint(t *testing.T, p *pod, dir string, containers ...string) error {
	t.Helper()
	_, err := s.Server.CheckpointPod(within(t), &runtimeapi.CheckpointPodRequest{PodSandboxId: p.sandbox, OutputPath: dir, ContainerIds: containers})
	return err
}

// directory makes an empty one where the runtime finds it.
func (s *suite) directory(t *testing.T) string {
	t.Helper()
	must(t, os.MkdirAll(s.Local(s.Directory), 0o700))
	local, err := os.MkdirTemp(s.Local(s.Directory), "conformance-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(local) })
	return filepath.Join(s.Directory, filepath.Base(local))
}

// tree is every file below a directory with what it is and holds.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		sum := ""
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum = fmt.Sprintf("%x", sha256.Sum256(data))
		}
		files[path] = fmt.Sprint(info.Mode(), info.Size(), info.ModTime().UnixNano(), sum)
		return nil
	}))
	return files
}

// there is which sandboxes and containers there are.
func (s *suite) there(t *testing.T) (sandboxes, containers map[string]bool) {
	t.Helper()
	sandboxes, containers = map[string]bool{}, map[string]bool{}
	pods, err := s.Runtime.ListPodSandbox(within(t), &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	for _, p := range pods.Items {
		sandboxes[p.Id] = true
	}
	all, err := s.Runtime.ListContainers(within(t), &runtimeapi.ListContainersRequest{})
	must(t, err)
	for _, c := range all.Containers {
		containers[c.Id] = true
	}
	return sandboxes, containers
}

// pod is a sandbox with containers, by name. Each counts from 1 on, and prints that with
// its machine's time.
type pod struct {
	*suite
	sandbox    string
	config     *runtimeapi.PodSandboxConfig
	containers map[string]string
}

func (s *suite) sandboxConfig() *runtimeapi.PodSandboxConfig {
	s.pods++
	name := fmt.Sprintf("conformance-%d-%d", os.Getpid(), s.pods)
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "conformance"},
		Hostname:     name,
		LogDirectory: filepath.Join(s.Directory, "logs-"+name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: strings.ReplaceAll(s.CgroupParent, "%", name),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}},
	}
}

func (s *suite) container(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: s.Image},
		Command:  []string{"/bin/sh", "-c", "i=0; while :; do i=$((i+1)); read up idle < /proc/uptime; echo $i $up; sleep 0.01; done"},
		LogPath:  name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{Resources: &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}},
	}
}

// run runs a Pod. It goes with the test.
func (s *suite) run(t *testing.T, names ...string) *pod {
	t.Helper()
	p := &pod{suite: s, config: s.sandboxConfig(), containers: map[string]string{}}
	must(t, os.MkdirAll(s.Local(p.config.LogDirectory), 0o700))
	made, err := s.Runtime.RunPodSandbox(within(t), &runtimeapi.RunPodSandboxRequest{Config: p.config, RuntimeHandler: s.Handler})
	must(t, err)
	p.sandbox = made.PodSandboxId
	p.removeAfter(t)
	for _, name := range names {
		c, err := s.Runtime.CreateContainer(within(t), &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: s.container(name), SandboxConfig: p.config})
		must(t, err)
		p.containers[name] = c.ContainerId
	}
	p.start(t)
	p.goesOn(t, names...)
	return p
}

func (s *suite) restoreRequest(from string, names ...string) *runtimeapi.RestorePodRequest {
	in := &runtimeapi.RestorePodRequest{CheckpointPath: from, Config: s.sandboxConfig(), RuntimeHandler: s.RestoreHandler}
	for _, name := range names {
		in.ContainerConfigs = append(in.ContainerConfigs, s.container(name))
	}
	return in
}

// restore makes a Pod from a checkpoint, and checks the answer's form.
func (s *suite) restore(t *testing.T, in *runtimeapi.RestorePodRequest) *pod {
	t.Helper()
	must(t, os.MkdirAll(s.Local(in.Config.LogDirectory), 0o700))
	answer, err := s.Server.RestorePod(within(t), in)
	must(t, err)
	if answer.PodSandboxId == "" {
		t.Fatal("the sandbox has no ID")
	}
	p := &pod{suite: s, sandbox: answer.PodSandboxId, config: in.Config, containers: map[string]string{}}
	p.removeAfter(t)
	ids := map[string]bool{}
	for _, c := range answer.RestoredContainers {
		if c.Name == "" || c.ContainerId == "" || p.containers[c.Name] != "" || ids[c.ContainerId] {
			t.Fatalf("names and IDs are empty or repeated: %v", answer.RestoredContainers)
		}
		p.containers[c.Name], ids[c.ContainerId] = c.ContainerId, true
	}
	for _, c := range in.ContainerConfigs {
		if p.containers[c.Metadata.Name] == "" || len(p.containers) != len(in.ContainerConfigs) {
			t.Fatalf("not one container for each configuration: %v", answer.RestoredContainers)
		}
	}
	return p
}

func (p *pod) removeAfter(t *testing.T) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := p.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		if err == nil {
			_, err = p.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
		}
		if err != nil {
			t.Errorf("remove sandbox %s: %v", p.sandbox, err)
		}
		os.RemoveAll(p.Local(p.config.LogDirectory))
	})
}

func (p *pod) start(t *testing.T) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(p.containers)) {
		_, err := p.Runtime.StartContainer(within(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers[name]})
		must(t, err)
	}
}

func (p *pod) ids() (ids []string) {
	for _, name := range slices.Sorted(maps.Keys(p.containers)) {
		ids = append(ids, p.containers[name])
	}
	return ids
}

func (p *pod) status(t *testing.T, name string) *runtimeapi.ContainerStatus {
	t.Helper()
	answer, err := p.Runtime.ContainerStatus(within(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers[name]})
	must(t, err)
	return answer.Status
}

// printing is a number and when it was to be printed, in seconds.
type printing struct {
	number int
	at     float64
}

// printed reads what a container has printed, from its log in the CRI's format.
func (p *pod) printed(t *testing.T, name string) (all []printing) {
	t.Helper()
	data, err := os.ReadFile(p.Local(filepath.Join(p.config.LogDirectory, name+".log")))
	if os.IsNotExist(err) {
		return nil
	}
	must(t, err)
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line) // time, stream, tag, number, time
		if !strings.HasSuffix(line, "\n") {
			continue // is being written
		}
		if len(fields) != 5 {
			t.Fatalf("the log of container %s is not of the CRI's form: %q", name, line)
		}
		number, err := strconv.Atoi(fields[3])
		at, timeErr := strconv.ParseFloat(fields[4], 64)
		if err != nil || timeErr != nil {
			t.Fatalf("container %s has printed %q", name, line)
		}
		all = append(all, printing{number, at})
	}
	return all
}

// counts waits until a container has printed so many numbers, and checks that none is
// missing.
func (p *pod) counts(t *testing.T, name string, least int) []printing {
	t.Helper()
	var all []printing
	eventually(t, "container "+name+" counts", func() error {
		if all = p.printed(t, name); len(all) < least {
			return fmt.Errorf("it has printed %d numbers of %d", len(all), least)
		}
		return nil
	})
	for i := range all[1:] {
		if all[i+1].number != all[i].number+1 {
			t.Fatalf("container %s went from %d to %d", name, all[i].number, all[i+1].number)
		}
	}
	return all
}

// goesOn checks that containers count on from now on.
func (p *pod) goesOn(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		p.counts(t, name, len(p.printed(t, name))+3)
	}
}

// captured is between when a container, which ran on, was captured, of which a copy begins
// with a printing: when it looked at the clock last before, and when first after that.
func (p *pod) captured(t *testing.T, name string, first printing) (begin, end float64) {
	t.Helper()
	all := p.counts(t, name, first.number+1)
	next := first.number - all[0].number
	if next < 1 {
		t.Fatalf("a copy of container %s goes on at %d, and that began with %d", name, first.number, all[0].number)
	}
	if all[next].at == first.at {
		next++ // it was captured between its look at the clock and its printing
	}
	return all[next-1].at, all[next].at
}

// within is the deadline that every call has to have.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("waited a minute in vain until %s: %v", what, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
