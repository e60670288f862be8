// Package adapt makes CRIU's images fit the Pod that they are restored into. CRIU
// recreates a container as if it were alone and where it was; a restored container
// shares its network, its System V IPC objects and maybe its PID namespace with the others
// of its Pod, and has another address than the source.
//
// The checkpoint itself is never changed (C1): what differs is written beside second
// names of everything else.
package adapt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/nodeapi"
)

// Pod is a checkpointed Pod on its way into a sandbox.
type Pod struct {
	// ImageDirs are the directories of images, by container: of all that the
	// checkpoint holds.
	ImageDirs map[string]string
	// Created names the containers that exist in this sandbox already.
	Created []string
	// Was and Is are the source's addresses and the sandbox's.
	Was, Is []netip.Addr
}

// maxImages bounds what is read of the images of one container: the larger part of it
// are the tables of open files.
const maxImages = 256 << 20

// Container writes the images of one container, as they are to be in the Pod's new
// sandbox, to dir, which it makes anew. It returns what else the restore takes: which
// connections must be held, what to make of System V IPC objects, which PIDs to reserve.
func (p Pod) Container(ctx context.Context, name, dir string) (*nodeapi.ContainerRestore, error) {
	from, ok := p.ImageDirs[name]
	if !ok {
		return nil, fmt.Errorf("the checkpoint has no images of container %s", name)
	}
	links, err := p.connections(ctx)
	if err != nil {
		return nil, err
	}
	w := &writer{from: from, to: dir}
	if err := w.begin(); err != nil {
		return nil, fmt.Errorf("lay out the images of container %s: %w", name, err)
	}
	if err := p.writeSockets(ctx, w, name, links); err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	adapted := &nodeapi.ContainerRestore{
		HoldDuring: p.awaited(links, p.Created),
		HoldAfter:  p.awaited(links, append(slices.Clone(p.Created), name)),
	}
	if adapted.LastPID, err = p.lastPID(ctx); err != nil {
		return nil, err
	}
	if adapted.SysVIPC, err = p.writeIPC(ctx, w); err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	if err := w.linkRest(); err != nil {
		return nil, fmt.Errorf("lay out the images of container %s: %w", name, err)
	}
	return adapted, nil
}

// source opens a container's images; no name in it leads out of the directory.
func source(dir string) (*images.Source, *os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("open the checkpoint's images: %w", err)
	}
	return images.New(root.FS(), maxImages), root, nil
}

// writer lays out a directory of images: files of its own, and the others as they are,
// under a second name. (Symbolic links would not do: CRIU opens some of its images when
// it has left the host's root behind.)
type writer struct {
	from, to string
	written  []string
}

func (w *writer) begin() error {
	if err := os.RemoveAll(w.to); err != nil {
		return err
	}
	return os.MkdirAll(w.to, 0o700)
}

func (w *writer) write(name string, image []byte) error {
	w.written = append(w.written, name)
	// What it is for ends with the node's memory: nothing to make durable.
	return os.WriteFile(filepath.Join(w.to, name), image, 0o600)
}

func (w *writer) linkRest() error {
	entries, err := os.ReadDir(w.from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || slices.Contains(w.written, e.Name()) {
			continue
		}
		from, to := filepath.Join(w.from, e.Name()), filepath.Join(w.to, e.Name())
		err := os.Link(from, to)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
			err = copyFile(from, to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func (p Pod) names() []string { return slices.Sorted(maps.Keys(p.ImageDirs)) }
