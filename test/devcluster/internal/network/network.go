// Package network connects a cluster's network namespaces. All nodes hang on a bridge
// that is in the control plane's namespace, so that the machine itself gets one single
// interface and no bridge, and none of its own packet filters see traffic between nodes.
// When the namespaces go, all of it goes.
package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

const bridge = "nodes"

// Claim calls choose with a free index: one whose ranges overlap no route or address of
// this machine. choose must make the machine's link (ConnectMachine) before it returns:
// that is what marks the index as taken. No two processes choose at the same time.
func Claim(choose func(index int) error) error {
	// An abstract socket is a lock that ends with its process and leaves no file.
	const name = "@stasis-devcluster-addresses"
	var lock net.Listener
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var err error
		lock, err = net.Listen("unix", name)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return fmt.Errorf("waiting for another devcluster to choose its addresses: %w", err)
		}
	}
	defer lock.Close()
	taken, err := machineRanges()
	if err != nil {
		return err
	}
	for index := range plan.MaxIndex {
		c := plan.Cluster{Index: index}
		if !overlaps(taken, c.NodeSubnet()) && !overlaps(taken, c.PodRange()) {
			return choose(index)
		}
	}
	return fmt.Errorf("all %d address ranges for clusters overlap routes or addresses of this machine (ip route): end a cluster that is not needed", plan.MaxIndex)
}

func overlaps(taken []netip.Prefix, p netip.Prefix) bool {
	for _, t := range taken {
		if t.Overlaps(p) {
			return true
		}
	}
	return false
}

func machineRanges() ([]netip.Prefix, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("listing the machine's routes: %w", err)
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("listing the machine's addresses: %w", err)
	}
	var taken []netip.Prefix
	for _, r := range routes {
		// The default route is everybody's.
		if p, ok := prefix(r.Dst); ok && p.Bits() > 0 {
			taken = append(taken, p)
		}
	}
	for _, a := range addresses {
		if p, ok := prefix(a.IPNet); ok {
			taken = append(taken, p.Masked())
		}
	}
	return taken, nil
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones), ok && bits == 32
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// namespace is an open network namespace with a netlink connection into it.
type namespace struct {
	file   netns.NsHandle
	handle *netlink.Handle
}

func open(path string) (namespace, error) {
	file, err := netns.GetFromPath(path)
	if err != nil {
		return namespace{}, fmt.Errorf("opening the network namespace %s: %w", path, err)
	}
	handle, err := netlink.NewHandleAt(file, unix.NETLINK_ROUTE)
	if err != nil {
		file.Close()
		return namespace{}, fmt.Errorf("opening netlink in the network namespace %s: %w", path, err)
	}
	return namespace{file, handle}, nil
}

func (n namespace) close() {
	n.handle.Close()
	n.file.Close()
}

// ConnectMachine sets up the control plane's namespace, at path, with the bridge, and
// gives the machine its one link and address. It may be repeated.
func ConnectMachine(c plan.Cluster, path string) error {
	ns, err := open(path)
	if err != nil {
		return err
	}
	defer ns.close()
	if err := up(ns.handle, "lo"); err != nil {
		return err
	}
	hub, err := ensure(ns.handle, &netlink.Bridge{LinkAttrs: attrs(bridge)})
	if err != nil {
		return explain("a bridge", err)
	}
	if err := address(ns.handle, hub, netip.PrefixFrom(c.APIServer(), c.NodeSubnet().Bits())); err != nil {
		return err
	}
	if err := up(ns.handle, bridge); err != nil {
		return err
	}
	machine, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer machine.Close()
	if err := connect(ns, hub, "machine", machine, nil, c.Link()); err != nil {
		return err
	}
	link, err := machine.LinkByName(c.Link())
	if err != nil {
		return fmt.Errorf("looking for the interface %s: %w", c.Link(), err)
	}
	return address(machine, link, netip.PrefixFrom(c.Machine(), c.NodeSubnet().Bits()))
}

// ConnectNode hangs node i (from 1), whose namespace is at path, on the bridge in the
// control plane's namespace at hubPath. It may be repeated.
func ConnectNode(c plan.Cluster, i int, path, hubPath string) error {
	ns, err := open(path)
	if err != nil {
		return err
	}
	defer ns.close()
	hub, err := open(hubPath)
	if err != nil {
		return err
	}
	defer hub.close()
	if err := up(ns.handle, "lo"); err != nil {
		return err
	}
	link, err := hub.handle.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("looking for the bridge of the nodes: %w", err)
	}
	const inside = "eth0"
	if err := connect(hub, link, plan.NodeName(i), ns.handle, &ns.file, inside); err != nil {
		return err
	}
	eth, err := ns.handle.LinkByName(inside)
	if err != nil {
		return fmt.Errorf("looking for the interface of %s: %w", plan.NodeName(i), err)
	}
	if err := address(ns.handle, eth, netip.PrefixFrom(c.NodeAddress(i), c.NodeSubnet().Bits())); err != nil {
		return err
	}
	// There is no default route: what is meant for the world outside fails at once. kube-proxy
	// rewrites packets for Services after the kernel has found them a route, so they need one.
	return route(ns.handle, eth, c.Services(), c.APIServer())
}

