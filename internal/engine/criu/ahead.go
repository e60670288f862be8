package criu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
)

// CRIU and the OCI runtime that starts it are started before the freeze, and wait: to
// start them takes longer than CRIU's work on a small container. A library that CRIU is
// started with (ahead/ahead.c) has it wait before it touches a process. It ends by itself
// when the agent does, or calls it off.

const (
	// aheadEnv names the socket by which it says that it waits, and is told to go on.
	aheadEnv = "STASIS_AHEAD"
	// criuHomeEnv is where CRIU finds its options instead of the prefix that it is in.
	criuHomeEnv = "STASIS_CRIU_HOME"

	aheadLibrary = "lib/stasis-ahead.so"
	criuOptions  = ".criu/default.conf"

	// What the library says.
	aheadHeld     = "held\n"
	aheadCaptured = "captured\n"

	// aheadPatience bounds how long a CRIU may take to be ready.
	aheadPatience = 20 * time.Second

	// longestDir is how long the path of a directory of sockets may be: theirs have up to
	// 107 bytes (unix(7)).
	longestDir = 100
)

// errNotAhead says that a CRIU could not be started ahead of the freeze.
var errNotAhead = errors.New("CRIU did not wait for the freeze")

// waiting is a CRIU that waits for its container to stand still, or works.
type waiting struct {
	target
	conn net.Conn
	said *bufio.Reader
	stop context.CancelCauseFunc // ends it and its OCI runtime
	// ended is closed when it and its OCI runtime have ended, err is how.
	ended chan struct{}
	err   error
}

// prefixOfCRIU returns the prefix of a CRIU that can be started ahead, as hack/criu.sh and
// the build make it; empty where the node's CRIU is another one.
func (e *Engine) prefixOfCRIU() (prefix string) {
	e.host.Do(func() error {
		for _, dir := range filepath.SplitList(e.host.SearchPath()) {
			name, err := filepath.EvalSymlinks(filepath.Join(dir, "criu"))
			if err != nil {
				continue
			}
			found := filepath.Dir(filepath.Dir(name))
			if _, err := os.Stat(filepath.Join(found, aheadLibrary)); err == nil {
				prefix = found
			}
			return nil
		}
		return nil
	})
	return prefix
}

// startAhead starts a CRIU for each container and returns when all wait; none where the
// node's CRIU does not. Whoever calls it leaves them (leaveAhead).
func (e *Engine) startAhead(ctx context.Context, w window) (all []*waiting, err error) {
	prefix, dir := e.prefixOfCRIU(), filepath.Join(e.workDir, w.sandbox.ID)
	if prefix == "" || w.late || len(dir) > longestDir {
		return nil, nil
	}
	env, err := e.aheadOptions(w, prefix)
	if err != nil {
		return nil, err
	}
	all = make([]*waiting, len(w.targets))
	defer func() {
		if err != nil {
			leaveAhead(all)
		}
	}()
	indices := make([]int, len(w.targets))
	for i := range indices {
		indices[i] = i
	}
	err = each(indices, func(i int) (err error) {
		all[i], err = e.startWaiting(ctx, w, w.targets[i], filepath.Join(dir, strconv.Itoa(i)), env)
		return err
	})
	return all, firstCauses(err)
}

// aheadOptions prepares what CRIU is told beyond the OCI runtime's options: the settings of
// its prefix, and where the cgroup hierarchies are mounted. Else it would mount each once
// more while the Pod stands still.
func (e *Engine) aheadOptions(w window, prefix string) (env []string, err error) {
	home, yard := filepath.Join(e.workDir, w.sandbox.ID, "home"), filepath.Join(e.workDir, w.sandbox.ID, "cgroups")
	err = e.host.Do(func() error {
		options, err := os.ReadFile(filepath.Join(prefix, "etc", criuOptions))
		if err != nil {
			return err
		}
		if err := errors.Join(os.MkdirAll(filepath.Join(home, filepath.Dir(criuOptions)), 0o700), os.MkdirAll(yard, 0o700)); err != nil {
			return err
		}
		complete, err := linkHierarchies(yard, w.targets[0].PID)
		if err != nil {
			return err
		}
		if complete {
			options = append(options, "cgroup-yard "+yard+"\n"...)
		}
		return os.WriteFile(filepath.Join(home, criuOptions), options, 0o600)
	})
	return []string{criuHomeEnv + "=" + home}, wrap(err, "prepare CRIU's options")
}

