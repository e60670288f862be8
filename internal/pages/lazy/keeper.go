package lazy

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// socketName is what CRIU connects to, in its work directory.
	socketName = "lazy-pages.socket"
	// criuFinished is what CRIU says when all mappings are made. Before it says of each
	// process the PID, negative if it is dead, and then gives its userfaultfd.
	criuFinished = 0x52535446
	// Ready is what the keeper says when CRIU can be started.
	Ready = "ready\n"
	// startPatience bounds the wait for the server, connectPatience that for CRIU.
	startPatience   = 30 * time.Second
	connectPatience = 5 * time.Minute
)

// Container is one whose memory is given.
type Container interface {
	// Kill ends all its processes, and returns when there are none.
	Kill() error
}

// Keeper is what a keeper is made of.
type Keeper struct {
	// WorkDir is CRIU's. The plan is in it.
	WorkDir     string
	ContainerID string
	// Server is the command line that runs a server: of a program whose argv[0] says so.
	Server []string
	// Find finds the container that CRIU, this process, restores.
	Find func(criu int) (Container, error)
	// Unwanted is closed when CRIU will not come any more, if it has not by then.
	Unwanted <-chan struct{}
	// Changed is called when the status has another stage.
	Changed func(Status)
	Log     *slog.Logger

	mu     sync.Mutex
	status Status
	held   []int // userfaultfds
}

// say is what keeper and server say to each other; a userfaultfd may go with it.
type say struct {
	// Of the keeper.
	CRIU     int    `json:"criu,omitempty"` // its PID, for the server to find the container
	PID      uint32 `json:"pid,omitempty"`  // of the process whose userfaultfd goes with it
	Finished bool   `json:"finished,omitempty"`
	// Of the server.
	Ready bool   `json:"ready,omitempty"`
	Hold  bool   `json:"hold,omitempty"` // the userfaultfd that goes with it
	Given int64  `json:"given,omitempty"`
	Total int64  `json:"total,omitempty"`
	Done  bool   `json:"done,omitempty"`
	Lost  string `json:"lost,omitempty"`
}

// Run says Ready on ready and returns when the container's memory is all there or the
// container is dead.
func (k *Keeper) Run(ready io.WriteCloser) error {
	lock, err := os.OpenFile(filepath.Join(k.WorkDir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	// An earlier try's keeper may still be at its end.
	for end := time.Now().Add(startPatience); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("somebody gives this container its memory already: %w", err)
		}
	}
	if err := os.Chdir(k.WorkDir); err != nil { // a socket's name may not be long
		return err
	}
	os.Remove(socketName)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketName})
	if err != nil {
		return fmt.Errorf("wait for CRIU: %w", err)
	}
	defer listener.Close()
	server, process, err := k.startServer()
	if err != nil {
		return err
	}
	defer server.Close()
	messages := make(chan say)
	go k.hear(server, messages)
	select {
	case m := <-messages:
		if !m.Ready {
			process.Process.Kill()
			return errors.Join(fmt.Errorf("the server of pages did not come up: %s", m.Lost), process.Wait())
		}
	case <-time.After(startPatience):
		process.Process.Kill()
		return errors.Join(errors.New("the server of pages does not come up"), process.Wait())
	}
	if _, err := io.WriteString(ready, Ready); err != nil {
		return err
	}
	ready.Close()
	listener.SetDeadline(time.Now().Add(connectPatience))
	go func() {
		<-k.Unwanted
		listener.Close()
	}()
	criu, err := listener.AcceptUnix()
	listener.Close()
	if err != nil { // the restore failed before it came so far
		process.Process.Kill()
		process.Wait()
		return fmt.Errorf("wait for CRIU: %w", err)
	}
	defer criu.Close()
	pid, err := peer(criu)
	var container Container
	if err == nil {
		container, err = k.Find(pid)
	}
	if err != nil {
		process.Process.Kill()
		process.Wait()
		return fmt.Errorf("find the container that CRIU restores: %w", err)
	}
	k.change(func(s *Status) { *s = Status{ContainerID: k.ContainerID, Stage: StageServing} })
	err = k.follow(pid, criu, server, messages)
	// Nobody lets go of the container's memory before it is dead or complete.
	if err != nil {
		k.Log.Error("a container's memory could not be given to it", "container", k.ContainerID, "error", err)
		if killErr := container.Kill(); killErr != nil {
			k.Log.Error("the container could not be killed", "container", k.ContainerID, "error", killErr)
			select {} // held as it is: who waits for a page waits, and nobody runs on wrong ones
		}
		k.change(func(s *Status) { s.Stage, s.Message, s.Until = StageLost, err.Error(), time.Now().UTC() })
		process.Process.Kill()
	}
	for _, fd := range k.held {
		unix.Close(fd)
	}
	process.Wait()
	return err
}

