package criu

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// This file knows which kernel objects CRIU cannot capture; docs/kernel-objects.md
// lists them for users, and test/e2e checks both.

// ghostLimit is the size up to which CRIU keeps a file that has no name any more
// (ghost-limit, in the configuration that comes with our CRIU).
const ghostLimit = 2 << 30

const mqueueMagic = 0x19800202 // of the file system of POSIX message queues (linux/magic.h)

// capturedAnonymous are the kinds of descriptors without a file that CRIU knows. The
// kernel writes some in brackets.
var capturedAnonymous = []string{"eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd", "bpf-map"}

// uncaptured are the protocols of sockets, as the kernel calls them, that CRIU does
// not know, and what to do about them.
var uncaptured = map[string]string{
	"PING": "ICMP echo", "PINGv6": "ICMP echo", "SCTP": "SCTP", "SCTPv6": "SCTP", "AF_VSOCK": "vsock",
	"ALG": "crypto API (AF_ALG)", "XDP": "AF_XDP", "SMC": "SMC", "SMC6": "SMC", "TIPC": "TIPC", "RDS": "RDS",
}

// devices are the character devices that CRIU opens again. Terminals are others.
var devices = map[uint64]bool{
	unix.Mkdev(1, 3): true, unix.Mkdev(1, 5): true, unix.Mkdev(1, 7): true, unix.Mkdev(1, 8): true, unix.Mkdev(1, 9): true, // null, zero, full, random, urandom
	unix.Mkdev(5, 0): true, unix.Mkdev(5, 1): true, unix.Mkdev(5, 2): true, unix.Mkdev(10, 200): true, // tty, console, ptmx, net/tun
}

// problemOfFD says what is wrong with a descriptor; nothing if it is closed since.
func problemOfFD(proc, fd string) string {
	file := filepath.Join(proc, "fd", fd)
	target, err := os.Readlink(file)
	if err != nil {
		return ""
	}
	which := " (file descriptor " + fd + ")"
	switch kind, ok := strings.CutPrefix(target, "anon_inode:"); {
	case ok && kind == "[eventfd]" && infoOf(proc, fd, "eventfd-semaphore:") == "1":
		return "it has an eventfd that is a semaphore (EFD_SEMAPHORE)" + which + ", which CRIU would restore as one that is none"
	case ok:
		return problemOfAnonymous(strings.Trim(kind, "[]"), which)
	case strings.HasPrefix(target, "socket:"):
		switch protocol := protocolOf(file); {
		case strings.HasPrefix(protocol, "MPTCP"):
			return "it has a multipath TCP socket" + which + ", which CRIU cannot capture: turn it off in the application; " +
				"for one written in Go, set GODEBUG=multipathtcp=0"
		case uncaptured[protocol] != "":
			return "it has a socket of " + uncaptured[protocol] + which + ", which CRIU cannot capture: close it first"
		}
		return ""
	case strings.HasPrefix(target, "pipe:"):
		if flags, err := strconv.ParseUint(infoOf(proc, fd, "flags:"), 8, 64); err == nil && flags&unix.O_DIRECT != 0 {
			return "it has a pipe of packets (O_DIRECT)" + which + ", which CRIU cannot capture"
		}
		return ""
	case !strings.HasPrefix(target, "/"):
		return ""
	}
	return problemOfFile(file, target, which)
}

func problemOfAnonymous(kind, which string) string {
	if kind == "io_uring" {
		return "it uses io_uring" + which + ", which CRIU cannot capture: turn it off in the application"
	}
	if !slices.Contains(capturedAnonymous, kind) {
		return "it has a " + kind + " open" + which + ", which CRIU cannot capture: close it first"
	}
	return ""
}

