package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// CRIU captures a container by itself, and a connected Unix socket only together with
// the other end. That is found out here: CRIU does when the Pod stands still already.

// holder is a process of a container that has a socket open.
type holder struct {
	container string
	pid       int
}

func (h holder) String() string {
	return fmt.Sprintf("container %s, process %d (%s)", h.container, h.pid, commandOf(h.pid))
}

// inspectUnix refuses Unix sockets of containers that are connected to one of another
// container, or of no captured container at all. pids are the containers' processes.
func inspectUnix(containers []engine.Container, pids [][]int) error {
	holders := map[uint32]holder{}
	for i, c := range containers {
		for _, pid := range pids[i] {
			for _, inode := range socketsOf(pid) {
				holders[inode] = holder{c.Name, pid}
			}
		}
	}
	if len(holders) == 0 {
		return nil
	}
	// All containers of a Pod share its network namespace, and so its sockets.
	peers, err := unixPeers(containers[0].PID)
	if err != nil {
		return fmt.Errorf("list the Pod's Unix sockets: %w", err)
	}
	for inode, peer := range peers {
		own, ours := holders[inode]
		other, known := holders[peer]
		switch {
		case !ours || peer == 0: // not captured; or its other end has not been accepted yet, and goes with it
		case !known:
			return fmt.Errorf("%w: %s has a Unix socket that is connected to a process which is not captured with it; CRIU needs both ends: close the connection first", engine.ErrUnsupported, own)
		case own.container != other.container:
			return fmt.Errorf("%w: %s has a Unix socket that is connected to %s; CRIU captures containers one by one and needs both ends in one: connect them by TCP over loopback, "+
				"which is restored, or close the connection first", engine.ErrUnsupported, own, other)
		}
	}
	return nil
}

// socketsOf lists the inodes of the sockets that a process has open. What has been
// closed, or has ended, has none.
func socketsOf(pid int) (inodes []uint32) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue
		}
		if text, ok := strings.CutPrefix(target, "socket:["); ok {
			if inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32); err == nil {
				inodes = append(inodes, uint32(inode))
			}
		}
	}
	return inodes
}

// unixPeers lists the connected Unix sockets of a process' network namespace with
// their other ends, by inode (sock_diag(7)).
func unixPeers(pid int) (map[uint32]uint32, error) {
	ns, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: int(ns.Fd())})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	const (
		byFamily = 20 // SOCK_DIAG_BY_FAMILY
		showPeer = 4  // UDIAG_SHOW_PEER
		attrPeer = 2  // UNIX_DIAG_PEER
		header   = 16 // struct unix_diag_msg
	)
	request := []byte{unix.AF_UNIX, 0, 0, 0}
	for _, word := range []uint32{1<<32 - 1 /* all states */, 0, showPeer, 1<<32 - 1, 1<<32 - 1} {
		request = binary.NativeEndian.AppendUint32(request, word)
	}
	answers, err := conn.Execute(netlink.Message{Header: netlink.Header{Type: byFamily, Flags: netlink.Request | netlink.Dump}, Data: request})
	if err != nil {
		return nil, err
	}
	peers := map[uint32]uint32{}
	for _, m := range answers {
		if len(m.Data) < header {
			return nil, errors.New("the kernel's answer is too short")
		}
		attributes, err := netlink.NewAttributeDecoder(m.Data[header:])
		if err != nil {
			return nil, err
		}
		for attributes.Next() {
			if attributes.Type() == attrPeer {
				peers[binary.NativeEndian.Uint32(m.Data[4:])] = attributes.Uint32()
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, err
		}
	}
	return peers, nil
}
