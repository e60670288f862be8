package cow

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Restartable sequences (rseq(2)): what a thread was doing in one is to be begun anew
// when it was interrupted. The kernel sees to that when it lets the thread go on, by the
// address at which it does; of one that executes a stub first it would not notice.

const getRseqConfiguration = 0x420f // PTRACE_GET_RSEQ_CONFIGURATION

type rseqConfiguration struct {
	Pointer   uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

// fixCriticalSection are the registers that the kernel would give a thread that it
// finds in a critical section.
func fixCriticalSection(tid int, r registers) (registers, error) {
	if r.inSyscall() {
		return r, nil // system calls are not allowed in one
	}
	var c rseqConfiguration
	err := ptrace(getRseqConfiguration, tid, unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)))
	if errors.Is(err, unix.ESRCH) {
		return r, errGone
	}
	if err != nil || c.Pointer == 0 {
		return r, nil // a kernel without, or a thread without
	}
	const section = 8 // struct rseq: cpu_id_start, cpu_id, rseq_cs
	pointer, err := readAt(tid, c.Pointer+section, 1)
	if err != nil || pointer[0] == 0 {
		return r, err
	}
	cs, err := readAt(tid, pointer[0], 4) // version and flags, start_ip, post_commit_offset, abort_ip
	if err != nil {
		return r, err
	}
	if start, length, abort := cs[1], cs[2], cs[3]; r.instruction()-start < length {
		return r.at(abort), nil
	}
	return r, nil
}
