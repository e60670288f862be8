package cow

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// supported says whether this architecture's registers are known.
const supported = true

// registers are those of a thread that stands still.
type registers struct{ unix.PtraceRegs }

func getRegisters(tid int) (r registers, err error) {
	err = unix.PtraceGetRegs(tid, &r.PtraceRegs)
	return r, err
}

func setRegisters(tid int, r registers) error { return unix.PtraceSetRegs(tid, &r.PtraceRegs) }

func (r registers) stack() uint64       { return r.Rsp }
func (r registers) instruction() uint64 { return r.Rip }
func (r registers) result() int64       { return int64(r.Rax) }

// inSyscall says whether the thread was in a system call.
func (r registers) inSyscall() bool { return int64(r.Orig_rax) >= 0 }

// harmless is a system call that nobody is refused, and that never returns 0.
const harmless = unix.SYS_GETPID

// instead are the registers at the entry of a system call that make it another.
func (r registers) instead(nr uint64) registers {
	r.Orig_rax = nr
	return r
}

// atEntry says whether it stands at the entry of one.
func (r registers) atEntry(nr uint64) bool {
	return r.Orig_rax == nr && int64(r.Rax) == -int64(unix.ENOSYS)
}

// calling are the registers of a thread that is about to execute a stub at an address. The
// system call is a harmless one: at its entry, with the tracer there, it becomes another. A
// thread that is let go before must not make one that its filter (seccomp(2)) forbids.
func (r registers) calling(at uint64, args [5]uint64) registers {
	r.Rip, r.Rax = at, harmless
	r.Orig_rax = ^uint64(0) // it is not a system call that would be restarted
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8 = args[0], args[1], args[2], args[3], args[4]
	return r
}

func (r registers) at(instruction uint64) registers {
	r.Rip = instruction
	return r
}

// Numbers of the kernel's own (include/linux/errno.h): a system call that was
// interrupted is to be executed again.
const (
	restartSys     = -512
	restartNoInter = -513
	restartNoHand  = -514
	restartBlock   = -516
)

// resumed are the registers with which the kernel would let a thread go on that was in
// a system call, and has no signal to handle.
func (r registers) resumed() registers {
	if !r.inSyscall() {
		return r
	}
	switch r.result() {
	case restartSys, restartNoInter, restartNoHand:
		r.Rax = r.Orig_rax
		r.Rip -= 2
	case restartBlock:
		r.Rax = unix.SYS_RESTART_SYSCALL
		r.Rip -= 2
	}
	return r
}

// stubSize is how many bytes a stub takes, at most.
const stubSize = 160

// stub is what a thread executes for us: one system call, after which it gives itself
// the registers that it had. With a tracer it does not come to that: it is stopped
// when the system call returns. It is what a thread does that is let go on the way,
// because the tracer was killed.
//
// A child, for which the call returns 0, ends. The flags are left as they are, and
// nothing is written to memory: below the stack pointer may be what others use.
func stub(r registers, forks bool) []byte {
	r = r.resumed()
	code := []byte{0x0f, 0x05} // syscall
	if forks {
		child := []byte{
			0x31, 0xff, // xor %edi,%edi
			0xb8, unix.SYS_EXIT_GROUP, 0, 0, 0, // mov $exit_group,%eax
			0x0f, 0x05, // syscall
			0xb8, unix.SYS_EXIT, 0, 0, 0, // mov $exit,%eax
			0x0f, 0x05, // syscall
			0x0f, 0x0b, // ud2
		}
		code = append(code,
			0x48, 0x89, 0xc1, // mov %rax,%rcx
			0xe3, 0x02, // jrcxz over the next
			0xeb, byte(len(child))) // jmp over the child's
		code = append(code, child...)
	}
	for _, load := range []struct {
		opcode [2]byte // movabs $value,register
		value  uint64
	}{
		{[2]byte{0x48, 0xb8}, r.Rax},
		{[2]byte{0x48, 0xbf}, r.Rdi},
		{[2]byte{0x48, 0xbe}, r.Rsi},
		{[2]byte{0x48, 0xba}, r.Rdx},
		{[2]byte{0x49, 0xba}, r.R10},
		{[2]byte{0x49, 0xb8}, r.R8},
		{[2]byte{0x48, 0xb9}, r.Rcx},
		{[2]byte{0x49, 0xbb}, r.R11},
	} {
		code = append(code, load.opcode[:]...)
		code = binary.LittleEndian.AppendUint64(code, load.value)
	}
	code = append(code, 0xff, 0x25, 0, 0, 0, 0) // jmp *0(%rip)
	return binary.LittleEndian.AppendUint64(code, r.Rip)
}
