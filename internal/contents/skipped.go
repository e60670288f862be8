package contents

import (
	"slices"
	"strings"
)

// sayWhatIsSkipped notes the images of kinds that are not known. Those that are known
// and not shown (control groups, signals, timers, queues of pipes and sockets, settings
// of namespaces) are what restoring needs; docs/contents.md lists them.
func (p *processes) sayWhatIsSkipped() {
	var unknown []string
	for name := range p.names {
		if !known(name) {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	const most = 8
	for i, name := range unknown {
		if i == most {
			p.notes.add("and %d more images of unknown kinds", len(unknown)-most)
			break
		}
		p.notes.add("skipped an image of an unknown kind: %s", name)
	}
}

func known(name string) bool {
	switch name {
	case "descriptors.json", "stats-dump", "dump.log":
		return true
	}
	base, image := strings.CutSuffix(name, ".img")
	if !image {
		return false
	}
	base = strings.TrimSuffix(base, ".tar.gz")
	if is := strings.Fields(kinds); !slices.Contains(is, base) {
		i := strings.LastIndexByte(base, '-')
		return i > 0 && strings.Trim(base[i+1:], "0123456789abcdef") == "" && slices.Contains(is, base[:i])
	}
	return true
}

// kinds of images that CRIU writes; the first line is read.
const kinds = `pstree core ids mm pagemap pagemap-shmem pages fdinfo files fs mountpoints memfd remap-fpath
	apparmor autofs binfmt-misc bpfmap-data bpfmap-file cgroup cpuinfo creds eventfd eventpoll fanotify fifo fifo-data
	filelocks ghost-file ifaddr ifaddr4 ifaddr6 inetsk inotify inventory ip6tables ipcns-msg ipcns-sem ipcns-shm ipcns-var iptables
	itimers netdev netlinksk netns nftables nft ns-files packetsk pidns pipes pipes-data posix-timers reg-files
	route route6 rule seccomp sigacts signal-p signal-s signalfd sk-queues stats tcp-stream timens timerfd tmpfs-dev
	tty tty-data tty-info tunfile unixsk userns utsns`
