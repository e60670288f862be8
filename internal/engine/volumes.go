package engine

import (
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Owned is a directory that a mount brings into a container and that belongs to
// its Pod. The zero value belongs to somebody else.
type Owned struct {
	Name    string // of the volume; empty for one that an image brings
	Root    string // the whole volume, of which the mount may show a part
	OfImage bool   // the container runtime fills it from the image
}

// OwnedBy says what of its Pod a mount shows to the container of an ID.
//
//   - The kubelet keeps emptyDirs in DIR/pods/UID/volumes/kubernetes.io~empty-dir/NAME,
//     and binds a subPath of a volume to DIR/pods/UID/volume-subpaths/NAME/CONTAINER/N.
//   - containerd keeps what an image declares as a volume (VOLUME) in
//     …/containers/ID/volumes/…, and the sandbox's /dev/shm in …/sandboxes/ID/shm.
func OwnedBy(containerID string, m specs.Mount) Owned {
	if m.Type != "bind" {
		return Owned{}
	}
	const emptyDirs, subPaths = "kubernetes.io~empty-dir", "volume-subpaths"
	dir, base := filepath.Split(filepath.Clean(m.Source))
	dir = filepath.Clean(dir)
	if filepath.Base(dir) == emptyDirs {
		return Owned{Name: "emptydir-" + base, Root: m.Source}
	}
	if of := filepath.Dir(dir); filepath.Base(filepath.Dir(of)) == subPaths {
		name := filepath.Base(of)
		root := filepath.Join(filepath.Dir(filepath.Dir(of)), "volumes", emptyDirs, name)
		if info, err := os.Lstat(root); err == nil && info.IsDir() {
			return Owned{Name: "emptydir-" + name, Root: root}
		}
		return Owned{}
	}
	if containerID != "" && strings.Contains(m.Source, "/containers/"+containerID+"/volumes/") {
		return Owned{Root: m.Source, OfImage: true}
	}
	if m.Destination == "/dev/shm" && base == "shm" && (strings.Contains(dir, "/sandboxes/") || strings.HasSuffix(dir, "/userdata")) {
		return Owned{Name: "dev-shm", Root: m.Source}
	}
	return Owned{}
}
