package criu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeapi"
)

// This file is the half of the engine that works inside the OCI runtime, in the
// container runtime's mount namespace.

// RestoreRequest says how to recreate one container's processes.
type RestoreRequest struct {
	Runtime string   // the OCI runtime
	Root    string   // its state directory (--root)
	Global  []string // more of its global arguments, such as --systemd-cgroup
	Sandbox string   // its ID
	ID      string
	Bundle  string
	PIDFile string // the container runtime waits for it; may be empty
	// ConsoleSocket is passed on for containers with a terminal; may be empty.
	ConsoleSocket string
	ImageDir      string
	WorkDir       string // for CRIU's log
	RunDir        string // for a short-lived socket; its path must be short
	Path          string // PATH, where CRIU is found
	// UTSNamespace is a path to the sandbox's UTS namespace, whose host name is
	// the new Pod's and stays it; empty if the container shares the node's.
	UTSNamespace string
	// NetNamespace and IPCNamespace are paths to the sandbox's; empty if the container
	// shares the node's.
	NetNamespace, IPCNamespace string
	// HoldDuring and HoldAfter are connections on which nothing is said while the
	// container is restored, and once it has been.
	HoldDuring, HoldAfter []nodeapi.Connection
	SysVIPC               nodeapi.SysVIPC
	// PIDNamespace is a path to the sandbox's; empty if the container has its own. IDs up
	// to LastPID are the checkpoint's there (nodeapi.ContainerRestore).
	PIDNamespace string
	LastPID      int
	// Memory, if set, gives the processes their memory while they run: a plan of it is
	// in WorkDir.
	Memory *MemoryOf
}

// refillEnv makes the launcher of CRIU load a library that fills small file systems without
// tar (refill/refill.c). CRIU inherits it from the OCI runtime.
const refillEnv = "STASIS_REFILL"

// ConfigAnnotation names a file of CRIU options that the OCI runtime passes on.
// It names scripts that run as root: whoever may set it owns the node.
const ConfigAnnotation = "org.criu.config"

// RestoreConfig is what CRIU is told of a restore for which the OCI runtime's command line
// has no options.
type RestoreConfig struct {
	Hook   string // the program that CRIU calls at each stage
	Lazily bool   // somebody else gives the processes their memory
	Masked Masked
	// Cgroups are what the container sees of its cgroups, as long as it is being restored: to
	// a checkpoint such a mount is known by where it is.
	Cgroups []Bind
}

// Masked are paths in /proc and /sys at which a container sees nothing. Images of crun and
// of runc name the mounts there by different names.
type Masked struct {
	Files []string
	// Directories are those at which crun has mounted a directory of the host, where runc
	// would have mounted an empty file system; Empty stands for it here.
	Directories []string
	Empty       string
}

// maskKey is what crun's images call the directory: it is below its state directory, and
// named as if that were the default one.
const maskKey = "/run/crun/.empty-directory"

// MaskedByCrun says whether a container's images have directories that crun has masked,
// then or in a Pod that it was restored from.
func MaskedByCrun(imageDir string) (masked bool, err error) {
	images, err := filepath.Glob(filepath.Join(imageDir, "mountpoints-*.img"))
	if err != nil {
		return false, err
	}
	for _, image := range images {
		f, err := os.Open(image)
		if err != nil {
			return false, err
		}
		data, err := io.ReadAll(io.LimitReader(f, maxMountImage))
		f.Close()
		if err != nil {
			return false, err
		}
		masked = masked || bytes.Contains(data, []byte(maskKey))
	}
	return masked, nil
}

// maxMountImage bounds what is read of an image of mounts.
const maxMountImage = 16 << 20

// WriteRestoreConfig writes it as a file of CRIU options (criu(8)). The container keeps it
// for its lifetime, and the OCI runtime passes it on when it is checkpointed.
//
// TCP connections are restored: the images say to where (package adapt).
func WriteRestoreConfig(file string, c RestoreConfig) error {
	options := "action-script " + c.Hook + "\ntcp-established\n"
	if c.Lazily {
		options += "lazy-pages\n"
	}
	for _, path := range c.Masked.Files { // as runc has it at a checkpoint
		options += "external mnt[" + path + "]:/dev/null\n"
	}
	if c.Masked.Empty != "" {
		options += "external mnt[" + maskKey + "]:" + c.Masked.Empty + "\n"
	}
	for _, path := range c.Masked.Directories { // for the next checkpoint
		options += "external mnt[" + path + "]:" + maskKey + "\n"
	}
	for _, c := range c.Cgroups {
		options += "external mnt[" + c.Destination + "]:" + c.Source + "\n"
	}
	return os.WriteFile(file, []byte(options), 0o600)
}

