package nodeinstall

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/platform"
)

// Ways to restart containerd.
const (
	RestartAuto    = "auto"    // systemd where it runs, else a signal
	RestartSystemd = "systemd" // systemctl restart of the unit that containerd is in
	RestartSignal  = "signal"  // SIGTERM, for whatever supervises it to start it again
	RestartNone    = "none"    // leave it to the operator
)

// Oldest containerd that has what is needed of the CRI.
var oldestContainerd = platform.Version{1, 7}

// Config says what to install where.
type Config struct {
	// Payload is the directory with bin and criu to install from.
	Payload string
	// Prefix is HostPrefix as this process reaches it.
	Prefix string
	// Socket is the container runtime's, a path or unix:// URL.
	Socket string
	// ContainerdConfig is its main configuration file on the host; empty means the
	// one that it was started with.
	ContainerdConfig string
	// Restart is how to restart containerd.
	Restart string
	// Timeout bounds the wait for containerd to come back; 0 means 90 s.
	Timeout time.Duration
	Log     *slog.Logger
}

// cri is what installing needs of the container runtime's CRI.
type cri interface {
	Version(ctx context.Context, in *runtimeapi.VersionRequest, opts ...grpc.CallOption) (*runtimeapi.VersionResponse, error)
	Status(ctx context.Context, in *runtimeapi.StatusRequest, opts ...grpc.CallOption) (*runtimeapi.StatusResponse, error)
	ListPodSandbox(ctx context.Context, in *runtimeapi.ListPodSandboxRequest, opts ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error)
}

// host is the container runtime's mount namespace.
type host interface {
	Do(fn func() error) error
	Run(ctx context.Context, c hostns.Command) (hostns.Output, error)
}

// daemon is how the installer reaches the container runtime.
type daemon interface {
	// find returns the process that answers on the socket now, and its host.
	find() (process, host, error)
	// cri returns a client of the socket.
	cri() cri
	// signal ends the process.
	signal(p process) error
}

// Installer installs on, and uninstalls from, one node.
type Installer struct {
	Config
	daemon daemon
}

// Install brings the node to what the configuration says. Done again it changes
// nothing.
func (i *Installer) Install(ctx context.Context) error {
	changed, err := installPayload(i.Payload, i.Prefix)
	if err != nil {
		return err
	}
	i.Log.Info("programs are in place", "prefix", HostPrefix, "changed", changed)

	p, h, err := i.daemon.find()
	if err != nil {
		return err
	}
	now, major, err := i.look(ctx)
	if err != nil {
		return err
	}
	base, baseName, err := now.base()
	if err != nil {
		return err
	}
	if err := i.writeRuntimeConfig(p, h, base); err != nil {
		return err
	}
	want, bases := handlers{HandlerName: derive(base)}, map[string]string{HandlerName: baseName}
	if gvisor, name, ok := now.gvisorBase(); ok {
		if err := i.writeRunscConfig(p, h, gvisor); err != nil {
			return err
		}
		want[GVisorHandlerName], bases[GVisorHandlerName] = deriveGVisor(gvisor), name
	} else if err := i.removeRunscConfig(); err != nil {
		return err
	}
	return i.configure(ctx, p, h, now, func(files configFiles, mainPath string) (configFiles, error) {
		return withHandlers(files, mainPath, major, now.handlers, want)
	}, func(e effective) error {
		for _, name := range ourNames {
			has, ok := e.handlers[name]
			wanted, wantedToo := want[name]
			switch {
			case !wantedToo && ok:
				return fmt.Errorf("containerd still knows the runtime handler %s, and has none of gVisor any more", name)
			case wantedToo && !ok:
				return fmt.Errorf("containerd does not know the runtime handler %s", name)
			case wantedToo && !has.equal(wanted):
				return fmt.Errorf("containerd's runtime handler %s is not what was configured: it differs from handler %s in more than its binary", name, bases[name])
			}
		}
		return nil
	})
}

// look asks containerd what it is and what it runs with.
func (i *Installer) look(ctx context.Context) (effective, int, error) {
	version, err := i.daemon.cri().Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return effective{}, 0, fmt.Errorf("ask the container runtime for its version: %w", err)
	}
	major, err := checkVersion(version)
	if err != nil {
		return effective{}, 0, err
	}
	now, err := i.effective(ctx)
	return now, major, err
}

