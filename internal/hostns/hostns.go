// Package hostns reaches into the mount namespace of the container runtime:
// that is where runc, its state, the engine and the containers' root
// filesystems are, whether the agent runs as a container, beside containerd on
// a plain host, or inside a node that is itself a container (kind).
package hostns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// The main thread keeps the process' own namespace: /proc/PID shows that thread's,
// and it cannot end as the others do that Do takes into a namespace.
func init() { runtime.LockOSThread() }

// DefaultPath is the PATH under which host commands are found when the caller
// names none. Stasis' own programs come first, so that its CRIU is preferred.
const DefaultPath = "/opt/stasis/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Host is a mount namespace, held open: it stays reachable while the container
// runtime that it was found through is being restarted.
type Host struct {
	mnt  *os.File // the namespace, for setns(2)
	root *os.File // O_PATH of its root directory
	path string   // PATH for commands
}

// PeerPID returns the process that listens on a Unix socket, as this process'
// PID namespace numbers it.
func PeerPID(socket string) (int, error) {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return 0, fmt.Errorf("find the process behind %s: %w", socket, err)
	}
	defer conn.Close()
	pid, err := Peer(conn.(*net.UnixConn))
	if err != nil {
		return 0, fmt.Errorf("find the process behind %s: %w", socket, err)
	}
	return pid, nil
}

// Peer returns the process at the other end of a connection, as this process'
// PID namespace numbers it (SO_PEERCRED, unix(7)).
func Peer(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		credErr = err
	}
	if credErr != nil {
		return 0, fmt.Errorf("who is the peer: %w", credErr)
	}
	if cred.Pid <= 0 {
		return 0, errors.New("the peer's process is not visible from here: run in the host's PID namespace (hostPID: true)")
	}
	return int(cred.Pid), nil
}

// FromSocket opens the mount namespace of the process that listens on a Unix
// socket, such as containerd's. A "unix://" before the path is accepted.
func FromSocket(socket string) (*Host, error) {
	pid, err := PeerPID(strings.TrimPrefix(socket, "unix://"))
	if err != nil {
		return nil, err
	}
	return FromPID(pid)
}

// FromPID opens the mount namespace of a process.
func FromPID(pid int) (*Host, error) {
	proc := "/proc/" + strconv.Itoa(pid)
	mnt, err := os.Open(proc + "/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("open the mount namespace of process %d: %w", pid, err)
	}
	fd, err := unix.Open(proc+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		mnt.Close()
		return nil, fmt.Errorf("open the root directory of process %d: %w", pid, err)
	}
	return &Host{mnt: mnt, root: os.NewFile(uintptr(fd), proc+"/root"), path: DefaultPath}, nil
}

// WithPath returns the same namespace with another PATH for its commands.
func (h *Host) WithPath(path string) *Host {
	other := *h
	other.path = path
	return &other
}

// SearchPath is the PATH of commands run on the host.
func (h *Host) SearchPath() string { return h.path }

// Close gives the namespace back.
func (h *Host) Close() error { return errors.Join(h.mnt.Close(), h.root.Close()) }

// Path returns a path by which this process reaches an absolute path of the
// host's mount namespace. Absolute symbolic links on the way lead back into this
// process' own namespace: use Do where the host has such links.
func (h *Host) Path(abs string) string {
	return filepath.Join("/proc/self/fd", strconv.Itoa(int(h.root.Fd())), abs)
}

// Do runs fn on a thread of its own inside the host's mount namespace, so that
// every path means there what it means to the container runtime. fn must not
// hand file work to other goroutines.
func (h *Host) Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread is never unlocked: with the goroutine's end it ends too, and
		// its namespace with it.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("leave the shared file system context: %w", err)
			}
			if err := unix.Setns(int(h.mnt.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the container runtime's mount namespace: %w", err)
			}
			return fn()
		}()
	}()
	return <-done
}

// Apart runs fn on a thread of its own in a new mount namespace, which ends with the
// last process that fn starts there. It gets what is mounted in the caller's and gives
// nothing back: what such a process leaves mounted when it is killed is nobody's.
func Apart(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, as in Do
		done <- func() error {
			if err := leaveMounts(); err != nil {
				return err
			}
			return fn()
		}()
	}()
	return <-done
}

// leaveMounts takes the calling thread into a mount namespace of its own.
func leaveMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keep mounts from spreading to the host: %w", err)
	}
	return nil
}

