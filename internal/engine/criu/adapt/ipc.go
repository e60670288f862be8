package adapt

import (
	"context"
	"fmt"
	"os"
	"regexp"

	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/nodeapi"
)

// System V IPC objects belong to the sandbox, and the images of every container hold
// them all. The first container that is restored brings them back. For the others
// they are there: semaphores and queues are left out of their images, and CRIU, which
// must know of a segment to attach it, is made to find it instead of creating it.

var ipcImage = regexp.MustCompile(`^ipcns-(shm|msg|sem)-[0-9]+\.img$`)

var ipcMagic = map[string]images.Magic{"shm": images.IPCNSShm, "msg": images.IPCNSMsg, "sem": images.IPCNSSem}

func (p Pod) writeIPC(ctx context.Context, w *writer) (nodeapi.SysVIPC, error) {
	if len(p.Created) == 0 {
		return nodeapi.SysVIPCCreate, nil
	}
	src, root, err := source(w.from)
	if err != nil {
		return "", err
	}
	defer root.Close()
	entries, err := os.ReadDir(w.from)
	if err != nil {
		return "", fmt.Errorf("read the checkpoint's images: %w", err)
	}
	how := nodeapi.SysVIPCKeep
	for _, e := range entries {
		match := ipcImage.FindStringSubmatch(e.Name())
		if match == nil {
			continue
		}
		magic := ipcMagic[match[1]]
		if magic != images.IPCNSShm {
			if err := w.write(e.Name(), newImage(magic)); err != nil {
				return "", err
			}
			continue
		}
		if err := src.Entries(ctx, e.Name(), magic, func([]byte) error {
			how = nodeapi.SysVIPCJoin
			return nil
		}); err != nil {
			return "", err
		}
	}
	return how, nil
}
