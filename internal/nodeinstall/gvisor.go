package nodeinstall

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

const (
	runscShim = "io.containerd.runsc.v1"
	// runscSettings is where our handler's shim finds its settings on the host.
	runscSettings = HostPrefix + "/etc/runsc.toml"
	// runscOptions is what containerd calls a file of settings for the shim.
	runscOptions = "io.containerd.runsc.v1.options"
	// maxSettings bounds the node's own file of settings.
	maxSettings = 1 << 20
)

// gvisorBase is the handler of gVisor that the node has, if it has one.
func (e effective) gvisorBase() (base handler, name string, ok bool) {
	names := append([]string{e.defaultName, "runsc", "gvisor"}, slices.Sorted(maps.Keys(e.handlers))...)
	for _, name := range names {
		if h, ok := e.handlers[name]; ok && !slices.Contains(ourNames, name) && h.RuntimeType == runscShim {
			return h, name, true
		}
	}
	return handler{}, "", false
}

// deriveGVisor makes our handler from the node's own: the same shim with the same settings,
// but for the program that it calls.
func deriveGVisor(base handler) handler {
	ours := base
	ours.Options = map[string]any{"TypeUrl": runscOptions, "ConfigPath": runscSettings}
	ours.PodAnnotations = []string{podAnnotations}
	ours.ContainerAnnotations = nil
	return ours
}

// writeRunscConfig tells our handler's shim to call stasis-restore, and that which runsc the
// node's own handler has.
func (i *Installer) writeRunscConfig(p process, h host, base handler) error {
	settings := map[string]any{}
	binary := "runsc"
	err := h.Do(func() error {
		if path, ok := base.Options["ConfigPath"].(string); ok && path != "" {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			if info.Size() > maxSettings {
				return fmt.Errorf("%s has %d bytes", path, info.Size())
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := toml.Unmarshal(data, &settings); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		if name, ok := settings["binary_name"].(string); ok && name != "" {
			binary = name
		}
		var err error
		binary, err = p.findProgram(binary)
		return err
	})
	if err != nil {
		return fmt.Errorf("read the settings of gVisor's shim: %w", err)
	}
	settings["binary_name"] = HostPrefix + "/bin/" + nodeapi.RunscName
	text, err := toml.Marshal(settings)
	if err != nil {
		return fmt.Errorf("write the settings of gVisor's shim: %w", err)
	}
	program, err := json.Marshal(map[string]string{"runtime": binary})
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"runsc.toml": append([]byte("# Written by stasis-agent install from the settings that the node's own handler of gVisor has.\n"), text...),
		"runsc.json": append(program, '\n'),
	} {
		name := filepath.Join(i.Prefix, "etc", name)
		if has, err := os.ReadFile(name); err == nil && string(has) == string(data) {
			continue
		}
		if err := checkpoint.WriteFile(name, data, 0o644); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		i.Log.Info("gVisor's shim of our handler calls stasis-restore", "file", name, "runsc", binary)
	}
	return nil
}

// removeRunscConfig removes what an earlier installation wrote, when the node had gVisor.
func (i *Installer) removeRunscConfig() error {
	var errs []error
	for _, name := range []string{"runsc.toml", "runsc.json"} {
		errs = append(errs, ignoreNotExist(os.Remove(filepath.Join(i.Prefix, "etc", name))))
	}
	return errors.Join(errs...)
}
