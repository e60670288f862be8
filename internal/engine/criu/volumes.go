package criu

import (
	"fmt"
	"os"
	"slices"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
)

// volume is a directory that containers of the Pod share and that belongs to it.
type volume struct {
	name, source string
	mounts       []checkpoint.VolumeMount
}

func (v volume) archive() string { return volumesDir + "/" + v.name + ".tar" }

// volumesOf finds the directories among the containers' mounts that belong to the
// Pod: emptyDir volumes, the sandbox's /dev/shm, and what images bring as volumes.
// What else is mounted is the restored Pod's own. It looks at files of the host.
func volumesOf(containers []engine.Container) ([]volume, error) {
	var volumes []volume
	for _, c := range containers {
		ofImage := 0
		for _, m := range c.Spec.Mounts {
			owned := engine.OwnedBy(c.ID, m)
			name := owned.Name
			switch {
			case owned.Root == "":
				continue
			case owned.OfImage:
				ofImage++
				name = "image-" + c.Name + "-" + strconv.Itoa(ofImage)
			}
			if err := capturable(owned, m); err != nil {
				return nil, fmt.Errorf("%w: container %s, volume at %s: %w", engine.ErrUnsupported, c.Name, m.Destination, err)
			}
			i := slices.IndexFunc(volumes, func(v volume) bool { return v.source == owned.Root })
			if i < 0 {
				i = len(volumes)
				volumes = append(volumes, volume{name: name, source: owned.Root})
			}
			volumes[i].mounts = append(volumes[i].mounts, checkpoint.VolumeMount{Container: c.Name, Destination: m.Destination})
		}
	}
	return volumes, nil
}

// capturable says why the contents of a volume cannot be captured and put back.
func capturable(o engine.Owned, m specs.Mount) error {
	var st unix.Statfs_t
	if err := unix.Statfs(o.Root, &st); err == nil && st.Type == unix.HUGETLBFS_MAGIC {
		return fmt.Errorf("it is an emptyDir of huge pages, whose files cannot be written back")
	}
	// The kubelet makes a directory where a subPath does not exist yet, and it does not
	// when the restored Pod's container is created.
	if info, err := os.Stat(m.Source); err == nil && o.Root != m.Source && !info.IsDir() {
		return fmt.Errorf("its subPath is a file of an emptyDir, which a new Pod's volume does not have when it is mounted: mount the directory that it is in")
	}
	return nil
}
