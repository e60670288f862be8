package gvisor

import (
	"slices"
	"strconv"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
)

const volumesDir = "volumes"

// volume is a directory of the host that containers of the Pod share and that belongs to
// it. What the sandbox keeps in itself, as /dev/shm, is part of what it saves.
type volume struct {
	name, source string
	mounts       []checkpoint.VolumeMount
}

func (v volume) archive() string { return volumesDir + "/" + v.name + ".tar" }

// volumesOf finds them. It looks at files of the host.
func volumesOf(containers []engine.Container) (volumes []volume) {
	for _, c := range containers {
		ofImage := 0
		for _, m := range c.Spec.Mounts {
			owned := engine.OwnedBy(c.ID, m)
			name := owned.Name
			switch {
			case owned.Root == "" || m.Destination == "/dev/shm":
				continue
			case owned.OfImage:
				ofImage++
				name = "image-" + c.Name + "-" + strconv.Itoa(ofImage)
			}
			i := slices.IndexFunc(volumes, func(v volume) bool { return v.source == owned.Root })
			if i < 0 {
				i = len(volumes)
				volumes = append(volumes, volume{name: name, source: owned.Root})
			}
			volumes[i].mounts = append(volumes[i].mounts, checkpoint.VolumeMount{Container: c.Name, Destination: m.Destination})
		}
	}
	return volumes
}