func (k *Keeper) change(change func(*Status)) {
	k.mu.Lock()
	before := k.status.Stage
	change(&k.status)
	now := k.status
	k.mu.Unlock()
	if err := now.write(k.WorkDir); err != nil {
		k.Log.Error("how far a container's memory has come is not kept", "error", err)
	}
	if now.Stage != before && k.Changed != nil {
		k.Changed(now)
	}
}

// startServer starts the server with one end of a socket as file 3.
func (k *Keeper) startServer() (*net.UnixConn, *exec.Cmd, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("start the server of pages: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "server")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[0]), "keeper")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, fmt.Errorf("start the server of pages: %w", err)
	}
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: k.Server, Stderr: os.Stderr, ExtraFiles: []*os.File{theirs}, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("start the server of pages: %w", err)
	}
	return conn.(*net.UnixConn), cmd, nil
}

// hear passes on what the server says; its end is a message too.
func (k *Keeper) hear(server *net.UnixConn, messages chan<- say) {
	for {
		m, fd, err := receive(server)
		if err != nil {
			why := "the process that gave it is gone"
			if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				why = err.Error()
			}
			messages <- say{Lost: why}
			return
		}
		if fd >= 0 {
			k.mu.Lock()
			k.held = append(k.held, fd)
			k.mu.Unlock()
		}
		if !m.Hold {
			messages <- m
		}
	}
}

// follow brings CRIU and server together, and returns nil when all pages are in.
func (k *Keeper) follow(pid int, criu, server *net.UnixConn, messages <-chan say) error {
	if err := send(server, say{CRIU: pid}, -1); err != nil {
		return err
	}
	handed := make(chan error, 1)
	go func() { handed <- k.handOver(criu, server) }()
	for {
		select {
		case err := <-handed:
			if err != nil {
				return err
			}
			handed = nil
			k.change(func(s *Status) { s.Since = time.Now().UTC() })
		case m := <-messages:
			switch {
			case m.Lost != "":
				return errors.New(m.Lost)
			case m.Done:
				k.change(func(s *Status) {
					s.Stage, s.Given, s.Total, s.Until = StageComplete, m.Given, m.Given, time.Now().UTC()
				})
				return nil
			default:
				k.change(func(s *Status) { s.Given, s.Total = m.Given, m.Total })
			}
		}
	}
}

// handOver takes userfaultfds from CRIU, keeps each, and gives it to the server.
func (k *Keeper) handOver(criu, server *net.UnixConn) error {
	for {
		var b [4]byte
		if _, err := io.ReadFull(criu, b[:]); err != nil {
			return fmt.Errorf("the restore ended before its end: %w", err)
		}
		pid := int32(binary.NativeEndian.Uint32(b[:]))
		switch {
		case pid == criuFinished:
			return send(server, say{Finished: true}, -1)
		case pid <= 0:
			continue // a dead process has no memory
		}
		fd, err := receiveFD(criu)
		if err != nil {
			return fmt.Errorf("take the memory of process %d from CRIU: %w", pid, err)
		}
		k.mu.Lock()
		k.held = append(k.held, fd)
		k.mu.Unlock()
		if err := send(server, say{PID: uint32(pid)}, fd); err != nil {
			return err
		}
	}
}

// receiveFD receives a file with a byte that means nothing.
func receiveFD(conn *net.UnixConn) (int, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return -1, err
	}
	if n == 0 {
		return -1, io.ErrUnexpectedEOF
	}
	fds, err := rights(oob[:oobn])
	if err == nil && len(fds) != 1 {
		err = fmt.Errorf("%d files came", len(fds))
	}
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var all []int
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, err
		}
		all = append(all, fds...)
	}
	return all, nil
}

func send(to *net.UnixConn, m say, fd int) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err = to.WriteMsgUnix(data, oob, nil)
	return err
}