// Command is a program to be run in the host's mount namespace.
type Command struct {
	Name string   // found in PATH when it has no slash
	Args []string // without the name
	Env  []string // added to PATH, HOME and LANG
	// Interrupt, if set, asks the command to end when the context of Run has, and
	// says how long it may take before it is killed.
	Interrupt func() time.Duration
	// Apart runs the command in a mount namespace of its own (see the function).
	Apart bool
	// Outside runs the command in the root of every cgroup hierarchy instead of
	// the caller's cgroups: it survives the end of the caller's container, and is
	// not counted against its limits.
	Outside bool
	// Stderr is where the stderr of a command of Start goes; nil: where the caller's does.
	Stderr *os.File
}

// Output is what a finished command left.
type Output struct {
	Stdout, Stderr string
}

// ExitError says that a command ran and failed.
type ExitError struct {
	Command string
	Err     error
	Stderr  string // trimmed
}

func (e *ExitError) Error() string {
	if e.Stderr == "" {
		return fmt.Sprintf("%s: %v", e.Command, e.Err)
	}
	return fmt.Sprintf("%s: %v: %s", e.Command, e.Err, e.Stderr)
}

func (e *ExitError) Unwrap() error { return e.Err }

// Process is a command that was started and goes on by itself.
type Process struct {
	PID  int
	done chan struct{}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Start starts a command that outlives the caller: in a session of its own, with
// stdin and stdout as given.
func (h *Host) Start(c Command, stdin, stdout *os.File) (*Process, error) {
	var cmd *exec.Cmd
	err := h.Do(func() error {
		cmd = exec.Command(c.Name, c.Args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, os.Stderr
		if c.Stderr != nil {
			cmd.Stderr = c.Stderr
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return h.start(cmd, c)
	})
	if err != nil {
		return nil, fmt.Errorf("start %s on the host: %w", c.Name, err)
	}
	p := &Process{PID: cmd.Process.Pid, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		cmd.Wait() // how it ended is its own affair
	}()
	return p, nil
}

// Run runs a command to its end. When ctx ends first the whole process group is
// killed, after it was asked to end if the command has a way to: what a command
// starts (runc starts CRIU) does not outlive it.
func (h *Host) Run(ctx context.Context, c Command) (Output, error) {
	var stdout, stderr strings.Builder
	var cmd *exec.Cmd
	err := h.Do(func() error {
		cmd = exec.CommandContext(ctx, c.Name, c.Args...)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error {
			group := -cmd.Process.Pid
			if c.Interrupt != nil {
				for end := time.Now().Add(c.Interrupt()); time.Now().Before(end) && syscall.Kill(group, 0) == nil; {
					time.Sleep(2 * time.Millisecond)
				}
			}
			return syscall.Kill(group, syscall.SIGKILL)
		}
		cmd.WaitDelay = 5 * time.Second
		return h.start(cmd, c)
	})
	if err != nil {
		return Output{}, fmt.Errorf("start %s on the host: %w", c.Name, err)
	}
	err = cmd.Wait()
	out := Output{Stdout: stdout.String(), Stderr: stderr.String()}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w (%w)", cause, err)
		}
		return out, &ExitError{Command: c.Name, Err: err, Stderr: strings.TrimSpace(out.Stderr)}
	}
	return out, nil
}

// start starts a command with what its Command says of its surroundings. It runs
// on a thread of Do.
func (h *Host) start(cmd *exec.Cmd, c Command) (err error) {
	if cmd.Path, err = lookPath(c.Name, h.path); err != nil {
		return err
	}
	cmd.Err = nil // of a search in the caller's own PATH
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=" + h.path, "HOME=/root", "LANG=C"}, c.Env...)
	if c.Outside {
		unified, err := leaveCgroups()
		if err != nil {
			return err
		}
		if unified != nil {
			defer unified.Close()
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(unified.Fd())
		}
	}
	if c.Apart {
		if err := leaveMounts(); err != nil {
			return err
		}
	}
	return cmd.Start()
}

// leaveCgroups moves the calling thread, and so what it starts, to the root of
// every v1 hierarchy. In the unified one a thread cannot be moved by itself: its
// root is returned, for clone3(2)'s CLONE_INTO_CGROUP; nil where there is none.
func leaveCgroups() (unified *os.File, err error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find the cgroup hierarchies: %w", err)
	}
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			if unified == nil {
				unified, err = os.Open(m.Mountpoint)
			}
		} else {
			err = os.WriteFile(filepath.Join(m.Mountpoint, "tasks"), []byte("0"), 0)
		}
		if err != nil {
			if unified != nil {
				unified.Close()
			}
			return nil, fmt.Errorf("leave the cgroups of %s: %w", m.Mountpoint, err)
		}
	}
	return unified, nil
}

// lookPath finds a program in a PATH of the calling thread's mount namespace.
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(path) {
		full := filepath.Join(dir, name)
		if info, err := os.Stat(full); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return full, nil
		}
	}
	return "", fmt.Errorf("%w: no %s in %s", exec.ErrNotFound, name, path)
}