// DisconnectNode pulls node i's cable out of the bridge in the control plane's namespace at
// hubPath. ConnectNode puts another one in.
func DisconnectNode(i int, hubPath string) error {
	hub, err := open(hubPath)
	if err != nil {
		return err
	}
	defer hub.close()
	link, err := hub.handle.LinkByName(plan.NodeName(i))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for the interface of %s: %w", plan.NodeName(i), err)
	}
	if err := hub.handle.LinkDel(link); err != nil {
		return fmt.Errorf("disconnecting %s: %w", plan.NodeName(i), err)
	}
	return nil
}

// RoutePods lets every node, the control plane and the machine reach the Pods of all
// nodes. path tells where a place's network namespace is.
func RoutePods(c plan.Cluster, path func(place string) string) error {
	for _, place := range append([]string{plan.ControlPlane}, c.NodeNames()...) {
		ns, err := open(path(place))
		if err != nil {
			return err
		}
		device := "eth0"
		if place == plan.ControlPlane {
			device = bridge
		}
		err = routePods(c, ns.handle, device, place)
		ns.close()
		if err != nil {
			return err
		}
	}
	machine, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer machine.Close()
	return routePods(c, machine, c.Link(), "")
}

func routePods(c plan.Cluster, h *netlink.Handle, device, except string) error {
	link, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("looking for the interface %s: %w", device, err)
	}
	for i := 1; i <= c.Nodes; i++ {
		if plan.NodeName(i) == except {
			continue
		}
		if err := route(h, link, c.PodSubnet(i), c.NodeAddress(i)); err != nil {
			return err
		}
	}
	return nil
}

// Disconnect takes the machine's link away, and with it its address and routes.
func Disconnect(c plan.Cluster) error {
	link, err := netlink.LinkByName(c.Link())
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for the interface %s: %w", c.Link(), err)
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("removing the interface %s: %w", c.Link(), err)
	}
	return nil
}

// Connected says whether the machine has its link into the cluster's network.
func Connected(c plan.Cluster) bool {
	_, err := netlink.LinkByName(c.Link())
	return err == nil
}

// UpLoopback switches on the loopback interface of this process's network namespace.
func UpLoopback() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	return up(h, "lo")
}

// Probe makes, in the network namespace of the calling thread, one of each kind of
// interface that a cluster needs, and takes them away again.
func Probe() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	link, err := ensure(h, &netlink.Bridge{LinkAttrs: attrs("probe-bridge")})
	if err != nil {
		return explain("a bridge", err)
	}
	if err := h.LinkDel(link); err != nil {
		return fmt.Errorf("removing a bridge: %w", err)
	}
	link, err = ensure(h, &netlink.Veth{LinkAttrs: attrs("probe-a"), PeerName: "probe-b"})
	if err != nil {
		return explain("a veth pair", err)
	}
	if err := h.LinkDel(link); err != nil {
		return fmt.Errorf("removing a veth pair: %w", err)
	}
	return nil
}

// connect makes a pair of interfaces, one end on the bridge, the other in peer's namespace.
func connect(hub namespace, hubLink netlink.Link, name string, peer *netlink.Handle, peerNS *netns.NsHandle, peerName string) error {
	_, here := hub.handle.LinkByName(name)
	_, there := peer.LinkByName(peerName)
	if here != nil || there != nil {
		// One end without the other cannot be: both go together. It is a rest under the same name.
		if link, err := peer.LinkByName(peerName); err == nil {
			if err := peer.LinkDel(link); err != nil {
				return fmt.Errorf("removing a left-over interface %s: %w", peerName, err)
			}
		}
		if link, err := hub.handle.LinkByName(name); err == nil {
			if err := hub.handle.LinkDel(link); err != nil {
				return fmt.Errorf("removing a left-over interface %s: %w", name, err)
			}
		}
		var target netns.NsHandle
		if peerNS != nil {
			target = *peerNS
		} else {
			var err error
			if target, err = netns.Get(); err != nil {
				return fmt.Errorf("opening the machine's network namespace: %w", err)
			}
			defer target.Close()
		}
		pair := &netlink.Veth{LinkAttrs: attrs(name), PeerName: peerName, PeerNamespace: netlink.NsFd(target)}
		if _, err := ensure(hub.handle, pair); err != nil {
			return explain("a veth pair", err)
		}
	}
	link, err := hub.handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("looking for the interface %s: %w", name, err)
	}
	if err := hub.handle.LinkSetMaster(link, hubLink); err != nil {
		return fmt.Errorf("putting the interface %s on the bridge: %w", name, err)
	}
	if err := up(hub.handle, name); err != nil {
		return err
	}
	return up(peer, peerName)
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func ensure(h *netlink.Handle, link netlink.Link) (netlink.Link, error) {
	if err := h.LinkAdd(link); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	return h.LinkByName(link.Attrs().Name)
}

func explain(what string, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("the kernel cannot make %s: load its module (modprobe bridge veth) or use a kernel that has it: %w", what, err)
	}
	return fmt.Errorf("making %s: %w", what, err)
}

func up(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("looking for the interface %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("switching on the interface %s: %w", name, err)
	}
	return nil
}

func address(h *netlink.Handle, link netlink.Link, p netip.Prefix) error {
	if err := h.AddrReplace(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		return fmt.Errorf("giving %s the address %s: %w", link.Attrs().Name, p, err)
	}
	return nil
}

func route(h *netlink.Handle, link netlink.Link, to netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Gw: via.AsSlice()}
	if err := h.RouteReplace(r); err != nil {
		return fmt.Errorf("setting the route to %s via %s: %w", to, via, err)
	}
	return nil
}
