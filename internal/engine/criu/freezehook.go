package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/hostns"
)

// A restored container must not run before it is started. CRIU calls an action
// script at stage pre-resume, when the processes are complete and stopped and
// none has run; there the container is frozen. CRIU itself, which the OCI runtime
// has put into the container's cgroup, is taken out of it first, or it would
// freeze too and never return.
//
// The script does none of this itself: where the Pod's containers share a PID
// namespace CRIU runs it inside that namespace, where it can name no process
// outside. It only tells the restoring process, which waits at a socket, and
// holds CRIU until that has done it; for ever, if it has not: EndRestores ends it.

// FreezeHookName is the name under which stasis-runtime is that script, which CRIU starts
// at each stage (ociruntime/aside).
const FreezeHookName = "stasis-freeze-hook"

// KeepFromResuming is what this program does under that name, which a stasis-runtime of an
// earlier version gives it while it is being replaced: CRIU must not go on, and the restore
// is given up.
func KeepFromResuming(getenv func(string) string) {
	if conn, err := net.Dial("unix", getenv(HookSocketEnv)); err == nil {
		conn.Close() // having said nothing
	}
	for {
		time.Sleep(time.Hour)
	}
}

// HookSocketEnv names the socket; CRIU's scripts inherit it through the OCI
// runtime and CRIU.
const HookSocketEnv = "STASIS_FREEZE_SOCKET"

// RestorePrefix begins the names of what is in the run directory from before a
// container's restore begins until it has ended in good order. As long as there is such,
// stasis-runtime leaves every delete to stasis-restore.
const RestorePrefix = "freeze-"

// hookTimeout bounds the wait for the script, as that bounds its own for us.
const hookTimeout = 30 * time.Second

// hookListener waits for the freeze hook and freezes the container when it calls.
// It may call several times: CRIU lists a script once for each time that it reads
// the file of options.
type hookListener struct {
	path     string
	dir      *os.File // of the socket; locked as long as somebody listens
	listener *net.UnixListener
	calls    chan hookCall // closed when the listener is
	giveUp   func() error  // ends the restore
}

type hookCall struct {
	freezer freezer
	err     error
}

// listenForHook makes a socket below runDir. Its path is short: a Unix socket's
// may have 107 bytes (unix(7)), and the bundle's is longer than that.
func listenForHook(runDir string, giveUp func() error) (*hookListener, error) {
	dir, err := os.MkdirTemp(runDir, RestorePrefix)
	if err != nil {
		return nil, fmt.Errorf("wait for the freeze hook: %w", err)
	}
	lock, err := os.Open(dir)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the freeze hook: %w", err), lock.Close(), os.RemoveAll(dir))
	}
	path := filepath.Join(dir, "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the freeze hook: %w", err), lock.Close(), os.RemoveAll(dir))
	}
	h := &hookListener{path: path, dir: lock, listener: l, calls: make(chan hookCall, 16), giveUp: giveUp}
	go h.serve()
	return h, nil
}

func (h *hookListener) close() error {
	err := h.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(filepath.Dir(h.path)), h.dir.Close())
}

// removeDeafHooks removes the sockets of restoring processes that were killed. All are
// left alone as long as anything of a restore lives on, for they are what a delete looks
// at to know whether there may be such.
func removeDeafHooks(runDir string, now time.Time) error {
	if marked, err := markedBy(restoreEnv); err != nil || len(marked) > 0 {
		return err
	}
	return removeUnlockedHooks(runDir, now)
}

