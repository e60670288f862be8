package contents

import (
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
)

// kindName is the API's name of a type of file.
func kindName(t fdinfo.FdTypes) string {
	switch t {
	case fdinfo.FdTypes_REG:
		return "regular"
	case fdinfo.FdTypes_INETSK, fdinfo.FdTypes_UNIXSK, fdinfo.FdTypes_PACKETSK, fdinfo.FdTypes_NETLINKSK:
		return "socket"
	case fdinfo.FdTypes_NS:
		return "namespace"
	case fdinfo.FdTypes_TUNF:
		return "tun"
	case fdinfo.FdTypes_EXT:
		return "external"
	case fdinfo.FdTypes_BPFMAP:
		return "bpf map"
	}
	if name, known := fdinfo.FdTypes_name[int32(t)]; known {
		return strings.ToLower(name) // pipe, fifo, eventfd, eventpoll, inotify, signalfd, tty, fanotify, timerfd, memfd, pidfd
	}
	return fmt.Sprintf("type %d", t)
}

// describe says what a file is.
func (t *fileTable) describe(e *fdinfo.FileEntry) *file {
	f := &file{kind: kindName(e.GetType())}
	switch e.GetType() {
	case fdinfo.FdTypes_REG:
		t.regular(f, e.GetReg())
	case fdinfo.FdTypes_PIPE:
		f.path, f.flags = fmt.Sprintf("pipe:[%d]", e.GetPipe().GetPipeId()), e.GetPipe().GetFlags()
	case fdinfo.FdTypes_FIFO:
		f.path = t.path(uint64(e.GetFifo().GetRegfId()))
	case fdinfo.FdTypes_TTY:
		f.path, f.flags = t.path(uint64(e.GetTty().GetRegfId())), e.GetTty().GetFlags()
	case fdinfo.FdTypes_MEMFD:
		f.memfd, f.flags, f.position = e.GetMemfd().GetInodeId(), e.GetMemfd().GetFlags(), int64(e.GetMemfd().GetPos())
		f.path = "memfd:" + t.clean(t.memfds[f.memfd].GetName())
	case fdinfo.FdTypes_EVENTFD:
		f.path, f.flags = fmt.Sprintf("count %d", e.GetEfd().GetCounter()), e.GetEfd().GetFlags()
	case fdinfo.FdTypes_EVENTPOLL:
		f.path, f.flags = fmt.Sprintf("watches %d", len(e.GetEpfd().GetTfd())), e.GetEpfd().GetFlags()
	case fdinfo.FdTypes_INOTIFY:
		f.path, f.flags = fmt.Sprintf("watches %d", len(e.GetIfy().GetWd())), e.GetIfy().GetFlags()
	case fdinfo.FdTypes_FANOTIFY:
		f.path, f.flags = fmt.Sprintf("watches %d", len(e.GetFfy().GetMark())), e.GetFfy().GetFlags()
	case fdinfo.FdTypes_SIGNALFD:
		f.path, f.flags = fmt.Sprintf("signals %x", e.GetSgfd().GetSigmask()), e.GetSgfd().GetFlags()
	case fdinfo.FdTypes_PIDFD:
		f.path = fmt.Sprintf("process %d", e.GetPidfd().GetNspid())
	case fdinfo.FdTypes_TIMERFD:
		f.flags = e.GetTfd().GetFlags()
		f.path = timer(e.GetTfd().GetVsec(), e.GetTfd().GetVnsec())
	case fdinfo.FdTypes_INETSK:
		f.flags = e.GetIsk().GetFlags()
		t.inet(f, e.GetIsk())
	case fdinfo.FdTypes_UNIXSK:
		f.flags = e.GetUsk().GetFlags()
		t.unix(f, e.GetUsk())
	case fdinfo.FdTypes_NETLINKSK:
		f.flags = e.GetNlsk().GetFlags()
		t.netlink(f, e.GetNlsk())
	case fdinfo.FdTypes_PACKETSK:
		f.flags = e.GetPsk().GetFlags()
		t.packet(f, e.GetPsk())
	}
	return f
}

func timer(sec, nsec uint64) string {
	const century = 100 * 365 * 24 * 3600
	switch {
	case sec > century || nsec >= 1e9:
		return "runs"
	case sec == 0 && nsec == 0:
		return "is not set"
	}
	return "runs out in " + (time.Duration(sec)*time.Second + time.Duration(nsec)).Round(time.Second).String()
}

// Types of a file in its mode.
const (
	modeType  = 0o170000
	modeDir   = 0o040000
	modeChar  = 0o020000
	modeBlock = 0o060000
	modeFIFO  = 0o010000
)

func (t *fileTable) regular(f *file, e *regfile.RegFileEntry) {
	f.path, f.flags = t.clean(absolute(e.GetName())), e.GetFlags()
	switch e.GetMode() & modeType {
	case modeDir:
		f.kind = "directory"
	case modeChar:
		f.kind = "character device"
	case modeBlock:
		f.kind = "block device"
	case modeFIFO:
		f.kind = "fifo"
	default:
		f.position = int64(e.GetPos())
	}
}

// absolute gives a path the form that the container knows it in.
func absolute(name string) string {
	if name == "" {
		return ""
	}
	return path.Clean("/" + name)
}

// flagNames are the flags of open(2) that matter and have one number everywhere, and
// whether a new program inherits the descriptor.
func flagNames(f *file, fdFlags uint32) string {
	const (
		append_  = 0o2000
		nonblock = 0o4000
		sync     = 0o4010000
		pathOnly = 0o10000000
	)
	var names []string
	switch f.kind {
	case "regular", "directory", "character device", "block device", "pipe", "fifo", "tty", "memfd":
		names = append(names, []string{"O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE"}[f.flags&3])
	}
	for _, flag := range []struct {
		bits uint32
		name string
	}{{append_, "O_APPEND"}, {nonblock, "O_NONBLOCK"}, {sync, "O_SYNC"}, {pathOnly, "O_PATH"}} {
		if f.flags&flag.bits == flag.bits {
			names = append(names, flag.name)
		}
	}
	if fdFlags&1 != 0 {
		names = append(names, "O_CLOEXEC")
	}
	return strings.Join(names, "|")
}
