package nodeinstall

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/nodeapi"
)

const (
	// HandlerName is the runtime handler, and the RuntimeClass, of restoring Pods.
	HandlerName = "stasis"
	// GVisorHandlerName is that of Pods that are restored with gVisor. Nodes have it whose
	// containerd has a handler for gVisor.
	GVisorHandlerName = "stasis-gvisor"
	// runtimeBinary is where the handler finds the OCI runtime on the host.
	runtimeBinary = HostPrefix + "/bin/stasis-runtime"
	// podAnnotations is which annotations of Pods the handler passes on: exactly ours.
	podAnnotations = nodeapi.AnnotationPrefix + "*"

	runcShim = "io.containerd.runc.v2"
)

// ourNames are the handlers that are put into containerd's configuration.
var ourNames = []string{HandlerName, GVisorHandlerName}

// handlers are those that are to be there, by name.
type handlers map[string]handler

// tables writes the TOML tables of all below a path.
func (all handlers) tables(path string) ([]byte, error) {
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(all)) {
		tables, err := all[name].tables(path + "." + name)
		if err != nil {
			return nil, err
		}
		if len(out) > 0 {
			out = append(out, '\n')
		}
		out = append(out, tables...)
	}
	return out, nil
}

// handler is a runtime handler of containerd's CRI plugin, as its Status tells
// it. Field names in TOML are those of the configuration file.
type handler struct {
	RuntimeType                  string         `json:"runtimeType" toml:"runtime_type"`
	RuntimePath                  string         `json:"runtimePath" toml:"runtime_path,omitempty"`
	PodAnnotations               []string       `json:"PodAnnotations" toml:"pod_annotations,omitempty"`
	ContainerAnnotations         []string       `json:"ContainerAnnotations" toml:"container_annotations,omitempty"`
	PrivilegedWithoutHostDevices bool           `json:"privileged_without_host_devices" toml:"privileged_without_host_devices,omitempty"`
	PrivilegedAllDevicesAllowed  bool           `json:"privileged_without_host_devices_all_devices_allowed" toml:"privileged_without_host_devices_all_devices_allowed,omitempty"`
	CgroupWritable               bool           `json:"cgroupWritable" toml:"cgroup_writable,omitempty"`
	BaseRuntimeSpec              string         `json:"baseRuntimeSpec" toml:"base_runtime_spec,omitempty"`
	CNIConfDir                   string         `json:"cniConfDir" toml:"cni_conf_dir,omitempty"`
	CNIMaxConfNum                int            `json:"cniMaxConfNum" toml:"cni_max_conf_num,omitempty"`
	Snapshotter                  string         `json:"snapshotter" toml:"snapshotter,omitempty"`
	Sandboxer                    string         `json:"sandboxer" toml:"sandboxer,omitempty"`
	SandboxMode                  string         `json:"sandboxMode" toml:"sandbox_mode,omitempty"` // of containerd 1.7
	IOType                       string         `json:"io_type" toml:"io_type,omitempty"`
	Options                      map[string]any `json:"options" toml:"-"`
}

// effective is the part of containerd's running configuration that matters here.
type effective struct {
	defaultName string
	handlers    handlers
}

// parseEffective reads the "config" that the CRI's verbose Status gives.
func parseEffective(info string) (effective, error) {
	if info == "" {
		return effective{}, errors.New("the container runtime's CRI does not tell its configuration (Status, verbose): is it containerd?")
	}
	var config struct {
		Containerd struct {
			DefaultRuntimeName string             `json:"defaultRuntimeName"`
			Runtimes           map[string]handler `json:"runtimes"`
		} `json:"containerd"`
	}
	d := json.NewDecoder(strings.NewReader(info))
	d.UseNumber()
	if err := d.Decode(&config); err != nil {
		return effective{}, fmt.Errorf("read the configuration that containerd runs with: %w", err)
	}
	for name, h := range config.Containerd.Runtimes {
		h.normalise()
		config.Containerd.Runtimes[name] = h
	}
	return effective{defaultName: config.Containerd.DefaultRuntimeName, handlers: config.Containerd.Runtimes}, nil
}