// linkHierarchies makes links to where the cgroup hierarchies of a process are mounted, by
// the names that CRIU looks for (criu(8), --cgroup-yard). It says whether all are there. It
// runs in the host's mount namespace.
func linkHierarchies(yard string, pid int) (complete bool, err error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return false, err
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return false, fmt.Errorf("find the cgroup hierarchies: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 {
			return false, fmt.Errorf("process %d has a cgroup %q", pid, line)
		}
		at := hierarchyMount(mounts, parts[1])
		name := strings.TrimPrefix(parts[1], "name=")
		if name == "" {
			name = "unified"
		}
		if at == "" || strings.Contains(name, "/") {
			return false, nil
		}
		if err := os.Symlink(at, filepath.Join(yard, name)); err != nil {
			return false, err
		}
	}
	return true, nil
}

// hierarchyMount is where a hierarchy is mounted as a whole: by its controllers, as in
// /proc/PID/cgroup (cgroups(7)), the unified one by none. Empty if it is not.
func hierarchyMount(mounts []*mountinfo.Info, controllers string) string {
	for _, m := range mounts {
		if m.Root != "/" || (m.FSType == "cgroup2") != (controllers == "") {
			continue
		}
		has := map[string]bool{}
		for option := range strings.SplitSeq(m.VFSOptions, ",") {
			has[option] = true
		}
		all := true
		for c := range strings.SplitSeq(controllers, ",") {
			all = all && (c == "" || has[c])
		}
		if all {
			return m.Mountpoint
		}
	}
	return ""
}

// startWaiting starts one and returns when it waits.
func (e *Engine) startWaiting(ctx context.Context, w window, t target, socket string, env []string) (*waiting, error) {
	var listener *net.UnixListener
	err := e.host.Do(func() (err error) {
		listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: socket})
		if err == nil {
			listener.SetUnlinkOnClose(false) // in another mount namespace; it goes with its directory
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("wait for CRIU: %w", err)
	}
	defer listener.Close()
	inner, stop := context.WithCancelCause(ctx)
	a := &waiting{target: t, stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(a.ended)
		a.err = e.dump(inner, w, t, append([]string{aheadEnv + "=" + socket}, env...)...)
	}()
	come := make(chan error, 1)
	go func() {
		listener.SetDeadline(time.Now().Add(aheadPatience))
		conn, err := listener.Accept()
		if err == nil {
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			a.conn, a.said = conn, bufio.NewReaderSize(conn, 64)
			conn.SetReadDeadline(time.Now().Add(aheadPatience))
			err = a.hear(aheadHeld)
		}
		come <- err
	}()
	select {
	case err = <-come:
	case <-a.ended:
		listener.Close()
		<-come
		if err = a.err; err == nil {
			err = fmt.Errorf("%w: it captured container %s while that ran", errNotAhead, t.Name)
		}
	case <-ctx.Done():
		listener.Close()
		<-come
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		return a, nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: container %s, within %v", errNotAhead, t.Name, aheadPatience)
	}
	a.leave()
	return nil, err
}

// hear waits for a line.
func (a *waiting) hear(line string) error {
	said, err := a.said.ReadString('\n')
	if said != line && err == nil {
		err = fmt.Errorf("%w: it said %q", errNotAhead, said)
	}
	return err
}

// capture lets a CRIU go on whose container stands still, and returns when the processes
// are captured and it has let them go. It and its OCI runtime then end by themselves. When
// ctx ends it returns when both have been ended.
func (a *waiting) capture(ctx context.Context) error {
	stopped := context.AfterFunc(ctx, func() { a.stop(context.Cause(ctx)) })
	defer stopped()
	a.conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(a.conn, "\n"); err != nil {
		err = fmt.Errorf("%w: %w", errNotAhead, err)
		a.stop(err)
		<-a.ended
		return errors.Join(a.err, err)
	}
	captured := make(chan error, 1)
	go func() { captured <- a.hear(aheadCaptured) }()
	select {
	case err := <-captured:
		if err == nil {
			return nil
		}
		<-a.ended
	case <-a.ended:
	}
	return a.err
}

// finish waits for the end of one that has captured, and returns how it was.
func (a *waiting) finish() error {
	<-a.ended
	return a.err
}

// callOff has one that has not been let go on end by itself. It has touched nothing.
func (a *waiting) callOff() {
	if a != nil && a.conn != nil {
		a.conn.Close()
	}
}

// leave calls one off and waits for its end.
func (a *waiting) leave() {
	a.callOff()
	select {
	case <-a.ended:
	case <-time.After(interruptPatience):
	}
	a.stop(errElsewhere)
	<-a.ended
}

func leaveAhead(all []*waiting) {
	each(all, func(a *waiting) error {
		if a != nil {
			a.leave()
		}
		return nil
	})
}