// receive receives a message, and the file that came with it, or -1.
func receive(from *net.UnixConn) (m say, fd int, err error) {
	data, oob := make([]byte, 16<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := from.ReadMsgUnix(data, oob)
	if err != nil {
		return m, -1, err
	}
	if n == 0 {
		return m, -1, io.EOF
	}
	fds, err := rights(oob[:oobn])
	if err != nil {
		return m, -1, err
	}
	fd = -1
	if len(fds) > 0 {
		fd = fds[0]
		unix.CloseOnExec(fd)
	}
	return m, fd, json.Unmarshal(data[:n], &m)
}

// peer is the process at the other end.
func peer(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid, errors.Join(controlErr, err)
}

// cut keeps a message within what the other takes.
func cut(s string) string {
	if len(s) > 4096 {
		s = strings.ToValidUTF8(s[:4096], "")
	}
	return s
}

// Serve is the server's side: conn is file 3, find as the keeper's. started says whether the
// container has been let go.
func Serve(workDir string, find func(criu int) (Container, error), started func() bool, ask Ask, log *slog.Logger) error {
	file := os.NewFile(3, "keeper")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return fmt.Errorf("the server of pages is started by its keeper: %w", err)
	}
	keeper := conn.(*net.UnixConn)
	defer keeper.Close()
	s, container, err := serve(workDir, keeper, find, started, ask, log)
	if err == nil {
		err = send(keeper, say{Done: true, Given: s.given.Load() * pageSize}, -1)
		s.close()
		return err
	}
	if sendErr := send(keeper, say{Lost: cut(err.Error())}, -1); sendErr != nil && container != nil {
		// The keeper is gone: nobody else would.
		return errors.Join(err, container.Kill())
	}
	// The keeper ends this process when the container is dead. It would not hurt if it
	// ended by itself: the keeper holds all that it has.
	return err
}

func serve(workDir string, keeper *net.UnixConn, find func(criu int) (Container, error), started func() bool, ask Ask, log *slog.Logger) (*server, Container, error) {
	plan, err := ReadPlan(filepath.Join(workDir, PlanFile))
	if err != nil {
		return nil, nil, err
	}
	from, err := openLocal(plan)
	if err != nil {
		return nil, nil, err
	}
	var sending sync.Mutex
	hold := func(fd int) error {
		sending.Lock()
		defer sending.Unlock()
		return send(keeper, say{Hold: true}, fd)
	}
	s, err := newServer(context.Background(), plan, from, ask, log, hold)
	if err != nil {
		return nil, nil, err
	}
	before := s.order.last
	if err := send(keeper, say{Ready: true}, -1); err != nil {
		return s, nil, err
	}
	var container Container
	finished, ended := make(chan struct{}), make(chan error, 1)
	found := make(chan struct{})
	go func() {
		for {
			m, fd, err := receive(keeper)
			switch {
			case err != nil:
				ended <- errors.New("the keeper of the container's memory is gone")
				return
			case m.CRIU != 0:
				if container, err = find(m.CRIU); err != nil {
					ended <- err
					return
				}
				close(found)
			case m.PID != 0 && fd >= 0:
				if err := s.add(m.PID, fd); err != nil {
					ended <- err
					return
				}
			case m.Finished:
				close(finished)
			}
		}
	}()
	fail := func(err error) (*server, Container, error) {
		select {
		case <-found:
			return s, container, err
		default:
			return s, nil, err
		}
	}
	streamed, begun := make(chan error, 1), make(chan struct{})
	go func() {
		select {
		case <-finished:
			close(begun)
			s.await(started)
			streamed <- s.stream()
		case <-s.ctx.Done():
		}
	}()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	tell := func() error {
		sending.Lock()
		defer sending.Unlock()
		return send(keeper, say{Given: s.given.Load() * pageSize, Total: s.total.Load() * pageSize}, -1)
	}
	for {
		select {
		case err := <-ended:
			return fail(err)
		case <-begun:
			begun = nil
			if err := tell(); err != nil {
				return fail(err)
			}
		case <-s.ctx.Done():
			return fail(context.Cause(s.ctx))
		case err := <-streamed:
			if err != nil {
				return fail(err)
			}
			if err := s.order.write(before); err != nil {
				log.Warn("in which order pages were asked for is not kept", "error", err)
			}
			return s, container, nil
		case <-tick.C:
			if err := tell(); err != nil {
				return fail(err)
			}
		}
	}
}