// CheckVersion says whether a container runtime can be configured and used.
func CheckVersion(v *runtimeapi.VersionResponse) error {
	_, err := checkVersion(v)
	return err
}

func checkVersion(v *runtimeapi.VersionResponse) (major int, err error) {
	if v.GetRuntimeName() != "containerd" {
		return 0, fmt.Errorf("the container runtime is %s %s: only containerd can be configured by this program", v.GetRuntimeName(), v.GetRuntimeVersion())
	}
	version, err := platform.ParseVersion(v.GetRuntimeVersion())
	if err != nil {
		return 0, fmt.Errorf("containerd's version: %w", err)
	}
	if version.Older(oldestContainerd) {
		return 0, fmt.Errorf("containerd %s is too old: %v or later is needed", v.GetRuntimeVersion(), oldestContainerd)
	}
	return version[0], nil
}

func (i *Installer) effective(ctx context.Context) (effective, error) {
	status, err := i.daemon.cri().Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return effective{}, fmt.Errorf("ask containerd for its configuration: %w", err)
	}
	return parseEffective(status.Info["config"])
}

// writeRuntimeConfig tells stasis-runtime which OCI runtime ordinary Pods have.
func (i *Installer) writeRuntimeConfig(p process, h host, base handler) error {
	var binary string
	err := h.Do(func() (err error) {
		binary, err = p.findProgram(base.binary())
		return err
	})
	if err != nil {
		return err
	}
	data, err := json.Marshal(map[string]string{"runtime": binary})
	if err != nil {
		return err
	}
	name := filepath.Join(i.Prefix, "etc", "runtime.json")
	if has, err := os.ReadFile(name); err == nil && string(has) == string(data)+"\n" {
		return nil
	}
	if err := checkpoint.WriteFile(name, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	i.Log.Info("stasis-runtime hands over to the node's own OCI runtime", "runtime", binary)
	return nil
}

// configure brings containerd's files to what change makes of them, and has
// containerd run with them. satisfied judges what containerd runs with.
func (i *Installer) configure(ctx context.Context, p process, h host, running effective, change changeFiles, satisfied func(effective) error) error {
	mainPath, before, after, err := i.rewrite(ctx, p, h, change)
	if err != nil {
		return err
	}
	if err := satisfied(running); err == nil {
		i.Log.Info("containerd runs with what is wanted, it is not restarted")
		return nil
	}
	if i.Restart == RestartNone {
		i.Log.Warn("containerd has to be restarted for its configuration to take effect; this program was told not to")
		return nil
	}
	if err := i.restart(ctx, p, h, satisfied); err != nil {
		if after.equal(before) {
			return err
		}
		return i.rollBack(ctx, p, h, mainPath, before, err)
	}
	return nil
}

// changeFiles makes containerd's files, of which the main one is named, into others.
type changeFiles func(files configFiles, mainPath string) (configFiles, error)

// rewrite brings containerd's files to what change makes of them. What containerd
// runs with stays as it is until it is started again.
func (i *Installer) rewrite(ctx context.Context, p process, h host, change changeFiles) (mainPath string, before, after configFiles, err error) {
	if mainPath, err = i.mainPath(p); err != nil {
		return "", before, after, err
	}
	if before, err = readFiles(h, mainPath); err != nil {
		return "", before, after, err
	}
	if after, err = change(before, mainPath); err != nil {
		return "", before, after, err
	}
	if !after.equal(before) {
		if err := i.writeChecked(ctx, p, h, mainPath, before, after); err != nil {
			return "", before, after, err
		}
		i.Log.Info("containerd's configuration changed", "main", mainPath, "dropIn", dropInPath(mainPath))
	}
	return mainPath, before, after, nil
}

func (i *Installer) mainPath(p process) (string, error) {
	if i.ContainerdConfig != "" {
		return i.ContainerdConfig, nil
	}
	return p.configPath()
}

// writeChecked writes the files and has containerd read them, without running
// it. Files that it does not take, or takes for something else, are put back.
func (i *Installer) writeChecked(ctx context.Context, p process, h host, mainPath string, before, after configFiles) error {
	was, err := dump(ctx, h, p, mainPath)
	if err != nil {
		return fmt.Errorf("containerd cannot read its present configuration; nothing was changed: %w", err)
	}
	err = writeFiles(h, mainPath, before, after)
	if err == nil {
		var is map[string]any
		if is, err = dump(ctx, h, p, mainPath); err == nil {
			err = onlyHandlerDiffers(was, is)
		}
	}
	if err != nil {
		back := writeFiles(h, mainPath, after, before)
		return errors.Join(fmt.Errorf("the new configuration of containerd was refused and taken back: %w", err), back)
	}
	return nil
}

// dump has containerd print the configuration that it would run with.
func dump(ctx context.Context, h host, p process, mainPath string) (map[string]any, error) {
	out, err := h.Run(ctx, hostns.Command{Name: p.exe, Args: []string{"--config", mainPath, "config", "dump"}})
	if err != nil {
		return nil, err
	}
	config := map[string]any{}
	if err := toml.Unmarshal([]byte(out.Stdout), &config); err != nil {
		return nil, fmt.Errorf("read what containerd's config dump printed: %w", err)
	}
	return config, nil
}

// onlyHandlerDiffers makes sure that nothing but our handlers, and the list of
// imports, differs between two configurations.
func onlyHandlerDiffers(was, is map[string]any) error {
	for _, config := range []map[string]any{was, is} {
		delete(config, "imports")
		plugins, _ := config["plugins"].(map[string]any)
		for _, name := range []string{"io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"} {
			plugin, _ := plugins[name].(map[string]any)
			containerd, _ := plugin["containerd"].(map[string]any)
			runtimes, _ := containerd["runtimes"].(map[string]any)
			for _, ours := range ourNames {
				delete(runtimes, ours)
			}
		}
	}
	if where := difference("", was, is); where != "" {
		return fmt.Errorf("it would change %s too", where)
	}
	return nil
}

// difference names the first setting in which two configurations differ.
func difference(path string, a, b any) string {
	x, okX := a.(map[string]any)
	y, okY := b.(map[string]any)
	if !okX || !okY {
		if reflect.DeepEqual(a, b) {
			return ""
		}
		return fmt.Sprintf("%s (from %v to %v)", strings.TrimPrefix(path, "."), a, b)
	}
	keys := slices.Concat(slices.Collect(maps.Keys(x)), slices.Collect(maps.Keys(y)))
	slices.Sort(keys)
	for _, key := range slices.Compact(keys) {
		a, hasA := x[key]
		b, hasB := y[key]
		// A table with nothing in it says nothing, nor does an empty setting.
		if !hasA {
			a = emptyLike(b)
		}
		if !hasB {
			b = emptyLike(a)
		}
		if where := difference(path+"."+key, a, b); where != "" {
			return where
		}
	}
	return ""
}

func emptyLike(value any) any {
	if _, table := value.(map[string]any); table {
		return map[string]any{}
	}
	switch value {
	case "", false, int64(0):
		return value
	}
	return nil
}

func readFiles(h host, mainPath string) (configFiles, error) {
	var files configFiles
	err := h.Do(func() error {
		for name, to := range map[string]*[]byte{mainPath: &files.main, dropInPath(mainPath): &files.dropIn} {
			data, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			} else if err != nil {
				return err
			}
			if data == nil {
				data = []byte{}
			}
			*to = data
		}
		return nil
	})
	if err != nil {
		return files, fmt.Errorf("read containerd's configuration: %w", err)
	}
	return files, nil
}

