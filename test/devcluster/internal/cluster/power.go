package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"podstasis.dev/stasis/test/devcluster/internal/cgroup"
	"podstasis.dev/stasis/test/devcluster/internal/network"
	"podstasis.dev/stasis/test/devcluster/internal/node"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

// offFile marks a node that is switched off: its disk stays for when it is switched on.
func (r Running) offFile(name string) string { return filepath.Join(r.PlaceDir(name), "off") }

// PowerOff takes a node its network, and then ends every process on it at once, as a loss of
// power does. What was mounted is gone with it, /run among that; its disk stays. Up switches
// it on again.
func (r Running) PowerOff(name string) error {
	i, isNode := plan.NodeNumber(name)
	if err := r.place(name); err != nil {
		return err
	}
	if !isNode {
		return fmt.Errorf("%s is not a node: name a component of it", name)
	}
	unlock, err := lockState(r.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	groups, err := cgroup.Find()
	if err != nil {
		return err
	}
	if err := os.WriteFile(r.offFile(name), nil, 0o644); err != nil {
		return fmt.Errorf("switching %s off: %w", name, err)
	}
	// First: nobody hears of it how the others end.
	if err := network.DisconnectNode(i, node.NetworkNamespace(r.NamespaceDir(), plan.ControlPlane)); err != nil {
		return err
	}
	var doomed cgroup.Doomed
	pids, err := groups.Processes(r.NodeCgroup(name))
	if err != nil {
		return err
	}
	doomed.Add(pids...)
	if pids, err = node.ProcessesOf(r.NamespaceDir(), name); err != nil {
		return err
	}
	doomed.Add(pids...)
	containers := doomed.Groups(plan.RuntimeCgroup)
	if err := groups.Kill(r.NodeCgroup(name), &doomed, 30*time.Second); err != nil {
		return err
	}
	if err := node.Drop(r.NamespaceDir(), name); err != nil {
		return err
	}
	for _, group := range append(containers, r.NodeCgroup(name), r.NodeSlice(name)) {
		if err := groups.Remove(group); err != nil {
			return err
		}
	}
	return nil
}
