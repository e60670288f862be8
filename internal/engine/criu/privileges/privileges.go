// Package privileges compares what CRIU's images give to processes with what the
// container that they are restored into may have. CRIU restores credentials,
// capabilities and seccomp as its images say, so images that were altered, or that come
// from elsewhere, would give a container more than its Pod was admitted with.
//
// What the images say is read as strictly as can be: whatever could be understood in
// two ways is refused.
package privileges

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"podstasis.dev/stasis/internal/nodeapi"
)

// ErrExceeded says that the images give a process more than its container may have.
var ErrExceeded = errors.New("the checkpoint's images give a process more than the container may have")

// Check reads the images in dir and compares every process and thread in them.
func Check(ctx context.Context, dir fs.FS, allowed *nodeapi.Privileges) error {
	if allowed == nil {
		return errors.New("stasis-runtime did not say what the container may have: it is older than the agent; run stasis-agent install on this node")
	}
	r := &reader{ctx: ctx, dir: dir, left: maxImages}
	tasks, err := r.tree()
	if err != nil {
		return err
	}
	if err := checkNamespaces(r, tasks[0], allowed); err != nil {
		return err
	}
	for _, t := range tasks {
		if err := r.checkTask(t, allowed); err != nil {
			return err
		}
	}
	return nil
}

// checkTask compares a process and its threads. One that has ended is restored as
// that and runs nothing; its list of threads holds anything.
func (r *reader) checkTask(t task, allowed *nodeapi.Privileges) error {
	leader, err := r.core(t.pid)
	if err != nil || leader.dead {
		return err
	}
	if err := leader.check(allowed); err != nil {
		return fmt.Errorf("%w: process %d (%s) %w", ErrExceeded, t.pid, leader.command, err)
	}
	for _, id := range t.threads {
		if id == t.pid {
			continue
		}
		thread, err := r.core(id)
		if err != nil {
			return err
		}
		if thread.dead {
			return fmt.Errorf("%w: thread %d of process %d has ended, and its process has not", errImage, id, t.pid)
		}
		if thread.seccomp == 0 && leader.seccomp == seccompFilter {
			shared, err := r.sharedFilters(leader)
			if err != nil {
				return err
			}
			if shared {
				thread.seccomp = leader.seccomp
			}
		}
		if err := thread.check(allowed); err != nil {
			return fmt.Errorf("%w: thread %d of process %d %w", ErrExceeded, id, t.pid, err)
		}
	}
	return nil
}

const seccompFilter = 2 // SECCOMP_MODE_FILTER

// check compares one thread with its container.
func (c *core) check(allowed *nodeapi.Privileges) error {
	if err := c.creds.checkIDs(allowed); err != nil {
		return err
	}
	if err := c.creds.checkCapabilities(allowed); err != nil {
		return err
	}
	if allowed.NoNewPrivileges && !c.creds.noNewPrivs {
		return errors.New("may gain privileges (no_new_privs is 0), the container's configuration says noNewPrivileges")
	}
	if allowed.Seccomp && c.seccomp != seccompFilter {
		return fmt.Errorf("has seccomp mode %d, the container's configuration has a seccomp filter (mode %d)", c.seccomp, seccompFilter)
	}
	if want := allowed.AppArmorProfile; want != "" && c.creds.profile != want {
		return fmt.Errorf("has the AppArmor profile %.80q, the container's configuration %q", c.creds.profile, want)
	}
	return nil
}

// checkIDs keeps root out of a container that is not root's. Other users differ only
// in which of the container's own files they own.
func (c *creds) checkIDs(allowed *nodeapi.Privileges) error {
	for _, id := range []struct {
		name  string
		value uint32
	}{{"uid", c.uid}, {"euid", c.euid}, {"suid", c.suid}, {"fsuid", c.fsuid}} {
		if id.value == 0 && allowed.UID != 0 {
			return fmt.Errorf("has %s 0, the container's configuration has user %d", id.name, allowed.UID)
		}
	}
	root := allowed.GID == 0 || allowed.UID == 0 || slices.Contains(allowed.Groups, 0)
	for _, id := range append([]uint32{c.gid, c.egid, c.sgid, c.fsgid}, c.groups...) {
		if id == 0 && !root {
			return fmt.Errorf("is in group 0, the container's configuration has group %d and %v", allowed.GID, allowed.Groups)
		}
	}
	return nil
}

func (c *creds) checkCapabilities(allowed *nodeapi.Privileges) error {
	bounding, err := parse(allowed.Capabilities.Bounding)
	if err != nil {
		return err
	}
	permitted, err := parse(allowed.Capabilities.Permitted)
	if err != nil {
		return err
	}
	// Who runs a set-user-ID program gets up to the bounding set, unless that is off.
	most := bounding
	if allowed.NoNewPrivileges {
		most = permitted
	}
	for _, set := range []struct {
		name       string
		has, limit capabilities
	}{
		{"bounding", c.bounding, bounding}, {"permitted", c.permitted, most}, {"effective", c.effective, most},
		{"inheritable", c.inheritable, bounding}, {"ambient", c.ambient, most},
	} {
		if more := set.has &^ set.limit; more != 0 {
			return fmt.Errorf("has %s in its %s capabilities, the container's configuration allows %s", more, set.name, set.limit)
		}
	}
	return nil
}

// namespaces are those that CRIU makes, or joins, for the tree of processes where
// the images say that they are not those of whoever dumped it.
var namespaces = []struct {
	kind  string // in an OCI spec
	field int
}{
	{"pid", 5}, {"network", 6}, {"ipc", 7}, {"uts", 8}, {"mount", 9}, {"user", 10},
}

// checkNamespaces makes sure that the tree is not restored in the node's own
// namespaces, where the container has others.
func checkNamespaces(r *reader, root task, allowed *nodeapi.Privileges) error {
	node, err := r.inventory()
	if err != nil {
		return err
	}
	all, err := r.rootIDs(root.pid)
	if err != nil {
		return err
	}
	for _, ids := range all {
		for _, ns := range namespaces {
			own, node := ids[ns.field], node[ns.field]
			want := slices.Contains(allowed.Namespaces, ns.kind)
			switch {
			case want && own == node:
				return fmt.Errorf("%w: process %d is in the %s namespace of the node (%d), the container's configuration has one of its own", ErrExceeded, root.pid, ns.kind, node)
			case !want && ns.kind == "user" && own != node:
				return fmt.Errorf("%w: process %d has a user namespace of its own (%d), the container's configuration has that of the node (%d)", ErrExceeded, root.pid, own, node)
			}
		}
	}
	return nil
}

// capabilities is a set, a bit each.
type capabilities uint64

// capabilityNames in the order of their numbers (capabilities(7)).
var capabilityNames = [...]string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
	"SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
	"AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
	"PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

func parse(names []string) (set capabilities, err error) {
	for _, name := range names {
		i := slices.Index(capabilityNames[:], strings.TrimPrefix(name, "CAP_"))
		if i < 0 {
			return 0, fmt.Errorf("the container's configuration has the unknown capability %.80q", name)
		}
		set |= 1 << i
	}
	return set, nil
}

func (s capabilities) String() string {
	if s == 0 {
		return "none"
	}
	var names []string
	for i := range 64 {
		switch {
		case s&(1<<i) == 0:
		case i < len(capabilityNames):
			names = append(names, "CAP_"+capabilityNames[i])
		default:
			names = append(names, strconv.Itoa(i))
		}
	}
	return strings.Join(names, ", ")
}
