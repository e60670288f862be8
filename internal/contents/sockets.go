package contents

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	packet "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	netlink "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	unix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// socket is one of the container's, and who holds it.
type socket struct {
	api.Socket
	peer uint32 // inode of a Unix socket's other end
}

// maxHolders bounds the holders that are named.
const maxHolders = 64

func (s *socket) holds(pid int64) {
	if len(s.PIDs) < maxHolders && !slices.Contains(s.PIDs, pid) {
		s.PIDs = append(s.PIDs, pid)
	}
}

// Families, types, protocols and states, as Linux numbers them.
const (
	familyInet6     = 10
	typeStream      = 1
	typeDatagram    = 2
	stateListen     = 10
	stateClosed     = 7
	stateConnected  = 1
	protocolICMP    = 1
	protocolTCP     = 6
	protocolUDP     = 17
	protocolICMPv6  = 58
	protocolSCTP    = 132
	protocolUDPLite = 136
)

// add counts a socket in, and describes the file that it is.
func (t *fileTable) add(f *file, s *socket) {
	t.sock = append(t.sock, s)
	f.socket = len(t.sock)
	parts := []string{s.Protocol, s.Local}
	if s.Remote != "" {
		parts = append(parts, "→", s.Remote)
	}
	if s.State != "" {
		parts = append(parts, strings.ToLower(s.State))
	}
	f.path = strings.Join(parts, " ")
}

func (t *fileTable) inet(f *file, e *inet.InetSkEntry) {
	s := &socket{}
	names := map[uint32]string{protocolTCP: "tcp", protocolUDP: "udp", protocolICMP: "icmp", protocolICMPv6: "icmp", protocolSCTP: "sctp", protocolUDPLite: "udplite"}
	if s.Protocol = names[e.GetProto()]; s.Protocol == "" {
		s.Protocol = fmt.Sprintf("raw-%d", e.GetProto())
	}
	if e.GetFamily() == familyInet6 {
		s.Protocol += "6"
	}
	s.Local = addressPort(e.GetSrcAddr(), e.GetSrcPort())
	if e.GetDstPort() != 0 {
		s.Remote = addressPort(e.GetDstAddr(), e.GetDstPort())
	}
	s.State = streamState(e.GetState())
	if e.GetType() != typeStream {
		s.State = datagramState(e.GetState())
	}
	t.add(f, s)
}

// addressPort reads an address as CRIU keeps it: 32-bit words that are in network
// order on a little-endian machine.
func addressPort(words []uint32, port uint32) string {
	var b []byte
	for _, w := range words[:min(len(words), 4)] {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	address, ok := netip.AddrFromSlice(b)
	if !ok {
		return fmt.Sprintf("?:%d", port)
	}
	return netip.AddrPortFrom(address, uint16(port)).String()
}

func streamState(s uint32) string {
	names := []string{"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING"}
	if int64(s) < int64(len(names)) {
		return names[s]
	}
	return fmt.Sprintf("state %d", s)
}

func datagramState(s uint32) string {
	if s == stateConnected {
		return "CONNECTED"
	}
	return "UNCONNECTED"
}

func (t *fileTable) unix(f *file, e *unix.UnixSkEntry) {
	s := &socket{peer: e.GetPeer()}
	s.Protocol = "unix"
	name := e.GetName()
	switch {
	case len(name) == 0 || len(name) == 1 && name[0] == 0:
		s.Local = fmt.Sprintf("socket:[%d]", e.GetIno())
	case name[0] == 0:
		s.Local = "@" + t.clean(string(name[1:]))
	default:
		s.Local = t.clean(strings.TrimRight(string(name), "\x00"))
		if e.GetNameDir() != "" && !strings.HasPrefix(s.Local, "/") {
			s.Local = t.clean(strings.TrimSuffix(e.GetNameDir(), "/") + "/" + s.Local)
		}
	}
	switch {
	case e.GetState() == stateListen:
		s.State = "LISTEN"
	case e.GetType() == typeDatagram:
		s.State = datagramState(e.GetState())
	case e.GetState() == stateClosed:
		s.State = "UNCONNECTED"
	default:
		s.State = streamState(e.GetState())
	}
	if t.hold(len(s.Local)) {
		t.inodes[e.GetIno()] = s
	}
	t.add(f, s)
}

func (t *fileTable) netlink(f *file, e *netlink.NetlinkSkEntry) {
	names := map[uint32]string{0: "route", 4: "sock-diag", 5: "nflog", 6: "xfrm", 7: "selinux", 9: "audit", 12: "netfilter", 15: "kobject-uevent", 16: "generic"}
	name := names[e.GetProtocol()]
	if name == "" {
		name = fmt.Sprintf("protocol-%d", e.GetProtocol())
	}
	s := &socket{Socket: api.Socket{Protocol: "netlink", Local: fmt.Sprintf("%s:%d", name, e.GetPortid())}}
	t.add(f, s)
}

func (t *fileTable) packet(f *file, e *packet.PacketSockEntry) {
	t.add(f, &socket{Socket: api.Socket{Protocol: "packet", Local: fmt.Sprintf("interface %d, protocol %04x", e.GetIfindex(), e.GetProtocol())}})
}

// sockets lists them all, once the processes have said which they hold.
func (t *fileTable) sockets() []api.Socket {
	var out []api.Socket
	for i, s := range t.sock {
		if other := t.inodes[s.peer]; s.peer != 0 && other != nil {
			s.Remote = other.Local
		}
		if !t.fits(t.at+".sockets", i, t.limits.Sockets, len(s.Local)+len(s.Remote)+8*len(s.PIDs)) {
			break
		}
		out = append(out, s.Socket)
	}
	return out
}
