package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
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

// learnMappings prepares, while the processes run, for their lists to be written. It says
// whether any can be.
func (e *Engine) learnMappings(ctx context.Context, w window) bool {
	e.lister.once.Do(func() {
		kernel, err := mappings.Open()
		if err != nil {
			e.log.InfoContext(ctx, "CRIU lists mappings itself, which takes longer", "because", err)
			return
		}
		e.lister.kernel, e.lister.names = kernel, mappings.NewNames()
	})
	if e.lister.kernel == nil {
		return false
	}
	pids, err := processesOf(w.sandbox.Containers)
	for _, pid := range slices.Concat(pids...) {
		err = errors.Join(err, unlessEnded(e.lister.names.Learn(e.lister.kernel, pid)))
	}
	if err != nil { // lists that cannot be written will not be
		e.log.InfoContext(ctx, "not all mappings are known before the freeze", "sandbox", w.sandbox.ID, "because", err)
	}
	return true
}

// listMappings writes the lists of processes that stand still.
func (e *Engine) listMappings(ctx context.Context, w window, pids []int) {
	for _, pid := range pids {
		list, err := e.lister.names.Of(e.lister.kernel, pid)
		if err == nil && len(list) > 0 {
			err = e.host.Do(func() error {
				name := filepath.Join(e.workDir, w.sandbox.ID, listPrefix+strconv.Itoa(pid))
				err := os.WriteFile(name+".new", list, 0o600)
				if err == nil {
					err = os.Rename(name+".new", name)
				}
				return err
			})
		}
		if err != nil {
			e.log.InfoContext(ctx, "CRIU lists a process's mappings itself, which takes longer", "sandbox", w.sandbox.ID, "process", pid, "because", err)
		}
	}
}
