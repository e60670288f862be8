// Package criservice implements CheckpointPod and RestorePod of the CRI
// (k8s.io/cri-api v0.37, RuntimeService) beside a container runtime that does
// not have them yet; one that has them is used itself. Everything that the runtime
// does have, it asks of the runtime: the service keeps no containers of its own.
package criservice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/pages"
)

// Tickets hands out single-use names for prepared restores. The sandbox that
// carries one in its annotations is made from the checkpoint behind it.
type Tickets interface {
	// Issue registers a directory whose manifest the caller has verified.
	Issue(dir string, memory pages.Mode) (ticket string)
	// Revoke forgets a ticket, used or not.
	Revoke(ticket string)
}

// ErrNoRoom says that a checkpoint would not fit where it is to be written.
var ErrNoRoom = errors.New("not enough room on the disk")

// Room decides whether there is room for a checkpoint.
type Room interface {
	// Reserve sets room aside for what is about to be written below dir, until it
	// is released; ErrNoRoom if there is not enough. It is called in the container
	// runtime's mount namespace.
	Reserve(dir string, bytes int64) (release func(), err error)
}

// Config is what the service is made of.
type Config struct {
	Runtime runtimeapi.RuntimeServiceClient
	Engines engine.Engines
	Tickets Tickets
	// Host is the container runtime's mount namespace: the paths in requests are
	// its.
	Host *hostns.Host
	// Room is asked before a checkpoint is taken; nil is room for everything.
	Room Room
	// Memory decides which memory is given while processes run.
	Memory pages.Policy
	// Handlers are the runtime handlers that restore checkpoints, by the engine's name.
	Handlers map[string]string
	// Native knows whether Runtime implements the calls itself; nil: it is not asked.
	Native *Native
	Log    *slog.Logger
}

// Service serves CheckpointPod, RestorePod and Version.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtime  runtimeapi.RuntimeServiceClient
	engines  engine.Engines
	tickets  Tickets
	host     *hostns.Host
	room     Room
	memory   pages.Policy
	handlers map[string]string
	native   *Native
	log      *slog.Logger

	mu   sync.Mutex
	busy map[string]bool // sandboxes with an operation under way
}

var _ runtimeapi.RuntimeServiceServer = (*Service)(nil)

// New makes the service.
func New(c Config) *Service {
	return &Service{
		runtime: c.Runtime, engines: c.Engines, tickets: c.Tickets, host: c.Host, room: c.Room, memory: c.Memory,
		handlers: c.Handlers, native: c.Native, log: c.Log, busy: map[string]bool{},
	}
}

// Version answers for the runtime behind the service.
func (s *Service) Version(ctx context.Context, in *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return s.runtime.Version(ctx, in)
}

// claim marks a sandbox as busy, or says that it is.
func (s *Service) claim(sandboxID string) (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[sandboxID] {
		return nil, false
	}
	s.busy[sandboxID] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, sandboxID)
	}, true
}

// rpcError gives an error the gRPC code that its cause calls for. Errors of the
// runtime keep their own.
func rpcError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := ctx.Err(); cause != nil {
		return status.Error(status.FromContextError(cause).Code(), err.Error())
	}
	code := codes.Internal
	switch {
	case errors.Is(err, engine.ErrFreezeBudget):
		return withReason(codes.FailedPrecondition, ReasonFreezeBudget, err)
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded // the engine leaves itself time to thaw
	case errors.Is(err, ErrNoRoom), errors.Is(err, unix.ENOSPC):
		code = codes.ResourceExhausted
	case errors.Is(err, engine.ErrOption):
		code = codes.InvalidArgument
	case errors.Is(err, engine.ErrUnsupported), errors.Is(err, engine.ErrIncompatible):
		code = codes.FailedPrecondition
	case errors.Is(err, checkpoint.ErrMissing):
		code = codes.NotFound
	case errors.Is(err, checkpoint.ErrCorrupt):
		code = codes.DataLoss
	default:
		if st, ok := status.FromError(err); ok {
			code = st.Code()
		}
	}
	return status.Error(code, err.Error())
}

const (
	// ReasonFreezeBudget is the reason, in an ErrorInfo among the details of an
	// error, of a checkpoint that was not taken for its freeze budget.
	ReasonFreezeBudget = "FREEZE_BUDGET"
	reasonDomain       = "podstasis.dev"
)

// withReason makes an error that a caller can tell from others of its code.
func withReason(code codes.Code, reason string, err error) error {
	st, detailErr := status.New(code, err.Error()).WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: reasonDomain})
	if detailErr != nil {
		return status.Error(code, err.Error())
	}
	return st.Err()
}

// HasReason says whether an error of the service has a reason.
func HasReason(err error, reason string) bool {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Domain == reasonDomain && info.Reason == reason {
			return true
		}
	}
	return false
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// needDeadline refuses a call without a deadline, which the CRI requires.
func needDeadline(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		return invalid("the call has no deadline: the CRI requires one")
	}
	return nil
}

// emptyDirectory checks what the CRI promises of output_path.
func (s *Service) emptyDirectory(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return invalid("output_path %q is not a clean absolute path", path)
	}
	return s.host.Do(func() error {
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return invalid("output_path %s does not exist", path)
		} else if err != nil {
			return fmt.Errorf("output_path: %w", err)
		}
		if !info.IsDir() {
			return invalid("output_path %s is not a directory", path)
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return fmt.Errorf("output_path: %w", err)
		}
		if len(entries) > 0 {
			return invalid("output_path %s is not empty: it holds %s", path, entries[0].Name())
		}
		return nil
	})
}

// clear removes what is in a directory and keeps the directory.
func clear(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
