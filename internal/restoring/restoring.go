// Package restoring is the node's side of a restore, as asked for by
// stasis-runtime: which checkpoint a sandbox is made from, whether its data are
// whole, and what to do at each container's create. It knows sandboxes and
// directories; that a Pod object stands behind a sandbox is its Resolver's affair.
package restoring

import (
	"context"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Resolver finds the checkpoint that a sandbox asks to be restored from, and
// says no with a *nodeapi.Error whose reason and message reach the Pod's events.
type Resolver interface {
	// Resolve is asked at the creation of a sandbox whose annotations name a
	// PodCheckpoint. It may be asked any number of times for one Pod.
	Resolve(ctx context.Context, sandbox nodeapi.Sandbox) (Source, error)
}

// Source is where to restore a sandbox from.
type Source struct {
	// Ordinary says that this sandbox is to be started and not restored, because
	// its Pod has been restored before (a later sandbox of the same Pod).
	Ordinary bool
	// Dir is the checkpoint's directory, absolute.
	Dir string
	// ManifestDigest is what the manifest's digest must be; empty only where the
	// caller vouches for the directory itself (RestorePod of the CRI).
	ManifestDigest string
	// Memory says how it is brought; Sessions fill it in.
	Memory pages.Mode
	// Partial says that Dir holds what the engine reads, and that memory is still being
	// brought there: it is given while processes run, and Blocks is asked for it.
	Partial bool
	// CompletedInit names the init containers that had completed.
	CompletedInit []string
	// Together names the containers that are let go together, at the start of the
	// last of them. One that runs earlier changes files that another has open, and
	// CRIU does not open a file that has another size than it had. Containers whose
	// start others wait for cannot be among them.
	Together []string
	// HoldUp says what of the Pod the kubelet waits for before it starts the last
	// container. A sandbox that is restored as a whole would wait for ever.
	HoldUp []string
}

// Blocks brings what is not in the directory of a partial Source yet.
type Blocks interface {
	// Block returns when a block is in a directory, or after a while. trouble says what
	// stands in the way for now. An error says that it cannot be had, now or later.
	Block(ctx context.Context, dir string, block nodeapi.Block) (there bool, trouble string, err error)
}

// Observer is told how restores go on; the agent turns it into events,
// conditions and metrics.
type Observer interface {
	// Refused: the sandbox's creation was refused for this reason.
	Refused(ctx context.Context, sandbox nodeapi.Sandbox, reason *nodeapi.Error)
	// Began: data were found whole, as far as they are checked before, and restoring begins.
	Began(ctx context.Context, sandbox nodeapi.Sandbox)
	// Failed: one container could not be restored, for this reason.
	Failed(ctx context.Context, sandbox nodeapi.Sandbox, container string, reason *nodeapi.Error)
	// Remember: every container of the checkpoint has been let go, so the Pod is not
	// to be restored again. It may be called again.
	Remember(sandbox nodeapi.Sandbox) error
	// Succeeded: the same, for others to know. It is called again until it returns
	// no error, in the worst case after it had: by an agent whose predecessor ended
	// before it could note that. containers are the IDs of those that were let go, by
	// name.
	Succeeded(ctx context.Context, sandbox nodeapi.Sandbox, containers map[string]string) error
	// Memory: what has become of the memory that a container was given while it ran: all
	// is there, or it could not be had and the container was killed. It is called again
	// until it returns no error.
	Memory(ctx context.Context, sandbox nodeapi.Sandbox, container string, status lazy.Status) error
	// MemoryEnded: nothing of a partial Source is to come any more for a sandbox, all of
	// whose containers were let go. lost names those whose memory could not be had. It is
	// called again until it returns no error.
	MemoryEnded(ctx context.Context, sandbox nodeapi.Sandbox, lost []string) error
}
