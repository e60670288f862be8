package adapt

import (
	"context"
	"fmt"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"

	"podstasis.dev/stasis/internal/contents/images"
)

// lastPID is the highest ID of a process, thread, process group or session of the Pod's
// containers. It matters where they share a PID namespace, before the first is restored;
// else it is 0.
func (p Pod) lastPID(ctx context.Context) (last int, err error) {
	if len(p.Created) > 0 {
		return 0, nil
	}
	for _, name := range p.names() {
		err := func() error {
			src, root, err := source(p.ImageDirs[name])
			if err != nil {
				return err
			}
			defer root.Close()
			return images.Messages(ctx, src, "pstree.img", images.PSTree, func(e *pstree.PstreeEntry) error {
				last = max(last, int(e.GetPid()), int(e.GetPgid()), int(e.GetSid()))
				for _, thread := range e.GetThreads() {
					last = max(last, int(thread))
				}
				return nil
			})
		}()
		if err != nil {
			return 0, fmt.Errorf("read the processes of container %s: %w", name, err)
		}
	}
	return last, nil
}
