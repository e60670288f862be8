package nodeapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	// maxMessage bounds what is read of a request or an answer.
	maxMessage = 4 << 20
	// CallTimeout bounds one question with its answer. The agent reads the whole
	// checkpoint while it answers CreateSandbox or Checked.
	CallTimeout = 10 * time.Minute
)

// Call asks the agent one question. It fails when the agent is not there; an
// answer that says no is no failure of Call.
func Call(ctx context.Context, socket string, request Request) (Response, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return Response{}, fmt.Errorf("the Stasis agent of this node does not answer, is its Pod running? %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return Response{}, err
		}
	}
	if err := json.NewEncoder(conn).Encode(request); err != nil {
		return Response{}, fmt.Errorf("ask the Stasis agent: %w", err)
	}
	var response Response
	if err := json.NewDecoder(io.LimitReader(conn, maxMessage)).Decode(&response); err != nil {
		return Response{}, fmt.Errorf("the Stasis agent went away before it answered: %w", err)
	}
	return response, nil
}

// Handler answers requests.
type Handler interface {
	Handle(ctx context.Context, request Request) Response
}

// Serve answers requests on a Unix listener until ctx ends, and returns when the
// last answer is written. Only peers of user 0 are heard (SO_PEERCRED).
func Serve(ctx context.Context, listener *net.UnixListener, handler Handler, log *slog.Logger) error {
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept on %s: %w", listener.Addr(), err)
		}
		wg.Go(func() {
			defer conn.Close()
			if err := serveOne(ctx, conn, handler); err != nil {
				log.WarnContext(ctx, "a request of the OCI runtime could not be answered", "err", err)
			}
		})
	}
}

func serveOne(ctx context.Context, conn *net.UnixConn, handler Handler) error {
	uid, err := peerUID(conn)
	if err != nil {
		return err
	}
	if uid != 0 {
		return fmt.Errorf("a peer of user %d was turned away", uid)
	}
	if err := conn.SetDeadline(time.Now().Add(CallTimeout)); err != nil {
		return err
	}
	var request Request
	if err := json.NewDecoder(io.LimitReader(conn, maxMessage)).Decode(&request); err != nil {
		if errors.Is(err, io.EOF) {
			return nil // somebody only looked whether the agent is there
		}
		return fmt.Errorf("read request: %w", err)
	}
	if err := json.NewEncoder(conn).Encode(handler.Handle(ctx, request)); err != nil {
		// Whoever asked was killed, as the OCI runtime is with its containerd, and may
		// have been cleaned up after before the answer was found: nobody else will say
		// that there is no such sandbox.
		if create := request.CreateSandbox; create != nil {
			handler.Handle(ctx, Request{Report: &Report{Sandbox: create.Sandbox, Stage: StageDeleted}})
		}
		return fmt.Errorf("write answer: %w", err)
	}
	return nil
}

func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, fmt.Errorf("who is the peer: %w", credErr)
	}
	return cred.Uid, nil
}
