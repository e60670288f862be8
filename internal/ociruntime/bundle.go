package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/nodeapi"
)

// Annotations that containerd writes into every OCI spec of a Pod. CRI-O writes others
// (io.kubernetes.cri-o.…), which nothing here reads yet.
const (
	annotationType      = "io.kubernetes.cri.container-type" // "sandbox" or "container"
	annotationSandboxID = "io.kubernetes.cri.sandbox-id"
	annotationContainer = "io.kubernetes.cri.container-name"
	annotationNamespace = "io.kubernetes.cri.sandbox-namespace"
	annotationPod       = "io.kubernetes.cri.sandbox-name"
	annotationUID       = "io.kubernetes.cri.sandbox-uid"
)

// bundle is an OCI bundle's config.json. It is kept as it came, but for what is
// changed: fields that this code does not know must not get lost.
type bundle struct {
	dir         string
	raw         map[string]json.RawMessage
	annotations map[string]string
}

func readBundle(dir string) (*bundle, error) {
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the bundle's OCI spec: %w", err)
	}
	b := &bundle{dir: dir}
	if err := json.Unmarshal(data, &b.raw); err != nil {
		return nil, fmt.Errorf("read the bundle's OCI spec: %w", err)
	}
	if err := b.field("annotations", &b.annotations); err != nil {
		return nil, err
	}
	return b, nil
}

// field decodes one member of the spec; a missing one leaves into as it is.
func (b *bundle) field(name string, into any) error {
	data, ok := b.raw[name]
	if !ok {
		return nil
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("read %s of the bundle's OCI spec: %w", name, err)
	}
	return nil
}

func (b *bundle) setField(name string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	b.raw[name] = data
	return nil
}

func (b *bundle) write() error {
	if err := b.setField("annotations", b.annotations); err != nil {
		return err
	}
	data, err := json.Marshal(b.raw)
	if err != nil {
		return err
	}
	if err := checkpoint.WriteFile(filepath.Join(b.dir, "config.json"), data, 0o644); err != nil {
		return fmt.Errorf("write the bundle's OCI spec: %w", err)
	}
	return nil
}

// wantsRestore says whether the Pod asks to be restored.
func (b *bundle) wantsRestore() bool {
	return b.annotations[nodeapi.AnnotationPrefix+"restore-from"] != "" ||
		b.annotations[nodeapi.AnnotationPrefix+"restore-ticket"] != ""
}

// dropEngineAnnotations removes what would reach the engine past Stasis: a CRIU
// option file names programs that root runs.
func (b *bundle) dropEngineAnnotations() (changed bool) {
	for name := range b.annotations {
		if strings.HasPrefix(name, "org.criu.") {
			delete(b.annotations, name)
			changed = true
		}
	}
	return changed
}

// annotationsBelow are those whose names begin with a prefix.
func (b *bundle) annotationsBelow(prefix string) map[string]string {
	found := maps.Clone(b.annotations)
	maps.DeleteFunc(found, func(name, _ string) bool { return !strings.HasPrefix(name, prefix) })
	return found
}

func (b *bundle) sandbox() (nodeapi.Sandbox, error) {
	s := nodeapi.Sandbox{
		ID: b.annotations[annotationSandboxID], Namespace: b.annotations[annotationNamespace],
		Name: b.annotations[annotationPod], UID: b.annotations[annotationUID],
		Annotations: map[string]string{},
	}
	if s.ID == "" {
		return s, errors.New("the OCI spec has no annotation " + annotationSandboxID + ": the container runtime is none that Stasis knows (containerd)")
	}
	for name, value := range b.annotations {
		if strings.HasPrefix(name, nodeapi.AnnotationPrefix) {
			s.Annotations[name] = value
		}
	}
	return s, nil
}

// rootfs is the container's root file system, mounted by the container runtime, and
// whether the container may only read it.
func (b *bundle) rootfs() (dir string, readonly bool, err error) {
	var root struct {
		Path     string `json:"path"`
		Readonly bool   `json:"readonly"`
	}
	if err := b.field("root", &root); err != nil {
		return "", false, err
	}
	if root.Path == "" {
		return "", false, errors.New("the OCI spec names no root file system")
	}
	if filepath.IsAbs(root.Path) {
		return root.Path, root.Readonly, nil
	}
	return filepath.Join(b.dir, root.Path), root.Readonly, nil
}

// masked are the container's masked paths, with an empty directory in the bundle to stand
// for crun's where its images need that.
func (b *bundle) masked(imageDir string) (criu.Masked, error) {
	var m criu.Masked
	var linux struct {
		MaskedPaths []string `json:"maskedPaths"`
	}
	if err := b.field("linux", &linux); err != nil {
		return m, err
	}
	byCrun, err := criu.MaskedByCrun(imageDir)
	if err != nil {
		return m, fmt.Errorf("look at the mounts of the checkpoint: %w", err)
	}
	if byCrun {
		m.Empty = filepath.Join(b.dir, "stasis-empty")
		if err := os.Mkdir(m.Empty, 0o555); err != nil && !errors.Is(err, fs.ErrExist) {
			return m, fmt.Errorf("make a directory to mask others with: %w", err)
		}
	}
	for _, path := range linux.MaskedPaths {
		switch info, err := os.Stat(path); {
		case err != nil || strings.ContainsAny(path, "]\n"): // not there, or of no such name
		case !info.IsDir():
			m.Files = append(m.Files, path)
		case byCrun:
			m.Directories = append(m.Directories, path)
		}
	}
	return m, nil
}

