package adapt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	sk_inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	sk_opts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"google.golang.org/protobuf/proto"

	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/nodeapi"
)

// What becomes of a TCP connection depends on where its other end is (P27).
//
// Both ends are in the checkpoint: it lives on, between the same ports, at the new
// Pod's address where it was at the old one's. While only one end exists nothing may
// be said on it, or the kernel would answer for the other that there is none.
//
// The other end is elsewhere: it is connected to the source, which goes on. Here the
// connection is restored to a port of the new Pod that nobody has: the kernel resets
// it in the moment it comes to life. What had been received can still be read, then
// comes ECONNRESET, as when a peer has gone. (CRIU's tcp-close would end all of them,
// with an end of file that a reader may take for the whole message.)

const (
	filesImage = "files.img"

	stateEstablished = 1
	stateSynSent     = 2
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateClosed      = 7
	stateCloseWait   = 8
	stateLastAck     = 9
	stateClosing     = 11

	protocolTCP = 6
)

// socket is a TCP or UDP socket of a container, as it was.
type socket struct {
	container string
	ino       uint32 // what CRIU names its stream's image by
	state     uint32
	tcp       bool
	src, dst  netip.AddrPort
}

func socketOf(container string, e *sk_inet.InetSkEntry) socket {
	return socket{
		container: container, ino: e.GetIno(), state: e.GetState(), tcp: e.GetProto() == protocolTCP,
		src: addressPort(e.GetSrcAddr(), e.GetSrcPort()), dst: addressPort(e.GetDstAddr(), e.GetDstPort()),
	}
}

// connected says whether CRIU restores it as a connection.
func (s socket) connected() bool { return s.tcp && s.dst.Port() != 0 }

// ends are those of a connection, as one of them sees it.
type ends struct{ src, dst netip.AddrPort }

func (s socket) ends() ends { return ends{s.src, s.dst} }
func (e ends) peer() ends   { return ends{e.dst, e.src} }

// connections is what is known of all sockets of a Pod together.
type connections struct {
	sockets []socket
	at      map[ends][]int // those that are connected, by their ends
	ports   map[uint16]bool
}

// peer finds the other end of a connection, if there is one and no more.
func (c *connections) peer(s socket) (socket, bool) {
	own, others := c.at[s.ends()], c.at[s.ends().peer()]
	if len(own) != 1 || len(others) != 1 || own[0] == others[0] {
		return socket{}, false
	}
	return c.sockets[others[0]], true
}

// connections reads the sockets of all containers.
func (p Pod) connections(ctx context.Context) (*connections, error) {
	c := &connections{at: map[ends][]int{}, ports: map[uint16]bool{}}
	for _, name := range p.names() {
		if err := c.read(ctx, name, p.ImageDirs[name]); err != nil {
			return nil, fmt.Errorf("read the sockets of container %s: %w", name, err)
		}
	}
	return c, nil
}

func (c *connections) read(ctx context.Context, name, dir string) error {
	src, root, err := source(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return src.Entries(ctx, filesImage, images.Files, func(entry []byte) error {
		_, e, err := inetSocket(entry)
		if err != nil || e == nil {
			return err
		}
		c.ports[uint16(e.GetSrcPort())], c.ports[uint16(e.GetDstPort())] = true, true
		s := socketOf(name, e)
		if s.connected() {
			c.at[s.ends()] = append(c.at[s.ends()], len(c.sockets))
		}
		c.sockets = append(c.sockets, s)
		return nil
	})
}

// inetSocket decodes an entry of the table of files; the second is nil if it is none
// of an IP socket. Fields that are not known are kept.
func inetSocket(entry []byte) (*fdinfo.FileEntry, *sk_inet.InetSkEntry, error) {
	f := new(fdinfo.FileEntry)
	if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(entry, f); err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %s", images.ErrFormat, filesImage, err)
	}
	if f.GetType() != fdinfo.FdTypes_INETSK || f.Isk == nil {
		return f, nil, nil
	}
	return f, f.Isk, nil
}

