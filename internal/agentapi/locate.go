package agentapi

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Why an agent cannot be asked (A3).
type Reason string

const (
	NoAgent  Reason = "NoAgent"  // no agent has ever announced itself on the node
	GoneAway Reason = "GoneAway" // its agent has not been heard of for LeaseDuration
	TooOld   Reason = "TooOld"   // its agent speaks a lower Version than is needed
	NodeGone Reason = "NodeGone" // there is no such node any more
	NoAnswer Reason = "NoAnswer" // its agent is there, and does not answer
)

// Unreachable says that the agent of a node cannot be asked, and why.
type Unreachable struct {
	Node    string
	Reason  Reason
	Message string // what is wrong and what to do
	Err     error  // what led to it, if anything did
}

func (u *Unreachable) Error() string {
	if u.Err != nil {
		return u.Message + ": " + u.Err.Error()
	}
	return u.Message
}

func (u *Unreachable) Unwrap() error { return u.Err }

// Locator finds the agents of nodes.
type Locator struct {
	// Reader reads from the API server, not from a cache: Leases change all the time
	// and are rarely asked for.
	Reader client.Reader
	// Namespace is where the agents' Leases are.
	Namespace string
	Clock     clock.PassiveClock
	// Blind leaves out whether a node without an agent exists: agents may not read
	// Nodes.
	Blind bool
}

// Locate returns what the agent of a node announced, if it lives and speaks at
// least the version that is needed. Else the error is an *Unreachable, or that of
// a read.
func (l *Locator) Locate(ctx context.Context, node string, needs int) (Announcement, error) {
	var lease coordinationv1.Lease
	err := l.Reader.Get(ctx, client.ObjectKey{Namespace: l.Namespace, Name: LeaseName(node)}, &lease)
	if apierrors.IsNotFound(err) {
		return Announcement{}, l.orGone(ctx, node, &Unreachable{Node: node, Reason: NoAgent,
			Message: fmt.Sprintf("no stasis-agent runs on node %q: see whether the stasis-agent DaemonSet covers that node", node)})
	}
	if err != nil {
		return Announcement{}, fmt.Errorf("read the Lease of the agent of node %q: %w", node, err)
	}
	a, err := Read(&lease)
	if err != nil {
		return Announcement{}, &Unreachable{Node: node, Reason: NoAnswer, Message: fmt.Sprintf("the stasis-agent of node %q has not announced itself properly", node), Err: err}
	}
	if now := l.Clock.Now(); !a.Alive(now) {
		return Announcement{}, l.orGone(ctx, node, &Unreachable{Node: node, Reason: GoneAway,
			Message: fmt.Sprintf("the stasis-agent of node %q was last heard of %s ago: see whether the node and Pod %q of namespace %q run",
				node, now.Sub(a.Renewed).Round(time.Second), a.Holder, l.Namespace)})
	}
	if a.Protocol < needs {
		return Announcement{}, &Unreachable{Node: node, Reason: TooOld,
			Message: fmt.Sprintf("the stasis-agent of node %q is too old for this: it is %s and speaks version %d, and version %d is needed; upgrade the stasis-agent DaemonSet",
				node, orUnknown(a.Program), a.Protocol, needs)}
	}
	return a, nil
}

// orGone returns the error, or one that says that the whole node is gone.
func (l *Locator) orGone(ctx context.Context, name string, otherwise *Unreachable) error {
	if l.Blind {
		return otherwise
	}
	var node corev1.Node
	err := l.Reader.Get(ctx, client.ObjectKey{Name: name}, &node)
	if apierrors.IsNotFound(err) {
		return &Unreachable{Node: name, Reason: NodeGone, Message: fmt.Sprintf("node %q no longer exists, and what was on its disk with it", name)}
	}
	if err != nil {
		return fmt.Errorf("read node %q: %w", name, err)
	}
	return otherwise
}

func orUnknown(s string) string {
	if s == "" {
		return "of an unknown version"
	}
	return fmt.Sprintf("%.64q", s)
}