// normalise takes out what says nothing, so that two handlers can be compared.
func (h *handler) normalise() {
	options := map[string]any{}
	for k, v := range h.Options {
		switch v := v.(type) {
		case json.Number:
			if n, err := v.Int64(); err == nil && n != 0 {
				options[k] = n
			}
		case bool:
			if v {
				options[k] = v
			}
		case string:
			if v != "" {
				options[k] = v
			}
		}
	}
	h.Options = options
	if h.Sandboxer == "podsandbox" {
		h.Sandboxer = "" // the default
	}
	if h.IOType == "fifo" {
		h.IOType = ""
	}
	if len(h.PodAnnotations) == 0 {
		h.PodAnnotations = nil
	}
	if len(h.ContainerAnnotations) == 0 {
		h.ContainerAnnotations = nil
	}
}

// base is the handler that ordinary Pods use, which ours has to be like in all
// but the binary: a restored Pod is a Pod like any other. Where that is crun's it is
// another one: crun captures, and its restores do not come to an end (docs/compatibility.md).
func (e effective) base() (handler, string, error) {
	crun := ""
	for _, name := range append([]string{e.defaultName, "runc"}, slices.Sorted(maps.Keys(e.handlers))...) {
		h, ok := e.handlers[name]
		switch {
		case !ok || name == HandlerName || h.RuntimeType != runcShim:
		case filepath.Base(h.binary()) == "crun":
			crun = name
		default:
			return h, name, nil
		}
	}
	if crun != "" {
		return handler{}, "", fmt.Errorf("containerd's only runtime handler of type %s is crun's (%q), which cannot restore Pods: add one for runc; Pods of crun are captured all the same",
			runcShim, crun)
	}
	return handler{}, "", fmt.Errorf("containerd has no runtime handler of type %s to build on (default handler %q, handlers %s)",
		runcShim, e.defaultName, strings.Join(slices.Sorted(maps.Keys(e.handlers)), ", "))
}

// derive makes our handler from the one of ordinary Pods.
func derive(base handler) handler {
	ours := base
	ours.Options = maps.Clone(base.Options)
	if ours.Options == nil {
		ours.Options = map[string]any{}
	}
	ours.Options["BinaryName"] = runtimeBinary
	ours.PodAnnotations = []string{podAnnotations}
	return ours
}

// binary is the OCI runtime that a handler names; runc if it names none.
func (h handler) binary() string {
	if name, ok := h.Options["BinaryName"].(string); ok && name != "" {
		return name
	}
	return "runc"
}

// equal says whether two normalised handlers do the same.
func (h handler) equal(other handler) bool {
	a, errA := h.tables("x")
	b, errB := other.tables("x")
	return errA == nil && errB == nil && bytes.Equal(a, b)
}

// tables writes the handler's TOML tables below a path.
func (h handler) tables(path string) ([]byte, error) {
	var out bytes.Buffer
	body, err := toml.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode the runtime handler: %w", err)
	}
	options, err := toml.Marshal(h.Options)
	if err != nil {
		return nil, fmt.Errorf("encode the runtime handler's options: %w", err)
	}
	fmt.Fprintf(&out, "[%s]\n%s\n[%s.options]\n%s", path, body, path, options)
	return out.Bytes(), nil
}

// HandlerKnown says whether a container runtime, by its verbose Status, has our
// handler.
func HandlerKnown(status *runtimeapi.StatusResponse) (bool, error) {
	for _, h := range status.GetRuntimeHandlers() {
		if h.GetName() == HandlerName {
			return true, nil
		}
	}
	if len(status.GetRuntimeHandlers()) > 0 {
		return false, nil
	}
	e, err := parseEffective(status.GetInfo()["config"]) // containerd 1.x lists none
	if err != nil {
		return false, err
	}
	_, known := e.handlers[HandlerName]
	return known, nil
}
