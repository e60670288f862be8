package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/nodeapi"
)

// joinSysVEnv makes the launcher of CRIU load a library that finds System V shared
// memory where CRIU creates it (joinshm/joinshm.c). CRIU inherits it from the OCI runtime.
const joinSysVEnv = "STASIS_JOIN_SHM"

// prepareSysVIPC makes the sandbox's System V IPC objects what the restore of a
// container needs them to be.
func prepareSysVIPC(ipcns string, how nodeapi.SysVIPC) error {
	switch how {
	case nodeapi.SysVIPCCreate:
		if ipcns == "" {
			return nil // the node's: what is there is not ours
		}
		if err := inNamespace(ipcns, unix.CLONE_NEWIPC, removeSysVIPC); err != nil {
			return fmt.Errorf("remove System V IPC objects of an earlier try: %w", err)
		}
		return nil
	case nodeapi.SysVIPCJoin, nodeapi.SysVIPCKeep:
		return nil
	}
	return fmt.Errorf("the agent does not say what becomes of System V IPC objects (%q): stasis-runtime and stasis-agent are of different versions", how)
}

// removeSysVIPC removes all objects of the thread's IPC namespace.
func removeSysVIPC() error {
	var errs []error
	for _, kind := range []struct {
		name string
		ctl  uintptr
		args func(id uintptr) (a, b, c uintptr)
	}{
		{"shm", unix.SYS_SHMCTL, func(id uintptr) (a, b, c uintptr) { return id, unix.IPC_RMID, 0 }},
		{"msg", unix.SYS_MSGCTL, func(id uintptr) (a, b, c uintptr) { return id, unix.IPC_RMID, 0 }},
		{"sem", unix.SYS_SEMCTL, func(id uintptr) (a, b, c uintptr) { return id, 0, unix.IPC_RMID }},
	} {
		// The thread's own view: /proc/sysvipc is of the IPC namespace of who opens it.
		data, err := os.ReadFile("/proc/sysvipc/" + kind.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without them
		} else if err != nil {
			return err
		}
		for _, line := range strings.Split(string(data), "\n")[1:] {
			fields := strings.Fields(line)
			if len(fields) < 2 {
				continue
			}
			id, err := strconv.ParseUint(fields[1], 10, 31)
			if err != nil {
				return fmt.Errorf("/proc/sysvipc/%s: %w", kind.name, err)
			}
			a, b, c := kind.args(uintptr(id))
			if _, _, errno := unix.Syscall(kind.ctl, a, b, c); errno != 0 && errno != unix.EINVAL && errno != unix.EIDRM {
				errs = append(errs, fmt.Errorf("%s %d: %w", kind.name, id, errno))
			}
		}
	}
	return errors.Join(errs...)
}
