// Package contents tells what is inside a checkpoint: processes, memory, open
// files, sockets, mounts, changed files, as a person would ask for them. It reads
// the engine's images and the tar files of a checkpoint's directory, and of the
// captured memory only the pages with command lines and environments.
//
// The directory may come from anywhere: what is read, kept and given out is bounded
// by Limits, and what cannot be understood is said in notes and left out.
package contents

import (
	"context"
	"fmt"
	"io/fs"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
)

// Options of Read. The zero value is what a server uses.
type Options struct {
	// ShowValues gives out the values of all environment variables, and digests of
	// changed files.
	ShowValues bool
	// Limits that are zero are the defaults.
	Limits Limits
}

// Read tells what is inside the checkpoint in dir, whose manifest is m. An error says
// that nothing could be read at all, or that ctx ended; what is missing from the answer
// is in its notes.
func Read(ctx context.Context, dir fs.FS, m *checkpoint.Manifest, o Options) (*api.CheckpointContents, error) {
	r := &reader{dir: dir, manifest: m, show: o.ShowValues, bounds: newBounds(o.Limits)}
	r.list()
	c := r.facts()
	for i := range m.Containers {
		if !r.fits("containers", i, r.limits.Containers, len(m.Containers[i].Image)) {
			break
		}
		r.at = fmt.Sprintf("containers[%d]", i)
		container, err := r.container(ctx, &m.Containers[i])
		if err != nil {
			return nil, fmt.Errorf("container %s: %w", m.Containers[i].Name, err)
		}
		c.Containers = append(c.Containers, *container)
	}
	for i, v := range m.Volumes {
		if !r.fits("volumes", i, r.limits.Volumes, len(v.Name)) {
			break
		}
		r.at = fmt.Sprintf("volumes[%d]", i)
		c.Volumes = append(c.Volumes, r.volume(ctx, v))
	}
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	c.Truncated = r.truncated()
	return c, nil
}

// reader is one reading of a checkpoint.
type reader struct {
	dir      fs.FS
	manifest *checkpoint.Manifest
	sizes    map[string]int64            // of the manifest's files
	images   map[string]map[string]int64 // sizes of the engine's images, by container
	whole    bool                        // the engine's images are of the sandbox
	show     bool
	*bounds
	at string // JSON path of what is being filled in
}

// list sorts the manifest's files. Nothing else is looked for in the directory.
func (r *reader) list() {
	r.sizes, r.images = map[string]int64{}, map[string]map[string]int64{}
	for _, f := range r.manifest.Files {
		r.sizes[f.Path] = f.Size
		parts := strings.Split(f.Path, "/")
		r.whole = r.whole || parts[0] == "sandbox"
		if len(parts) != 4 || parts[0] != "containers" || parts[2] != "criu" {
			continue
		}
		if r.images[parts[1]] == nil {
			r.images[parts[1]] = map[string]int64{}
		}
		r.images[parts[1]][parts[3]] = f.Size
	}
}

// facts are what the manifest says.
func (r *reader) facts() *api.CheckpointContents {
	m := r.manifest
	c := &api.CheckpointContents{
		Engine: checkpointv1alpha1.EngineStatus{Name: r.clean(m.Engine.Name), Version: r.clean(m.Engine.Version)},
		Source: api.ContentsSource{
			PodNamespace: r.clean(m.Sandbox.Namespace),
			PodName:      r.clean(m.Sandbox.Name),
			PodUID:       r.clean(m.Sandbox.UID),
			Platform:     r.clean(strings.TrimSpace(m.Platform.OS + "/" + m.Platform.Architecture + " " + m.Platform.Kernel)),
			Runtime:      r.clean(strings.TrimSpace(m.Runtime.Name + " " + m.Runtime.Version)),
		},
		Containers: []api.ContainerContents{},
	}
	c.SetGroupVersionKind(api.SchemeGroupVersion.WithKind("CheckpointContents"))
	for i, ip := range m.Sandbox.IPs {
		if !r.fits("source.podIPs", i, 64, len(ip)) {
			break
		}
		c.Source.PodIPs = append(c.Source.PodIPs, r.clean(ip))
	}
	if !m.CutTime.IsZero() {
		c.CutTime = &metav1.MicroTime{Time: m.CutTime}
	}
	if m.FreezeDuration > 0 {
		c.FreezeDuration = &metav1.Duration{Duration: m.FreezeDuration}
	}
	if m.Capture != nil {
		c.Capture = &checkpointv1alpha1.MemoryCapture{Mode: r.clean(m.Capture.Mode), Reason: r.clean(m.Capture.Reason)}
	}
	for i, p := range m.Phases {
		if !r.fits("phases", i, 64, len(p.Name)) {
			break
		}
		c.Phases = append(c.Phases, checkpointv1alpha1.PhaseTiming{Name: r.clean(p.Name), Duration: metav1.Duration{Duration: p.Duration}})
	}
	return c
}

// container tells what is inside one container's part.
func (r *reader) container(ctx context.Context, m *checkpoint.Container) (*api.ContainerContents, error) {
	c := &api.ContainerContents{Name: r.clean(m.Name), Image: r.clean(m.Image)}
	n := &notes{bounds: r.bounds}
	defer func() { c.Notes = n.all }()
	names := r.images[m.Name]
	for _, size := range names {
		c.ImageBytes += size
	}
	if r.whole {
		n.add("processes, memory and open files are in the image of the whole sandbox, which the engine %s alone can read", r.clean(r.manifest.Engine.Name))
	} else if sub, err := fs.Sub(r.dir, "containers/"+m.Name+"/criu"); err != nil {
		n.add("the engine's images cannot be read: %v", err)
	} else {
		p := newProcesses(r, n, sub, names)
		if err := p.read(ctx, c); err != nil {
			return nil, err
		}
	}
	r.changes(ctx, n, m.Rootfs, c)
	return c, nil
}

// volume counts what a volume's archive holds.
func (r *reader) volume(ctx context.Context, v checkpoint.Volume) api.VolumeContents {
	out := api.VolumeContents{Name: r.clean(v.Name), Bytes: r.sizes[v.Archive]}
	err := r.entries(ctx, v.Archive, func(e entry) error {
		if e.path != "." {
			out.Files++
		}
		return nil
	})
	if err != nil {
		r.cuts(r.at + ".files") // the size is the manifest's
	}
	return out
}