// Restore recreates a container's processes. When it returns without error the
// container exists, is frozen, and has not run an instruction; the sandbox has
// the host name that it had before, which CRIU has overwritten with the source's.
// On error nothing of the container is left.
func Restore(ctx context.Context, r RestoreRequest) error {
	hostname := ""
	if r.UTSNamespace != "" {
		var err error
		if hostname, err = hostnameOf(r.UTSNamespace); err != nil {
			return fmt.Errorf("read the Pod's host name: %w", err)
		}
	}
	if err := prepareSysVIPC(r.IPCNamespace, r.SysVIPC); err != nil {
		return err
	}
	if err := reservePIDs(r.PIDNamespace, r.LastPID); err != nil {
		return err
	}
	if len(r.HoldDuring) > 0 {
		if err := hold(r.NetNamespace, r.HoldDuring); err != nil {
			return err
		}
	}
	release := func() {}
	if r.Memory != nil {
		var err error
		if release, err = startMemory(*r.Memory); err != nil {
			return err
		}
	}
	err := runRestore(ctx, r)
	release()
	if err == nil && len(r.HoldDuring) > 0 {
		err = hold(r.NetNamespace, r.HoldAfter)
	}
	if err == nil && hostname != "" {
		err = inNamespace(r.UTSNamespace, unix.CLONE_NEWUTS, func() error { return unix.Sethostname([]byte(hostname)) })
	}
	if err != nil {
		return errors.Join(err, remove(r))
	}
	return nil
}

func runRestore(ctx context.Context, r RestoreRequest) (err error) {
	hook, err := listenForHook(r.RunDir, func() error { return EndRestores(r.RunDir, r.ID) })
	if err != nil {
		return err
	}
	defer func() {
		if err != nil { // CRIU may outlive an OCI runtime that was killed
			err = errors.Join(err, EndRestores(r.RunDir, r.ID))
		}
		err = errors.Join(err, hook.close())
	}()
	log := filepath.Join(r.WorkDir, "runtime.log")
	args := append(r.global(), "--log", log, "--log-format", "json", "restore", "--detach", "--bundle", r.Bundle, "--image-path", r.ImageDir, "--work-path", r.WorkDir, "--file-locks")
	if r.PIDFile != "" {
		args = append(args, "--pid-file", r.PIDFile)
	}
	if r.ConsoleSocket != "" {
		args = append(args, "--console-socket", r.ConsoleSocket)
	}
	cmd := exec.CommandContext(ctx, r.Runtime, append(args, r.ID)...)
	cmd.Env = append(os.Environ(), "PATH="+r.Path, HookSocketEnv+"="+hook.path, refillEnv+"=1", restoreEnv+"="+r.Sandbox+"."+r.ID)
	if r.SysVIPC == nodeapi.SysVIPCJoin {
		cmd.Env = append(cmd.Env, joinSysVEnv+"=1")
	}
	// The restored processes take over these: they are the container's.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// The OCI runtime and CRIU mount much for the time of a restore: the container's root
	// file system and volumes once more, cgroup hierarchies. If they are killed none of it
	// is left on the host, where whoever removes their directories would go through it.
	if err = hostns.Apart(cmd.Start); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s restore: %w", filepath.Base(r.Runtime), err)
		if reason := lastErrors(filepath.Join(r.WorkDir, "restore.log")); reason != "" {
			return fmt.Errorf("%w: CRIU failed: %s", err, reason)
		}
		return fmt.Errorf("%w: %s", err, lastMessage(log))
	}
	return hook.frozen()
}

func (r RestoreRequest) global() []string {
	return append([]string{"--root", r.Root}, r.Global...)
}

// lastMessage returns the last message of an OCI runtime's JSON log.
func lastMessage(log string) string {
	data, err := os.ReadFile(log)
	if err != nil {
		return "it left no log"
	}
	message := "its log is empty"
	for line := range strings.Lines(string(data)) {
		var entry struct{ Msg string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg != "" {
			message = entry.Msg
		}
	}
	return message
}

// remove ends what a failed restore left of the container.
func remove(r RestoreRequest) error {
	args := append(r.global(), "delete", "--force", r.ID)
	if out, err := exec.Command(r.Runtime, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("remove what the failed restore left: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func hostnameOf(ns string) (string, error) {
	var name string
	err := inNamespace(ns, unix.CLONE_NEWUTS, func() (err error) {
		name, err = os.Hostname()
		return err
	})
	return name, err
}

// inNamespace runs fn on a thread of its own inside a namespace of a kind (CLONE_NEW...).
func inNamespace(path string, kind int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Setns(int(f.Fd()), kind); err != nil {
				return fmt.Errorf("enter namespace %s: %w", path, err)
			}
			return fn()
		}()
	}()
	return <-done
}
