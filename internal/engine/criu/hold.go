package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/nodeapi"
)

// A connection between two containers comes back one end after the other. CRIU has
// the first end ask, in the moment it comes to life, how much the other can take; the
// kernel would answer for a socket that is not there yet: reset. So what is said on
// such a connection is dropped until both ends exist, by packet filter rules of the
// sandbox's network, which go with it. TCP says everything again.

// holdTable is the name of the tables, one for IPv4 and one for IPv6.
const holdTable = "stasis-restore"

// hold has what is said on connections dropped, and on no others: a list replaces the
// one before. Where there are none between containers it is not called.
func hold(netns string, connections []nodeapi.Connection) error {
	if netns == "" {
		return errors.New("connections between containers cannot be restored in the node's own network")
	}
	ns, err := os.Open(netns)
	if err != nil {
		return fmt.Errorf("open the Pod's network namespace: %w", err)
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("reach the packet filter of the Pod's network: %w", err)
	}
	for _, family := range []holdFamily{{nftables.TableFamilyIPv4, 4, 12, 16, nftables.TypeIPAddr}, {nftables.TableFamilyIPv6, 16, 8, 24, nftables.TypeIP6Addr}} {
		if err := family.replace(c, connections); err != nil {
			return fmt.Errorf("hold the connections between the Pod's containers: %w", err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("hold the connections between the Pod's containers (needs nf_tables in the node's kernel): %w", err)
	}
	return nil
}

// holdFamily is a family of addresses: their size, and where in a packet's header
// source and destination are.
type holdFamily struct {
	family      nftables.TableFamily
	size        uint32
	source      uint32
	destination uint32
	addresses   nftables.SetDatatype
}

// replace makes the family's table anew, or takes it away.
func (f holdFamily) replace(c *nftables.Conn, connections []nodeapi.Connection) error {
	var elements []nftables.SetElement
	for _, connection := range connections {
		if a, b := connection.A, connection.B; a.Addr().BitLen() == int(f.size)*8 {
			elements = append(elements, nftables.SetElement{Key: f.key(a, b)}, nftables.SetElement{Key: f.key(b, a)})
		}
	}
	table := &nftables.Table{Name: holdTable, Family: f.family}
	c.AddTable(table) // so that there is one to take away
	c.DelTable(table)
	if len(elements) == 0 {
		return nil
	}
	c.AddTable(table)
	keys, err := nftables.ConcatSetType(f.addresses, nftables.TypeInetService, f.addresses, nftables.TypeInetService)
	if err != nil {
		return err
	}
	set := &nftables.Set{Table: table, Name: "connections", KeyType: keys, Concatenation: true}
	if err := c.AddSet(set, elements); err != nil {
		return err
	}
	chain := c.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
	})
	words := f.size / 4
	const first = unix.NFT_REG32_00
	load := func(register, base uint32, offset, length uint32) expr.Any {
		return &expr.Payload{DestRegister: register, Base: expr.PayloadBase(base), Offset: offset, Len: length}
	}
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		load(first, unix.NFT_PAYLOAD_NETWORK_HEADER, f.source, f.size),
		load(first+words, unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2),
		load(first+words+1, unix.NFT_PAYLOAD_NETWORK_HEADER, f.destination, f.size),
		load(first+2*words+1, unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2),
		&expr.Lookup{SourceRegister: first, SetName: set.Name, SetID: set.ID},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return nil
}

// key is an element of a set of concatenated fields: each fills whole words.
func (f holdFamily) key(source, destination netip.AddrPort) []byte {
	var key []byte
	for _, end := range []netip.AddrPort{source, destination} {
		key = append(key, end.Addr().AsSlice()...)
		key = append(key, binaryutil.BigEndian.PutUint16(end.Port())...)
		key = binary.BigEndian.AppendUint16(key, 0)
	}
	return key
}

// Addresses are those of a network namespace that other hosts know it by; none for
// the node's own, which has no path.
func Addresses(netns string) ([]netip.Addr, error) {
	if netns == "" {
		return nil, nil
	}
	var addresses []netip.Addr
	err := inNamespace(netns, unix.CLONE_NEWNET, func() error {
		list, err := net.InterfaceAddrs()
		if err != nil {
			return err
		}
		for _, a := range list {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil {
				return err
			}
			if addr := prefix.Addr(); addr.IsGlobalUnicast() {
				addresses = append(addresses, addr)
			}
		}
		return nil
	})
	return addresses, err
}