// addressPort reads an address as CRIU keeps it: words of 32 bits that are in network
// order in a little-endian machine's memory. IPv4 in IPv6 is IPv4.
func addressPort(words []uint32, port uint32) netip.AddrPort {
	var b []byte
	for _, w := range words[:min(len(words), 4)] {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	a, _ := netip.AddrFromSlice(b) // CRIU refuses what is no address
	return netip.AddrPortFrom(a.Unmap(), uint16(port))
}

// setAddress puts an address into words as they were used: IPv4 stays in IPv6 where
// it was.
func setAddress(words []uint32, a netip.Addr) []uint32 {
	b := a.AsSlice()
	if len(words) == 4 {
		wide := a.As16()
		b = wide[:]
	}
	var out []uint32
	for ; len(b) >= 4; b = b[4:] {
		out = append(out, binary.LittleEndian.Uint32(b))
	}
	return out
}

// moved is where an address of the source is in the new Pod.
func (p Pod) moved(a netip.Addr) netip.Addr {
	if !slices.Contains(p.Was, a) {
		return a
	}
	for _, is := range p.Is {
		if is.Is4() == a.Is4() {
			return is
		}
	}
	return a
}

func (p Pod) movedPort(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(p.moved(a.Addr()), a.Port())
}

// awaited lists the connections between containers of which not both ends are there.
func (p Pod) awaited(c *connections, there []string) (list []nodeapi.Connection) {
	for i, s := range c.sockets {
		peer, inside := c.peer(s)
		if !inside || s.container == peer.container || i > c.at[s.ends().peer()][0] ||
			slices.Contains(there, s.container) && slices.Contains(there, peer.container) {
			continue
		}
		list = append(list, nodeapi.Connection{A: p.movedPort(s.src), B: p.movedPort(s.dst)})
	}
	return list
}

// writeSockets writes the container's table of files with its sockets adapted.
func (p Pod) writeSockets(ctx context.Context, w *writer, name string, c *connections) error {
	src, root, err := source(w.from)
	if err != nil {
		return err
	}
	defer root.Close()
	dead := deadPorts{taken: c.ports, next: 65535}
	image := newImage(images.Files)
	changed := false
	err = src.Entries(ctx, filesImage, images.Files, func(entry []byte) error {
		f, e, err := inetSocket(entry)
		if err != nil {
			return err
		}
		if e != nil {
			before := proto.Clone(e)
			if err := p.adapt(e, c, name, &dead); err != nil {
				return err
			}
			if !proto.Equal(before, e) {
				changed = true
				if entry, err = (proto.MarshalOptions{AllowPartial: true}).Marshal(f); err != nil {
					return err
				}
			}
		}
		image.add(entry)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: there is no %s", images.ErrFormat, filesImage)
	}
	if err != nil || !changed {
		return err
	}
	return w.write(filesImage, image)
}

// adapt changes one socket.
func (p Pod) adapt(e *sk_inet.InetSkEntry, c *connections, name string, dead *deadPorts) error {
	s := socketOf(name, e)
	local := p.moved(s.src.Addr())
	if local != s.src.Addr() {
		e.SrcAddr = setAddress(e.SrcAddr, local)
	}
	if remote := p.moved(s.dst.Addr()); remote != s.dst.Addr() {
		e.DstAddr = setAddress(e.DstAddr, remote)
	}
	if !s.connected() || s.state == stateSynSent { // who is connecting goes on, from here
		return nil
	}
	if _, inside := c.peer(s); inside {
		return nil
	}
	switch s.state {
	case stateEstablished, stateFinWait1, stateFinWait2, stateCloseWait:
		port, err := dead.take()
		if err != nil {
			return err
		}
		e.State, e.Shutdown = proto.Uint32(stateEstablished), nil
		e.DstAddr, e.DstPort = setAddress(e.DstAddr, local), proto.Uint32(uint32(port))
	default: // both sides had said that they were through
		e.State, e.Shutdown = proto.Uint32(stateClosed), sk_opts.SkShutdown_BOTH.Enum()
		e.SrcPort, e.DstPort = proto.Uint32(0), proto.Uint32(0)
	}
	return nil
}

// deadPorts hands out ports that no socket of the Pod has or is connected to.
type deadPorts struct {
	taken map[uint16]bool
	next  int
}

func (d *deadPorts) take() (uint16, error) {
	for ; d.next > 0; d.next-- {
		if port := uint16(d.next); !d.taken[port] {
			d.next--
			return port, nil
		}
	}
	return 0, errors.New("the checkpoint has more connections to other Pods than there are ports: they cannot be ended one by one")
}
