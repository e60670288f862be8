package criu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the half of the engine that works inside the OCI runtime, in the
// container runtime's mount namespace.

// RestoreRequest says how to recreate one container's processes.
type RestoreRequest struct {
	Runtime string   // the OCI runtime
	Global  []string // its global arguments, as the container runtime gave them
	ID      string
	Bundle  string
	PIDFile string // the container runtime waits for it; may be empty
	// ConsoleSocket is passed on for containers with a terminal; may be empty.
	ConsoleSocket string
	ImageDir      string
	WorkDir       string
	Path          string // PATH, where CRIU is found
	// UTSNamespace is a path to the sandbox's UTS namespace, whose host name is
	// the new Pod's and stays it; empty if the container shares the node's.
	UTSNamespace string
}

// ConfigAnnotation names a file of CRIU options that the OCI runtime passes on.
// It names scripts that run as root: whoever may set it owns the node.
const ConfigAnnotation = "org.criu.config"

// WriteRestoreConfig writes the CRIU options of a restore that the OCI runtime's
// command line lacks. hook is the program that CRIU calls at each stage.
//
// Established TCP connections come back closed: their other ends are connected
// to the source, which goes on.
func WriteRestoreConfig(file, hook string) error {
	return os.WriteFile(file, []byte("action-script "+hook+"\ntcp-close\nnetwork-lock skip\n"), 0o600)
}

// Restore recreates a container's processes. When it returns without error the
// container exists, is frozen, and has not run an instruction. On error nothing
// of the container is left.
func Restore(ctx context.Context, r RestoreRequest) error {
	hostname := ""
	if r.UTSNamespace != "" {
		var err error
		if hostname, err = hostnameOf(r.UTSNamespace); err != nil {
			return fmt.Errorf("read the Pod's host name: %w", err)
		}
	}
	if err := runRestore(ctx, r); err != nil {
		return errors.Join(err, remove(r))
	}
	if err := settle(r, hostname); err != nil {
		return errors.Join(err, remove(r))
	}
	return nil
}

func runRestore(ctx context.Context, r RestoreRequest) error {
	args := append([]string{}, r.Global...)
	args = append(args, "restore", "--detach", "--bundle", r.Bundle, "--image-path", r.ImageDir, "--work-path", r.WorkDir, "--file-locks")
	if r.PIDFile != "" {
		args = append(args, "--pid-file", r.PIDFile)
	}
	if r.ConsoleSocket != "" {
		args = append(args, "--console-socket", r.ConsoleSocket)
	}
	cmd := exec.CommandContext(ctx, r.Runtime, append(args, r.ID)...)
	cmd.Env = append(os.Environ(), "PATH="+r.Path)
	// The restored processes take over these: they are the container's.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		err = fmt.Errorf("%s restore: %w", filepath.Base(r.Runtime), err)
		if lines := LastErrors(filepath.Join(r.WorkDir, "restore.log")); len(lines) > 0 {
			err = fmt.Errorf("%w; CRIU's last errors: %s", err, strings.Join(lines, " | "))
		}
		return err
	}
	return nil
}

// settle makes sure that the container stands still and gives the sandbox its
// host name back, which CRIU has overwritten with the source's.
func settle(r RestoreRequest, hostname string) error {
	if r.PIDFile != "" {
		data, err := os.ReadFile(r.PIDFile)
		if err != nil {
			return fmt.Errorf("read the restored process' ID: %w", err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
		if err != nil {
			return fmt.Errorf("read the restored process' ID: %w", err)
		}
		if err := waitFrozen(pid, 5*time.Second); err != nil {
			return err
		}
	}
	if r.UTSNamespace == "" {
		return nil
	}
	if err := inUTS(r.UTSNamespace, func() error { return unix.Sethostname([]byte(hostname)) }); err != nil {
		return fmt.Errorf("set the Pod's host name: %w", err)
	}
	return nil
}

// remove ends what a failed restore left of the container.
func remove(r RestoreRequest) error {
	args := append(append([]string{}, r.Global...), "delete", "--force", r.ID)
	if out, err := exec.Command(r.Runtime, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("remove what the failed restore left: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func hostnameOf(ns string) (string, error) {
	var name string
	err := inUTS(ns, func() (err error) {
		name, err = os.Hostname()
		return err
	})
	return name, err
}

// inUTS runs fn on a thread of its own inside a UTS namespace.
func inUTS(ns string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			f, err := os.Open(ns)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWUTS); err != nil {
				return err
			}
			return fn()
		}()
	}()
	return <-done
}

// FreezeHook is what CRIU calls as its action script (criu(8), --action-script).
// At pre-resume, when the processes are complete and none has run, it freezes
// them; CRIU itself, which the OCI runtime has put into the same cgroup, is taken
// out of it first, or it would freeze too and never return.
func FreezeHook(getenv func(string) string, parent int) error {
	if getenv("CRTOOLS_SCRIPT_ACTION") != "pre-resume" {
		return nil
	}
	pid, err := strconv.Atoi(getenv("CRTOOLS_INIT_PID"))
	if err != nil {
		return fmt.Errorf("CRTOOLS_INIT_PID: %w", err)
	}
	f, err := freezerOf(pid)
	if err != nil {
		return err
	}
	for _, p := range []int{os.Getpid(), parent} {
		if err := os.WriteFile(filepath.Join(f.mount, "cgroup.procs"), []byte(strconv.Itoa(p)), 0); err != nil {
			return fmt.Errorf("move process %d out of the container's cgroup: %w", p, err)
		}
	}
	return f.freeze()
}

// freezer is a container's freezer cgroup.
type freezer struct {
	mount, path string
	unified     bool
}

func freezerOf(pid int) (freezer, error) {
	path, unified, err := cgroupOf(pid, "freezer")
	if err != nil {
		return freezer{}, fmt.Errorf("find the freezer of process %d: %w", pid, err)
	}
	mount, err := cgroupMount("freezer", unified)
	if err != nil {
		return freezer{}, err
	}
	if path == "/" {
		return freezer{}, fmt.Errorf("process %d is in no freezer cgroup of its own", pid)
	}
	return freezer{mount: mount, path: path, unified: unified}, nil
}

// freeze asks for the freeze. Processes that a tracer holds, as CRIU's do at
// that point, stop at once when they are let go.
func (f freezer) freeze() error {
	name, value := "freezer.state", "FROZEN"
	if f.unified {
		name, value = "cgroup.freeze", "1"
	}
	if err := os.WriteFile(filepath.Join(f.mount, f.path, name), []byte(value), 0); err != nil {
		return fmt.Errorf("freeze the restored container: %w", err)
	}
	return nil
}

func (f freezer) frozen() (bool, error) {
	if f.unified {
		data, err := os.ReadFile(filepath.Join(f.mount, f.path, "cgroup.events"))
		return strings.Contains(string(data), "frozen 1"), err
	}
	data, err := os.ReadFile(filepath.Join(f.mount, f.path, "freezer.state"))
	return strings.TrimSpace(string(data)) == "FROZEN", err
}

// waitFrozen waits until all processes of a container stand still.
func waitFrozen(pid int, limit time.Duration) error {
	f, err := freezerOf(pid)
	if err != nil {
		return err
	}
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		frozen, err := f.frozen()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return errors.New("the restored container ended before it was started")
		case err != nil:
			return fmt.Errorf("look whether the restored container is frozen: %w", err)
		case frozen:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("the restored container was not frozen within %v: CRIU did not call the freeze hook", limit)
		}
	}
}