// removeUnlockedHooks removes those sockets: the lock on them went with the process. One
// that is being made is left alone.
func removeUnlockedHooks(runDir string, now time.Time) error {
	dirs, err := filepath.Glob(filepath.Join(runDir, RestorePrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		info, err := os.Lstat(dir)
		if err != nil || now.Sub(info.ModTime()) < time.Second {
			continue
		}
		lock, err := os.Open(dir)
		if err != nil {
			continue // it has just gone
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			errs = append(errs, os.RemoveAll(dir))
		}
		errs = append(errs, lock.Close())
	}
	return errors.Join(errs...)
}

// frozen stops listening and returns when all processes of the container stand
// still. It is called when the OCI runtime has returned, so CRIU has called its
// hook or never will.
func (h *hookListener) frozen() error {
	if err := h.listener.Close(); err != nil {
		return err
	}
	called := false
	for c := range h.calls {
		if c.err != nil {
			return c.err
		}
		called = true
		if err := c.freezer.wait(hookTimeout); err != nil {
			return err
		}
	}
	if !called {
		return errors.New("CRIU did not call the freeze hook: the container may have run before its start")
	}
	return nil
}

func (h *hookListener) serve() {
	defer close(h.calls)
	for {
		conn, err := h.listener.AcceptUnix()
		if err != nil {
			return // closed
		}
		h.calls <- h.answer(conn)
	}
}

func (h *hookListener) answer(conn *net.UnixConn) hookCall {
	defer conn.Close()
	f, err := h.freeze(conn)
	answer := "frozen"
	if err != nil {
		answer = err.Error()
	}
	if _, writeErr := fmt.Fprintln(conn, answer); err == nil {
		err = writeErr
	}
	if err != nil { // the hook keeps CRIU
		err = errors.Join(err, h.giveUp())
	}
	return hookCall{f, err}
}

func (h *hookListener) freeze(conn *net.UnixConn) (freezer, error) {
	hook, err := hostns.Peer(conn)
	if err != nil {
		return freezer{}, err
	}
	if err := conn.SetDeadline(time.Now().Add(hookTimeout)); err != nil {
		return freezer{}, err
	}
	var initPID int
	if _, err := fmt.Fscanln(conn, &initPID); err != nil {
		return freezer{}, fmt.Errorf("read what the freeze hook says: %w", err)
	}
	f, err := freezerOf(initPID)
	if err != nil {
		return freezer{}, err
	}
	if err := f.leave(hook); err != nil {
		return freezer{}, err
	}
	return f, f.freeze()
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

// leave moves a process out of the container's cgroup, and its ancestors as far as
// they are in it: the hook, CRIU, and what may stand between CRIU and the runtime.
func (f freezer) leave(pid int) error {
	for {
		path, _, err := cgroupOf(pid, "freezer")
		if err != nil || path != f.path {
			return err
		}
		if err := os.WriteFile(filepath.Join(f.mount, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move process %d out of the container's cgroup: %w", pid, err)
		}
		if pid, err = parentOf(pid); err != nil {
			return err
		}
	}
}

// freeze asks for the freeze. Processes that a tracer holds, as CRIU's do at
// that point, stop at once when they are let go.
func (f freezer) freeze() error {
	if err := f.set("FROZEN", "1"); err != nil {
		return fmt.Errorf("freeze the restored container: %w", err)
	}
	return nil
}

func (f freezer) thaw() error { return f.set("THAWED", "0") }

// set writes the state that is wanted, as the one hierarchy calls it or the other.
func (f freezer) set(state, unified string) error {
	name := "freezer.state"
	if f.unified {
		name, state = "cgroup.freeze", unified
	}
	return os.WriteFile(filepath.Join(f.mount, f.path, name), []byte(state), 0)
}

func (f freezer) frozen() (bool, error) {
	if f.unified {
		data, err := os.ReadFile(filepath.Join(f.mount, f.path, "cgroup.events"))
		return strings.Contains(string(data), "frozen 1"), err
	}
	data, err := os.ReadFile(filepath.Join(f.mount, f.path, "freezer.state"))
	return strings.TrimSpace(string(data)) == "FROZEN", err
}

// wait waits until all processes of the container stand still.
func (f freezer) wait(limit time.Duration) error {
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
			return fmt.Errorf("the restored container did not freeze within %v", limit)
		}
	}
}
