package criu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CRIU recreates processes under the IDs that they had. Where the containers of a Pod share
// a PID namespace others may have taken these by then: what CRIU itself starts in there, an
// exec, the children of a container that runs already. So before the first of them is
// restored the namespace goes on to count where no captured ID is. (Near kernel.pid_max, which
// few nodes have below four million, it begins again at 300 before all are restored.)

// PIDReserver is the command of the program that restores by which it does that from within
// the namespace, as the kernel wants it. Its argument is the highest captured ID.
const PIDReserver = "stasis-reserve-pids"

// lastPIDFile is the ID that was given last in the PID namespace of who opens it
// (/proc/sys/kernel/ns_last_pid, clone3(2)).
const lastPIDFile = "/proc/sys/kernel/ns_last_pid"

// reservePIDs keeps the IDs up to last from whoever starts in the sandbox' PID namespace.
// 0 reserves none; an empty path is a namespace of the container's own, which CRIU makes.
func reservePIDs(pidns string, last int) error {
	if pidns == "" || last == 0 {
		return nil
	}
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	var out []byte
	err = inNamespace(pidns, unix.CLONE_NEWPID, func() (err error) { // of the children, not of the thread
		out, err = exec.Command(executable, PIDReserver, strconv.Itoa(last)).CombinedOutput()
		return err
	})
	if err != nil {
		return fmt.Errorf("keep the PIDs of the checkpoint's processes from others: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ReservePIDs is the side within the namespace.
func ReservePIDs(argument string) error {
	want, err := strconv.Atoi(argument)
	if err != nil {
		return fmt.Errorf("the highest PID: %w", err)
	}
	data, err := os.ReadFile(lastPIDFile)
	if err != nil {
		return err
	}
	last, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return fmt.Errorf("%s: %w", lastPIDFile, err)
	}
	if last >= want {
		return nil
	}
	if err = os.WriteFile(lastPIDFile, []byte(argument), 0); errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("the checkpoint has a process or thread with PID %d, and this node's kernel.pid_max (sysctl(8)) is lower: %w", want, err)
	}
	return err
}
