package criu

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/engine"
)

const (
	// lingering is how long a process has to be there that is no descendant of init to
	// be told of: exec probes come and go.
	lingering = 1500 * time.Millisecond
	// maxProblems bounds what is told of.
	maxProblems = 64
	// maxConnections bounds the table that is read; where a Pod has the node's network
	// it is the node's.
	maxConnections = 1 << 20
)

// Examine implements engine.Engine.
func (e *Engine) Examine(ctx context.Context, s engine.Sandbox) (engine.Examination, error) {
	var x engine.Examination
	pids, err := treesOf(s.Containers)
	if err != nil {
		return x, err
	}
	for i, c := range s.Containers {
		found, err := problemsOf(c, pids[i])
		if err != nil {
			return x, err
		}
		x.Problems = append(x.Problems, found...)
		if _, err := overlayUpper(c.PID); err != nil {
			x.Problems = append(x.Problems, plain(fmt.Errorf("container %s: %w", c.Name, err)))
		}
		outside, err := connectionsOut(c, pids[i], s.IPs)
		if err != nil {
			return x, fmt.Errorf("container %s: look at its TCP connections: %w", c.Name, err)
		}
		x.Outside = append(x.Outside, outside...)
	}
	strangers, err := lingerers(ctx, s.Containers)
	if err != nil {
		return x, err
	}
	for _, found := range strangers {
		x.Problems = append(x.Problems, fmt.Sprintf("%s is no descendant of its container's first process, as an exec session is not, and cannot be captured: end it first", found))
	}
	x.Problems = x.Problems[:min(len(x.Problems), maxProblems)]
	return x, nil
}

// problemsOf is inspect for all processes of a container, where a checkpoint stops at
// the first that cannot be captured.
func problemsOf(c engine.Container, pids []int) (found []string, err error) {
	for _, pid := range pids {
		err := inspect(c, []int{pid})
		if err != nil && !errors.Is(err, engine.ErrUnsupported) {
			return nil, err
		}
		if err != nil && !slices.Contains(found, plain(err)) {
			found = append(found, plain(err))
		}
	}
	return found, nil
}

// plain is an error without the words that all problems begin with.
func plain(err error) string {
	return strings.ReplaceAll(err.Error(), engine.ErrUnsupported.Error()+": ", "")
}

// lingerers are the strays that stay for a while.
func lingerers(ctx context.Context, containers []engine.Container) ([]stray, error) {
	found, err := strays(containers)
	for began := time.Now(); err == nil && len(found) > 0 && time.Since(began) < lingering; {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(lingering / 5):
		}
		var now []stray
		now, err = strays(containers)
		found = slices.DeleteFunc(found, func(s stray) bool {
			return !slices.ContainsFunc(now, func(n stray) bool { return n.pid == s.pid })
		})
	}
	return found, err
}

// connectionsOut lists the established TCP connections of a container's processes to
// what is neither on a loopback address nor on one of the sandbox's.
func connectionsOut(c engine.Container, pids []int, own []string) ([]engine.Connection, error) {
	inodes, err := socketsOf(pids)
	if err != nil {
		return nil, err
	}
	var outside []engine.Connection
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open(filepath.Join("/proc", strconv.Itoa(c.PID), "net", table))
		if ended(err) {
			continue // or the kernel has no IPv6
		} else if err != nil {
			return nil, err
		}
		all, err := established(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			if inodes[s.inode] && !s.remote.Addr().IsLoopback() && !slices.Contains(own, s.remote.Addr().String()) {
				outside = append(outside, engine.Connection{Container: c.Name, Local: s.local.String(), Remote: s.remote.String()})
			}
		}
	}
	return outside, nil
}

// socketsOf are the inodes of all sockets that processes have open.
func socketsOf(pids []int) (map[string]bool, error) {
	inodes := map[string]bool{}
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
		fds, err := os.ReadDir(dir)
		if err := unlessEnded(err); err != nil {
			return nil, err
		}
		for _, fd := range fds {
			target, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if inode, socket := strings.CutPrefix(target, "socket:["); err == nil && socket {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	return inodes, nil
}

// tcpSocket is a row of /proc/PID/net/tcp (proc_pid_net(5)).
type tcpSocket struct {
	local, remote netip.AddrPort
	inode         string
}

const stateEstablished = "01"

// established reads the established connections of a table.
func established(table io.Reader) (found []tcpSocket, err error) {
	lines := bufio.NewScanner(table)
	lines.Scan() // the head
	for n := 0; lines.Scan() && n < maxConnections; n++ {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != stateEstablished {
			continue
		}
		s := tcpSocket{inode: fields[9]}
		if s.local, err = parseAddress(fields[1]); err != nil {
			return nil, err
		}
		if s.remote, err = parseAddress(fields[2]); err != nil {
			return nil, err
		}
		found = append(found, s)
	}
	return found, lines.Err()
}

// parseAddress reads an address as the kernel prints it: words of the machine's order.
func parseAddress(s string) (netip.AddrPort, error) {
	text, portText, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(text)
	port, portErr := strconv.ParseUint(portText, 16, 16)
	if !ok || err != nil || portErr != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address of a socket", s)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	address, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(address.Unmap(), uint16(port)), nil
}
