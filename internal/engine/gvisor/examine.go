package gvisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/gvisor/pausing"
)

// Examine implements engine.Engine. Connections to elsewhere are the sandbox's own network
// stack's and not to be seen from outside.
func (e *Engine) Examine(ctx context.Context, s engine.Sandbox) (engine.Examination, error) {
	x := engine.Examination{Whole: true}
	r, err := e.runscOf(s.Containers[0].Runtime)
	if err != nil {
		return x, err
	}
	if x.Problems, err = e.problems(ctx, r, s); err != nil {
		return x, err
	}
	found, err := e.strays(ctx, r, s.Containers)
	x.Problems = append(x.Problems, toldOf(found)...)
	return x, err
}

// problems are the reasons for which a sandbox cannot be captured.
func (e *Engine) problems(ctx context.Context, r runsc, s engine.Sandbox) (found []string, err error) {
	if overlay, _, _ := strings.Cut(r.overlay, ":"); overlay == "none" {
		found = append(found, "gVisor is set to overlay2=none on this node: what containers write to their root file systems is outside of the sandbox and would be lost; set another overlay2 in the settings of its shim")
	}
	if r.network != "" && r.network != "sandbox" {
		found = append(found, fmt.Sprintf("gVisor is set to network=%s on this node, and only the network stack of the sandbox itself can be saved; set network=sandbox in the settings of its shim", r.network))
	}
	for _, c := range s.Containers {
		found = append(found, problemsOf(c)...)
	}
	ids, err := e.containersOf(r, s.ID)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if id == s.ID || slices.ContainsFunc(s.Containers, func(c engine.Container) bool { return c.ID == id }) {
			continue
		}
		status, err := e.pauses.State(ctx, r.Runsc, id)
		switch {
		case errors.Is(err, pausing.ErrNoSandbox):
		case err != nil:
			return nil, err
		case status == "stopped":
			found = append(found, fmt.Sprintf("container %s has ended and is still there: gVisor saves and restores a Pod whole", id))
		default:
			found = append(found, fmt.Sprintf("container %s (%s) is not selected: gVisor saves and restores a Pod whole; select all containers", id, status))
		}
	}
	return found, nil
}

// problemsOf are those that a container's OCI spec shows.
func problemsOf(c engine.Container) (found []string) {
	if c.Spec.Process != nil && c.Spec.Process.Terminal {
		found = append(found, fmt.Sprintf("container %s has a terminal (tty), which gVisor cannot save", c.Name))
	}
	network := c.Spec.Linux != nil && slices.ContainsFunc(c.Spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.NetworkNamespace
	})
	if !network {
		found = append(found, fmt.Sprintf("container %s uses the node's network, which gVisor cannot save", c.Name))
	}
	return found
}
