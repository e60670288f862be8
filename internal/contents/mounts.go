package contents

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents/images"
)

// mounts lists the mounts of the first process's mount namespace.
func (p *processes) mounts(ctx context.Context, namespace uint64, c *api.ContainerContents) error {
	name := fmt.Sprintf("mountpoints-%d.img", namespace)
	if _, there := p.names[name]; !there {
		return nil
	}
	n := 0
	err := images.Messages(ctx, p.source, name, images.Mounts, func(e *mnt.MntEntry) error {
		m := p.mount(e)
		size := len(m.Destination) + len(m.Source)
		for _, o := range m.Options {
			size += len(o) + 16
		}
		if p.fits(p.at+".mounts", n, p.limits.Mounts, size) {
			n++
			c.Mounts = append(c.Mounts, m)
		}
		return nil
	})
	slices.SortStableFunc(c.Mounts, func(a, b api.Mount) int { return strings.Compare(a.Destination, b.Destination) })
	return p.failed(ctx, "mounts", err)
}

func (p *processes) mount(e *mnt.MntEntry) api.Mount {
	m := api.Mount{Destination: p.clean(absolute(e.GetMountpoint())), Source: p.clean(e.GetSource())}
	kind := mnt.Fstype(e.GetFstype())
	switch {
	case e.GetFsname() != "":
		m.Type = p.clean(e.GetFsname())
	case kind == mnt.Fstype_OVERLAYFS:
		m.Type = "overlay"
	case kind != mnt.Fstype_UNSUPPORTED:
		m.Type = strings.ToLower(kind.String())
	default:
		m.Type = "other"
	}
	// A mount that the engine takes from outside is of a directory or file of the node.
	if m.Type == "other" && e.GetRoot() != "/" {
		m.Type, m.Source = "bind", p.clean(e.GetRoot())
	}
	m.Options = p.options(e)
	return m
}

// options are a mount's flags, then those of the file system that say something: where
// an overlay's layers lie is the container runtime's affair.
func (p *processes) options(e *mnt.MntEntry) []string {
	options := []string{"rw"}
	for _, f := range []struct {
		bit  uint32
		name string
	}{{1 << 0, "ro"}, {1 << 1, "nosuid"}, {1 << 2, "nodev"}, {1 << 3, "noexec"}, {1 << 10, "noatime"}, {1 << 21, "relatime"}} {
		switch {
		case e.GetFlags()&f.bit == 0:
		case f.name == "ro":
			options[0] = "ro"
		default:
			options = append(options, f.name)
		}
	}
	for o := range strings.SplitSeq(e.GetOptions(), ",") {
		key, _, _ := strings.Cut(o, "=")
		switch key {
		case "", "lowerdir", "upperdir", "workdir":
			continue
		}
		if len(options) == 64 {
			break
		}
		options = append(options, p.clean(o))
	}
	return options
}
