package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// CRIU captures each container by itself, and both ends of a Unix socket only where
// one container holds both. Who holds what, the kernel tells by inode (sock_diag(7)).

// unixSocket is a Unix socket, as the kernel tells of it.
type unixSocket struct {
	peer    uint32   // the inode of the other end; 0 if there is none, or it is closed
	waiting []uint32 // inodes of those whose connections have not been accepted
	unread  bool     // what it sent has not been read
}

// holder is who has a socket open.
type holder struct {
	container string
	pid       int
}

func (h holder) String() string {
	return fmt.Sprintf("container %s, process %d (%s)", h.container, h.pid, commandOf(h.pid))
}

// inspectUnixSockets refuses what CRIU would stumble on. pids are the containers'.
func inspectUnixSockets(containers []engine.Container, pids [][]int) error {
	holders := map[uint32]holder{}
	for i, c := range containers {
		for _, pid := range pids[i] {
			fds, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
			if err != nil {
				continue // it has ended
			}
			for _, fd := range fds {
				target, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/fd/" + fd.Name())
				number, ok := strings.CutPrefix(target, "socket:[")
				if err != nil || !ok {
					continue
				}
				if inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32); err == nil {
					holders[uint32(inode)] = holder{c.Name, pid}
				}
			}
		}
	}
	if len(holders) == 0 {
		return nil
	}
	sockets, err := unixSockets(containers[0].PID)
	if err != nil {
		return fmt.Errorf("look at the Pod's Unix sockets: %w", err)
	}
	return problemOfUnixSockets(sockets, holders)
}

func problemOfUnixSockets(sockets map[uint32]unixSocket, holders map[uint32]holder) error {
	refuse := func(who holder, format string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", engine.ErrUnsupported, who, fmt.Sprintf(format, args...))
	}
	for inode, s := range sockets {
		who, held := holders[inode]
		if !held {
			continue
		}
		other, peerHeld := holders[s.peer]
		_, here := sockets[s.peer]
		switch {
		case s.peer == 0:
		case peerHeld && other.container != who.container:
			return refuse(who, "it is connected by a Unix socket to %s: CRIU captures each container by itself, and not half of such a connection; close it first", other)
		case !peerHeld && !here:
			return refuse(who, "it is connected by a Unix socket to a process outside of the Pod's network, whose end cannot be captured; close it first")
		}
		for _, client := range s.waiting {
			knocking, held := holders[client]
			switch {
			case held && knocking.container != who.container:
				return refuse(knocking, "its connection by a Unix socket to %s has not been accepted: CRIU captures each container by itself; close it first", who)
			case held && sockets[client].unread:
				return refuse(knocking, "it has written to a Unix socket whose connection has not been accepted yet by %s, which CRIU cannot capture; it passes when that accepts it", who)
			}
		}
	}
	return nil
}

// unixSockets lists the Unix sockets of the network namespace of a process.
func unixSockets(pid int) (map[uint32]unixSocket, error) {
	var sockets map[uint32]unixSocket
	err := inNamespace("/proc/"+strconv.Itoa(pid)+"/ns/net", unix.CLONE_NEWNET, func() (err error) {
		sockets, err = dumpUnixSockets()
		return err
	})
	return sockets, err
}

// Of linux/unix_diag.h and linux/sock_diag.h.
const (
	sockDiagByFamily                            = 20
	showPeer, showIncoming, showQueues          = 0x4, 0x8, 0x10
	attributePeer, attributeIcons, attributeLen = 2, 3, 4
	listening                                   = 10 // TCP_LISTEN, of every stream
)

func dumpUnixSockets() (map[uint32]unixSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, err
	}
	request := make([]byte, 16, 40) // nlmsghdr, and unix_diag_req
	order := binary.NativeEndian
	order.PutUint32(request[0:], 40)
	order.PutUint16(request[4:], sockDiagByFamily)
	order.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request = append(request, unix.AF_UNIX, 0, 0, 0)
	request = order.AppendUint32(request, ^uint32(0)) // in all states
	request = order.AppendUint32(request, 0)
	request = order.AppendUint32(request, showPeer|showIncoming|showQueues)
	request = append(request, make([]byte, 8)...)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	sockets := map[uint32]unixSocket{}
	buffer := make([]byte, 1<<17)
	for {
		n, err := unix.Read(fd, buffer)
		if err != nil {
			return nil, err
		}
		over, err := readUnixSockets(buffer[:n], sockets)
		if over || err != nil {
			return sockets, err
		}
	}
}

var errNetlink = errors.New("the kernel's answer about sockets is not understood")

// readUnixSockets reads messages of one datagram; over says that there are no more.
func readUnixSockets(data []byte, into map[uint32]unixSocket) (over bool, err error) {
	order := binary.NativeEndian
	for len(data) >= 16 {
		size, kind := order.Uint32(data), order.Uint16(data[4:])
		if size < 16 || uint64(size) > uint64(len(data)) {
			return false, errNetlink
		}
		body := data[16:size]
		data = data[min(uint64(len(data)), uint64(size+3)&^3):]
		switch kind {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errNetlink
			}
			return false, fmt.Errorf("ask the kernel about sockets: %w", unix.Errno(-int32(order.Uint32(body))))
		case sockDiagByFamily:
			if len(body) < 16 {
				return false, errNetlink
			}
			state, inode := body[2], order.Uint32(body[4:])
			var s unixSocket
			for attributes := body[16:]; len(attributes) >= 4; {
				length, name := int(order.Uint16(attributes)), order.Uint16(attributes[2:])
				if length < 4 || length > len(attributes) {
					return false, errNetlink
				}
				value := attributes[4:length]
				attributes = attributes[min(len(attributes), (length+3)&^3):]
				switch {
				case name == attributePeer && len(value) >= 4:
					s.peer = order.Uint32(value)
				case name == attributeIcons:
					for ; len(value) >= 4; value = value[4:] {
						s.waiting = append(s.waiting, order.Uint32(value))
					}
				case name == attributeLen && len(value) >= 8:
					s.unread = state != listening && order.Uint32(value[4:]) > 0
				}
			}
			into[inode] = s
		}
	}
	return false, nil
}