// writeFiles goes from one state of the files to another. The drop-in comes
// before the import that names it and goes after it.
func writeFiles(h host, mainPath string, from, to configFiles) error {
	steps := []func() error{
		func() error { return writeOrRemove(dropInPath(mainPath), from.dropIn, to.dropIn) },
		func() error { return writeOrRemove(mainPath, from.main, to.main) },
	}
	if to.dropIn == nil {
		steps[0], steps[1] = steps[1], steps[0]
	}
	err := h.Do(func() error {
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
		if to.dropIn == nil {
			os.Remove(filepath.Dir(dropInPath(mainPath))) // only if nothing is in it
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write containerd's configuration: %w", err)
	}
	return nil
}

func writeOrRemove(name string, from, to []byte) error {
	switch {
	case to == nil:
		return ignoreNotExist(os.Remove(name))
	case from != nil && string(from) == string(to):
		return nil
	}
	mode := os.FileMode(0o644)
	if info, err := os.Stat(name); err == nil {
		mode = info.Mode().Perm()
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return checkpoint.WriteFile(name, to, mode)
}

// restart has containerd started anew, and waits until it answers and runs with
// what is wanted. Containers run on: their shims are processes of their own.
func (i *Installer) restart(ctx context.Context, p process, h host, satisfied func(effective) error) error {
	how, err := i.howToRestart(p, h)
	if err != nil {
		return err
	}
	i.Log.Info("restarting containerd", "pid", p.pid, "by", how, "unit", p.unit)
	switch how {
	case RestartSystemd:
		if _, err := h.Run(ctx, hostns.Command{Name: "systemctl", Args: []string{"restart", p.unit}}); err != nil {
			return fmt.Errorf("restart containerd: %w", err)
		}
	case RestartSignal:
		if err := i.daemon.signal(p); err != nil {
			return fmt.Errorf("end containerd so that its supervisor starts it anew: %w", err)
		}
	}
	return i.await(ctx, p, satisfied)
}

func (i *Installer) howToRestart(p process, h host) (string, error) {
	var booted bool
	if err := h.Do(func() error {
		info, err := os.Stat("/run/systemd/system") // sd_booted(3)
		booted = err == nil && info.IsDir()
		return nil
	}); err != nil {
		return "", err
	}
	switch {
	case i.Restart == RestartSystemd && p.unit == "":
		return "", fmt.Errorf("containerd (process %d) is in no systemd service; restart it by hand, or use --containerd-restart=%s", p.pid, RestartSignal)
	case i.Restart == RestartSystemd, i.Restart == RestartAuto && booted && p.unit != "":
		return RestartSystemd, nil
	}
	return RestartSignal, nil
}

// await waits until another process than p answers, with what is wanted.
func (i *Installer) await(ctx context.Context, p process, satisfied func(effective) error) error {
	timeout := i.Timeout
	if timeout == 0 {
		timeout = 90 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last := errors.New("nothing answers on " + i.Socket)
	for {
		err := func() error {
			now, _, err := i.daemon.find()
			if err != nil {
				return err
			}
			if now.pid == p.pid && now.start == p.start {
				return fmt.Errorf("process %d still answers", p.pid)
			}
			e, err := i.effective(ctx)
			if err != nil {
				return err
			}
			if err := satisfied(e); err != nil {
				return err
			}
			i.Log.Info("containerd is back", "pid", now.pid)
			return nil
		}()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("containerd did not come back within %s as it should: %w", timeout, last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// rollBack puts the old configuration back after containerd failed to come up
// with the new one, and waits for it to come up with that.
func (i *Installer) rollBack(ctx context.Context, p process, h host, mainPath string, before configFiles, why error) error {
	i.Log.Error("containerd gets its old configuration back", "error", why)
	now, err := readFiles(h, mainPath)
	if err != nil {
		return errors.Join(why, err)
	}
	if err := writeFiles(h, mainPath, now, before); err != nil {
		return errors.Join(why, fmt.Errorf("putting containerd's old configuration back failed, do it by hand (remove %s): %w", dropInPath(mainPath), err))
	}
	anything := func(effective) error { return nil }
	current, currentHost, err := i.daemon.find()
	if err == nil {
		// It runs, with the configuration that is no longer there.
		err = i.restart(ctx, current, currentHost, anything)
	} else if p.unit != "" && i.Restart != RestartSignal {
		err = i.restart(ctx, p, h, anything)
	} else {
		err = i.await(ctx, p, anything)
	}
	if err != nil {
		return errors.Join(why, fmt.Errorf("containerd has its old configuration back and does not run: start it by hand: %w", err))
	}
	return fmt.Errorf("%w; containerd has its old configuration back and runs", why)
}

// signalProcess ends a process if it still is the one meant.
func signalProcess(p process) error {
	if start, err := startTime("/proc", p.pid); err != nil || start != p.start {
		return nil // it has ended already
	}
	return syscall.Kill(p.pid, syscall.SIGTERM)
}