func problemOfFile(file, target, which string) string {
	if problem := problemOfPath(target); problem != "" {
		return "it has " + target + " open" + which + ", which " + problem
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(file, &fs); err == nil && fs.Type == mqueueMagic {
		return "it has the POSIX message queue " + target + " open" + which + ", which CRIU cannot capture: close it first"
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return ""
	}
	name, deleted := strings.CutSuffix(target, " (deleted)")
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && !devices[st.Rdev] && !isPTY(st.Rdev):
		return fmt.Sprintf("it has the device %s open%s (character device %d:%d), whose state CRIU cannot capture: close it first",
			target, which, unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case st.Mode&unix.S_IFMT == unix.S_IFBLK:
		return fmt.Sprintf("it has the block device %s open%s, which CRIU cannot capture: close it first", target, which)
	case !deleted || st.Mode&unix.S_IFMT != unix.S_IFREG:
		return ""
	case st.Nlink > 0:
		return "it has " + name + " open" + which + ", a name that was deleted of a file that has another name (hard link): CRIU cannot find it again; delete that one too, or close the file"
	case st.Size > ghostLimit:
		return fmt.Sprintf("it has %s open%s, which is deleted and of %d bytes: more than the %d that are kept with the processes", name, which, st.Size, int64(ghostLimit))
	}
	return ""
}

// problemOfQueues says what is wrong with a directory of POSIX message queues
// (mq_overview(7)): whoever has one open is refused by itself, and one that nobody has
// would be lost in silence.
func problemOfQueues(dir string) string {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != mqueueMagic {
		return ""
	}
	queues, err := os.ReadDir(dir)
	if err != nil || len(queues) == 0 {
		return ""
	}
	return "there is the POSIX message queue /" + queues[0].Name() + ", which CRIU cannot capture: remove it first (mq_unlink(3))"
}

// isPTY says whether a device is a pseudo-terminal, or a virtual terminal.
func isPTY(dev uint64) bool {
	major := unix.Major(dev)
	return major == 4 || major >= 128 && major <= 143
}

// ofThisPod is a directory of a ConfigMap, Secret, projected or downward API volume,
// which the kubelet names after the time when it wrote it.
var ofThisPod = regexp.MustCompile(`/\.\.[0-9]{4}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}\.[0-9]+(/|$)`)

// problemOfPath says why a restored Pod has no such file. What such a volume holds now
// it has, under another name, and finds it.
func problemOfPath(path string) string {
	if ofThisPod.MatchString(path) && strings.HasSuffix(path, " (deleted)") {
		return "is of an earlier state of a ConfigMap, Secret or projected volume: the restored Pod has none but the newest; open it again"
	}
	return ""
}

// infoOf reads a line about a descriptor (proc_pid_fdinfo(5)); empty if there is none.
func infoOf(proc, fd, name string) string {
	data, err := os.ReadFile(filepath.Join(proc, "fdinfo", fd))
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(data) {
		if value, ok := bytes.CutPrefix(line, []byte(name)); ok {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

// protocolOf names a socket's protocol as the kernel calls it, such as "TCP"; empty
// where it does not say.
func protocolOf(fd string) string {
	var name [32]byte
	n, err := unix.Getxattr(fd, "system.sockprotoname", name[:])
	if err != nil {
		return ""
	}
	return unix.ByteSliceToString(name[:n])
}

// problemOfNamespaces finds namespaces that CRIU does not make anew: of users, and
// of processes below the container's own.
func problemOfNamespaces(proc string) string {
	const whose = "which CRIU cannot capture"
	if own, err := os.Readlink(proc + "/ns/user"); err == nil {
		if node, err := os.Readlink("/proc/1/ns/user"); err == nil && own != node {
			return "it is in a user namespace (" + own + ", the node's is " + node + "; hostUsers: false, or made by the application), " + whose
		}
	}
	own, err := os.Readlink(proc + "/ns/pid")
	children, childErr := os.Readlink(proc + "/ns/pid_for_children")
	if err == nil && childErr == nil && own != children {
		return "it starts processes in a PID namespace of their own, " + whose
	}
	return ""
}

// problemOfMappings finds what a process has in memory though it may have closed it.
func problemOfMappings(proc string) (string, error) {
	data, err := os.ReadFile(proc + "/maps")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		i := strings.Index(line, " anon_inode:")
		if i >= 0 {
			if problem := problemOfAnonymous(strings.Trim(strings.TrimSpace(line[i+len(" anon_inode:"):]), "[]"), " (mapped)"); problem != "" {
				return problem, nil
			}
			continue
		}
		if i = strings.IndexByte(line, '/'); i < 0 {
			continue
		}
		if path := strings.TrimSuffix(line[i:], "\n"); problemOfPath(path) != "" {
			return "it has " + path + " mapped, which " + problemOfPath(path), nil
		}
	}
	return "", nil
}
