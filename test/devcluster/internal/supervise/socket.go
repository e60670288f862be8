package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

type request struct {
	Op        string        `json:"op"` // start, stop, kill, status, shutdown
	Name      string        `json:"name,omitempty"`
	Component *Component    `json:"component,omitempty"`
	Down      bool          `json:"down,omitempty"`
	Grace     time.Duration `json:"grace,omitempty"`
}

type response struct {
	Error      string   `json:"error,omitempty"`
	Components []Status `json:"components,omitempty"`
}

// maxRequest bounds what is read from a peer.
const maxRequest = 1 << 20

func (s *Supervisor) serve(ctx context.Context, socket string) error {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listening for requests: %w", err)
	}
	ctx, shutdown := context.WithCancelCause(ctx)
	defer shutdown(nil)
	context.AfterFunc(ctx, func() { listener.Close() })
	grace := 10 * time.Second
	type asked struct {
		conn  *net.UnixConn // waits for the shutdown to be complete
		grace time.Duration
	}
	done := make(chan asked, 1)
	for {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("accepting a request: %w", err)
		}
		go func() {
			if within, shut := s.answer(conn); shut {
				select {
				case done <- asked{conn, within}:
					shutdown(nil)
				default:
					conn.Close()
				}
				return
			}
			conn.Close()
		}()
	}
	var last *net.UnixConn
	select {
	case a := <-done:
		last, grace = a.conn, a.grace
	default: // a signal
	}
	s.Close(grace)
	if last != nil {
		_ = json.NewEncoder(last).Encode(response{}) // its peer may have gone
		last.Close()
	}
	return nil
}

// answer handles the one request of a connection. A shutdown is answered later: it returns
// true and the time that components get.
func (s *Supervisor) answer(conn *net.UnixConn) (grace time.Duration, shutdown bool) {
	var reply response
	var r request
	err := checkPeer(conn)
	if err == nil {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		err = json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&r)
	}
	if err == nil {
		switch r.Op {
		case "start":
			if r.Component != nil {
				err = s.Start(*r.Component)
			} else {
				err = s.StartKnown(r.Name)
			}
		case "stop":
			err = s.Stop(r.Name, r.Grace)
		case "kill":
			err = s.Kill(r.Name, r.Down)
		case "status":
		case "shutdown":
			return r.Grace, true
		default:
			err = fmt.Errorf("unknown request %q", r.Op)
		}
	}
	if err != nil {
		reply.Error = err.Error()
	}
	reply.Components = s.Status()
	if err := json.NewEncoder(conn).Encode(reply); err != nil {
		s.log.Warn("answer not delivered", "error", err)
	}
	return 0, false
}

// checkPeer refuses everybody but the user that the supervisor runs as: an abstract socket
// has no file whose mode could say so.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not command this supervisor", cred.Uid)
	}
	return nil
}

// ErrNotRunning says that no supervisor listens.
var ErrNotRunning = errors.New("its supervisor does not run")

// Client sends requests to the supervisor that serves the socket.
type Client struct {
	// Socket is the name that Serve was given.
	Socket string
}

// Start starts a component, or leaves it alone when it runs.
func (c Client) Start(ctx context.Context, component Component) error {
	_, err := c.do(ctx, request{Op: "start", Component: &component})
	return err
}

// StartKnown starts a component that was started before.
func (c Client) StartKnown(ctx context.Context, name string) error {
	_, err := c.do(ctx, request{Op: "start", Name: name})
	return err
}

// Stop ends a component in good order; it stays down.
func (c Client) Stop(ctx context.Context, name string, grace time.Duration) error {
	_, err := c.do(ctx, request{Op: "stop", Name: name, Grace: grace})
	return err
}

// Kill ends a component by SIGKILL; it stays down if asked for, else it is started again.
func (c Client) Kill(ctx context.Context, name string, down bool) error {
	_, err := c.do(ctx, request{Op: "kill", Name: name, Down: down})
	return err
}

// Status lists the components.
func (c Client) Status(ctx context.Context) ([]Status, error) {
	r, err := c.do(ctx, request{Op: "status"})
	return r.Components, err
}

// Shutdown stops all components, by SIGKILL after the grace time, and the supervisor; it
// returns when that is done.
func (c Client) Shutdown(ctx context.Context, grace time.Duration) error {
	_, err := c.do(ctx, request{Op: "shutdown", Grace: grace})
	return err
}

func (c Client) do(ctx context.Context, r request) (response, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", c.Socket)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return response{}, ErrNotRunning
	}
	if err != nil {
		return response{}, fmt.Errorf("asking the supervisor: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return response{}, fmt.Errorf("asking the supervisor: %w", err)
	}
	var reply response
	if err := json.NewDecoder(conn).Decode(&reply); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return response{}, fmt.Errorf("waiting for the supervisor to %s: %w", r.Op, err)
	}
	if reply.Error != "" {
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}
