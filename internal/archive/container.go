package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
)

// ErrNoContainer says that the checkpoint has no container of that name.
var ErrNoContainer = errors.New("the checkpoint has no such container")

// OpenContainer makes the archive of one container of a checkpoint, in the layout
// of the kubelet's checkpoint endpoint.
func OpenContainer(dir fs.FS, m *checkpoint.Manifest, name string) (*Archive, error) {
	i := slices.IndexFunc(m.Containers, func(c checkpoint.Container) bool { return c.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("%w: %q; it has %s", ErrNoContainer, name, containerNames(m))
	}
	c := m.Containers[i]
	base := containersDir + "/" + name + "/"
	sizes := fileSizes(m)
	config, err := json.MarshalIndent(configDump(m, c), "", "  ")
	if err != nil {
		return nil, err
	}
	status, err := json.MarshalIndent(statusDump(m, c), "", "  ")
	if err != nil {
		return nil, err
	}
	a := newArchive(dir, m)
	err = errors.Join(a.addData(kubeletConfig, config), a.addData(kubeletStatus, status))
	for _, f := range [][2]string{{kubeletSpec, specFile}, {kubeletDumpStats, dumpStatsFile}, {kubeletDumpLog, dumpLogFile}, {kubeletOutput, outputFile}} {
		if size, ok := sizes[base+f[1]]; ok {
			err = errors.Join(err, a.addFile(f[0], base+f[1], size))
		}
	}
	err = errors.Join(err, a.add(member{name: kubeletImages + "/"}))
	for _, f := range m.Files {
		if image, ok := strings.CutPrefix(f.Path, base+imagesDir+"/"); ok {
			err = errors.Join(err, a.addFile(kubeletImages+"/"+image, f.Path, f.Size))
		}
	}
	if c.Rootfs != "" {
		err = errors.Join(err, a.addFile(kubeletRootfs, c.Rootfs, sizes[c.Rootfs]))
	}
	if err != nil {
		return nil, err
	}
	a.finish()
	files, err := json.Marshal(m.Files)
	if err != nil {
		return nil, err
	}
	a.tag("container "+name, config, status, files)
	return a, nil
}

func containerNames(m *checkpoint.Manifest) string {
	var names []string
	for _, c := range m.Containers {
		names = append(names, c.Name)
	}
	return strings.Join(names, ", ")
}

// containerConfig is config.dump: what the tools that read these archives know of a
// container.
type containerConfig struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	RootfsImage     string    `json:"rootfsImage,omitempty"`
	RootfsImageRef  string    `json:"rootfsImageRef,omitempty"`
	RootfsImageName string    `json:"rootfsImageName,omitempty"`
	OCIRuntime      string    `json:"runtime,omitempty"`
	CreatedTime     time.Time `json:"createdTime"`
	CheckpointedAt  time.Time `json:"checkpointedTime"`
	RestoredAt      time.Time `json:"restoredTime"`
	Restored        bool      `json:"restored"`
}

func configDump(m *checkpoint.Manifest, c checkpoint.Container) containerConfig {
	return containerConfig{
		ID: c.ID, Name: c.Name, RootfsImage: c.Image, RootfsImageRef: c.ImageID, RootfsImageName: c.Image,
		OCIRuntime: m.Runtime.Name, CreatedTime: createdTime(m, c), CheckpointedAt: m.CutTime.UTC(),
	}
}

// createdTime of a container; the cut, where nobody wrote it down.
func createdTime(m *checkpoint.Manifest, c checkpoint.Container) time.Time {
	if c.Created != nil {
		return c.Created.UTC()
	}
	return m.CutTime.UTC()
}

// containerStatus is status.dump: the CRI's ContainerStatus of a running container,
// as far as the manifest knows it.
type containerStatus struct {
	ID       string `json:"id"`
	Metadata struct {
		Name string `json:"name"`
	} `json:"metadata"`
	State     int   `json:"state"`
	CreatedAt int64 `json:"created_at"`
	StartedAt int64 `json:"started_at"`
	Image     struct {
		Image string `json:"image"`
	} `json:"image"`
	ImageRef string `json:"image_ref,omitempty"`
}

const criRunning = 1 // CONTAINER_RUNNING

func statusDump(m *checkpoint.Manifest, c checkpoint.Container) containerStatus {
	s := containerStatus{ID: c.ID, State: criRunning, ImageRef: c.ImageID}
	s.Metadata.Name, s.Image.Image = c.Name, c.Image
	s.CreatedAt = createdTime(m, c).UnixNano()
	s.StartedAt = s.CreatedAt
	return s
}
