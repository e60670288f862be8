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
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
)

// formatHeader is in the metadata of a CheckpointPod call whose caller reads what is
// written, and so wants it in Stasis' format whatever the container runtime implements.
const formatHeader = "podstasis-format"

// InOwnFormat makes CheckpointPod write Stasis' format.
func InOwnFormat(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, formatHeader, "stasis")
}

// probePatience bounds a look at what the container runtime implements.
const probePatience = 10 * time.Second

// Native knows whether the container runtime implements CheckpointPod and RestorePod
// itself (C2). Another runtime may be behind the socket after each reconnection: it is
// asked anew then.
type Native struct {
	Runtime runtimeapi.RuntimeServiceClient
	Log     *slog.Logger

	mu         sync.Mutex
	known, has bool
}

// connection is a connection to the container runtime, as a grpc.ClientConn is.
type connection interface {
	GetState() connectivity.State
	WaitForStateChange(ctx context.Context, from connectivity.State) bool
}

// Follow asks the runtime now, and after each reconnection, until ctx ends.
func (n *Native) Follow(ctx context.Context, conn connection) {
	for {
		state := conn.GetState()
		if state == connectivity.Ready {
			if _, err := n.Implemented(ctx); err != nil && ctx.Err() == nil {
				n.Log.WarnContext(ctx, "what the container runtime implements is not known; it is asked with the next call", "error", err)
			}
		}
		if !conn.WaitForStateChange(ctx, state) {
			return
		}
		n.forget()
	}
}

// Implemented says whether the runtime implements both calls.
func (n *Native) Implemented(ctx context.Context) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.known {
		return n.has, nil
	}
	has, err := probe(ctx, n.Runtime)
	if err != nil {
		return false, err
	}
	n.known, n.has = true, has
	if has {
		n.Log.InfoContext(ctx, "the container runtime implements CheckpointPod and RestorePod: direct callers' calls are passed on to it")
	}
	return has, nil
}

func (n *Native) forget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.known = false
}

// probe makes both calls with requests that name nothing: whoever implements them has to
// refuse these.
func probe(ctx context.Context, runtime runtimeapi.RuntimeServiceClient) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	_, checkpointErr := runtime.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{})
	_, restoreErr := runtime.RestorePod(ctx, &runtimeapi.RestorePodRequest{})
	for _, err := range []error{checkpointErr, restoreErr} {
		switch status.Code(err) {
		case codes.OK, codes.Unimplemented: // one that takes a request for nothing is not to be relied on
			return false, nil
		case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
			return false, fmt.Errorf("ask the container runtime whether it implements CheckpointPod and RestorePod: %w", err)
		}
	}
	return true, nil
}

// passedOn says whether a call is the container runtime's own to answer.
func (s *Service) passedOn(ctx context.Context) (bool, error) {
	if s.native == nil || len(metadata.ValueFromIncomingContext(ctx, formatHeader)) > 0 {
		return false, nil
	}
	return s.native.Implemented(ctx)
}

// lost says whether an answer is that of a runtime that was replaced by one without these
// calls.
func (s *Service) lost(err error) bool {
	if status.Code(err) != codes.Unimplemented {
		return false
	}
	s.native.forget()
	return true
}

// written says whether a checkpoint is of Stasis' format: those stay Stasis' to restore
// when a runtime comes that implements RestorePod.
func (s *Service) written(dir string) (bool, error) {
	err := s.host.Do(func() error {
		_, err := os.Lstat(filepath.Join(dir, checkpoint.ManifestName))
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