// cgroups are the hierarchies that the container is to see, where it sees them one by one.
func (b *bundle) cgroups() (binds []criu.Bind, err error) {
	var mounts []mount
	var linux struct {
		CgroupsPath string `json:"cgroupsPath"`
		Namespaces  []struct {
			Type string `json:"type"`
		} `json:"namespaces"`
	}
	if err := errors.Join(b.field("linux", &linux), b.field("mounts", &mounts)); err != nil {
		return nil, err
	}
	for _, n := range linux.Namespaces {
		if n.Type == string(specs.CgroupNamespace) {
			return nil, nil
		}
	}
	for _, m := range mounts {
		if m.Type == "cgroup" {
			more, err := criu.CgroupBinds(linux.CgroupsPath, filepath.Clean(m.Destination))
			if err != nil {
				return nil, err
			}
			binds = append(binds, more...)
		}
	}
	return binds, nil
}

type mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type,omitempty"`
	Source      string   `json:"source,omitempty"`
	Options     []string `json:"options,omitempty"`
}

// volume finds the new Pod's volume that the container of an ID has
// at a destination. It is one that belongs to the Pod: whatever a checkpoint says,
// nothing is written to what is the node's or somebody else's.
func (b *bundle) volume(containerID, destination string) (engine.Owned, error) {
	var mounts []mount
	if err := b.field("mounts", &mounts); err != nil {
		return engine.Owned{}, err
	}
	for _, m := range mounts {
		if m.Destination != destination || m.Type != "bind" {
			continue
		}
		owned := engine.OwnedBy(containerID, specs.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source})
		if owned.Root == "" {
			return engine.Owned{}, fmt.Errorf("the checkpoint has contents for the volume at %s, which does not belong to the new Pod alone (%s): only emptyDir volumes, /dev/shm and volumes of images are filled", destination, m.Source)
		}
		return owned, nil
	}
	return engine.Owned{}, fmt.Errorf("the checkpoint has a volume at %s, the new container mounts none there", destination)
}

// mountSource finds what the new Pod mounts at a destination.
func (b *bundle) mountSource(destination string) (string, error) {
	var mounts []mount
	if err := b.field("mounts", &mounts); err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.Destination == destination && m.Type == "bind" {
			return m.Source, nil
		}
	}
	return "", fmt.Errorf("the checkpoint has a volume at %s, the new container mounts none there", destination)
}

// namespaces are the paths of those that the container joins, by the OCI spec's names.
func (b *bundle) namespaces() (map[string]string, error) {
	var linux struct {
		Namespaces []struct{ Type, Path string } `json:"namespaces"`
	}
	if err := b.field("linux", &linux); err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for _, ns := range linux.Namespaces {
		paths[ns.Type] = ns.Path
	}
	return paths, nil
}

// addresses are those of the network that the container joins.
func (b *bundle) addresses() ([]netip.Addr, error) {
	namespaces, err := b.namespaces()
	if err != nil {
		return nil, err
	}
	addresses, err := criu.Addresses(namespaces["network"])
	if err != nil {
		return nil, fmt.Errorf("read the Pod's addresses: %w", err)
	}
	return addresses, nil
}

// privileges are what the container's processes may have.
func (b *bundle) privileges() (*nodeapi.Privileges, error) {
	var process struct {
		User struct {
			UID    uint32   `json:"uid"`
			GID    uint32   `json:"gid"`
			Groups []uint32 `json:"additionalGids"`
		} `json:"user"`
		Capabilities    nodeapi.Capabilities `json:"capabilities"`
		NoNewPrivileges bool                 `json:"noNewPrivileges"`
		AppArmorProfile string               `json:"apparmorProfile"`
	}
	var linux struct {
		Namespaces []struct{ Type string } `json:"namespaces"`
		Seccomp    json.RawMessage         `json:"seccomp"`
	}
	if err := errors.Join(b.field("process", &process), b.field("linux", &linux)); err != nil {
		return nil, err
	}
	p := &nodeapi.Privileges{
		UID: process.User.UID, GID: process.User.GID, Groups: process.User.Groups,
		Capabilities: process.Capabilities, NoNewPrivileges: process.NoNewPrivileges,
		Seccomp: len(linux.Seccomp) > 0 && string(linux.Seccomp) != "null", AppArmorProfile: process.AppArmorProfile,
	}
	for _, ns := range linux.Namespaces {
		p.Namespaces = append(p.Namespaces, ns.Type)
	}
	return p, nil
}

// useCRIUConfig makes the OCI runtime pass a file of options on to CRIU.
func (b *bundle) useCRIUConfig(file string) {
	if b.annotations == nil {
		b.annotations = map[string]string{}
	}
	b.annotations[criu.ConfigAnnotation] = file
}

// completedProgram is where an init container that had completed finds the
// program that it runs instead. /dev is a tmpfs of the container: a mount point
// there leaves no trace in its root file system.
const completedProgram = "/dev/" + CompletedName

// replaceByCompleted makes the container's process one that exits 0 at once.
func (b *bundle) replaceByCompleted(program string) error {
	var process map[string]json.RawMessage
	if err := b.field("process", &process); err != nil {
		return err
	}
	args, err := json.Marshal([]string{completedProgram})
	if err != nil {
		return err
	}
	process["args"] = args
	if err := b.setField("process", process); err != nil {
		return err
	}
	var mounts []json.RawMessage
	if err := b.field("mounts", &mounts); err != nil {
		return err
	}
	m, err := json.Marshal(mount{Destination: completedProgram, Type: "bind", Source: program, Options: []string{"bind", "ro", "nosuid", "nodev"}})
	if err != nil {
		return err
	}
	return b.setField("mounts", append(mounts, m))
}
