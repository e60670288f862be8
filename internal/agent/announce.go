package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strconv"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/platform"
)

// announcer keeps the agent's Lease, by which the API server of Stasis finds it.
type announcer struct {
	client    client.Client
	live      client.Reader
	namespace string
	node      string
	host      string                // the agent's address
	holder    string                // its Pod
	platform  *platform.Description // what the node is to checkpoints
	now       func() time.Time
	log       *slog.Logger
}

// run announces the agent until ctx ends. The Lease stays: whoever comes after
// takes it over, and nobody believes it for long.
func (a *announcer) run(ctx context.Context, port int, certificate string) error {
	said := agentapi.Announcement{
		Node: a.node, Address: net.JoinHostPort(a.host, strconv.Itoa(port)), Certificate: certificate,
		Protocol: agentapi.Version, Program: programVersion(), Holder: a.holder, Duration: agentapi.LeaseDuration, Platform: a.platform,
	}
	const retry = 2 * time.Second
	for {
		wait := agentapi.RenewEvery
		said.Renewed = a.now()
		if err := a.say(ctx, said); err != nil && ctx.Err() == nil {
			a.log.Warn("the agent's Lease could not be written, trying again", "error", err)
			wait = retry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (a *announcer) say(ctx context.Context, said agentapi.Announcement) error {
	ctx, cancel := context.WithTimeout(ctx, agentapi.RenewEvery/2)
	defer cancel()
	var lease coordinationv1.Lease
	name := client.ObjectKey{Namespace: a.namespace, Name: agentapi.LeaseName(a.node)}
	err := a.live.Get(ctx, name, &lease)
	if apierrors.IsNotFound(err) {
		lease.Namespace, lease.Name = name.Namespace, name.Name
		said.Fill(&lease)
		err = a.client.Create(ctx, &lease)
	} else if err == nil {
		said.Fill(&lease)
		err = a.client.Update(ctx, &lease)
	}
	if err != nil {
		return fmt.Errorf("write Lease %s: %w", name, err)
	}
	return nil
}

// programVersion is what this program was built as.
func programVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "devel"
	}
	return info.Main.Version
}
