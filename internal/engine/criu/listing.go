package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"podstasis.dev/stasis/internal/engine/criu/mappings"
)

// CRIU reads /proc/PID/smaps of all processes that it captures, for which the kernel walks
// through their page tables: most of the freeze window of a container with much memory whose
// pages are captured later. What CRIU reads of it is written for it instead (package
// mappings), and given to it by the library that it is started with (ahead/ahead.c). Of a
// process for which there is no such list it asks the kernel.

// listPrefix begins the names of lists, beside the sockets of CRIUs that wait; the rest is
// the process.
const listPrefix = "smaps-"

// lister writes lists of mappings. It is made when it is first wanted.
type lister struct {
	once   sync.Once
	kernel *mappings.Kernel // nil: this kernel cannot be asked
	names  *mappings.Names
}

// listsMappings says whether lists can be written.
func (e *Engine) listsMappings(ctx context.Context) bool {
	e.lister.once.Do(func() {
		kernel, err := mappings.Open()
		if err == nil {
			if e.lister.names, err = mappings.Learn(kernel); err != nil {
				err = errors.Join(err, kernel.Close())
			}
		}
		if err != nil {
			e.log.InfoContext(ctx, "CRIU lists mappings itself, which takes longer", "because", err)
			return
		}
		e.lister.kernel = kernel
	})
	return e.lister.kernel != nil
}

// listMappings writes the lists of processes that stand still. It returns when ctx ends.
func (e *Engine) listMappings(ctx context.Context, w window, pids []int) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, pid := range pids {
			if ctx.Err() != nil {
				return
			}
			if err := e.listMappingsOf(w, pid); err != nil {
				e.log.InfoContext(ctx, "CRIU lists a process's mappings itself, which takes longer", "sandbox", w.sandbox.ID, "process", pid, "because", err)
			}
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func (e *Engine) listMappingsOf(w window, pid int) error {
	list, err := e.lister.names.Of(e.lister.kernel, pid)
	if err != nil || len(list) == 0 {
		return err
	}
	return e.host.Do(func() error {
		name := filepath.Join(e.workDir, w.sandbox.ID, listPrefix+strconv.Itoa(pid))
		if err := os.WriteFile(name+".new", list, 0o600); err != nil {
			return err
		}
		return os.Rename(name+".new", name)
	})
}
