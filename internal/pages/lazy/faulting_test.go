package lazy

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// faulting is memory of this process's own that is given through a userfaultfd, as CRIU
// registers it. What waits in the kernel keeps no other goroutine from running; what
// waited in Go's own code would.
type faulting struct {
	memory  []byte
	address uint64
	fd      int
}

type uffdioRegister struct{ start, size, mode, ioctls uint64 }

const ioctlRegister = 0xc020aa00

func newFaulting(size int) (*faulting, error) {
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	api := uffdioAPI{api: uffdAPI, features: features}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return nil, errno
	}
	m := &faulting{memory: memory, address: uint64(uintptr(unsafe.Pointer(&memory[0]))), fd: int(fd)}
	register := uffdioRegister{start: m.address, size: uint64(size), mode: 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlRegister, uintptr(unsafe.Pointer(&register))); errno != 0 {
		return nil, fmt.Errorf("register: %w", errno)
	}
	return m, nil
}

// read has the kernel read a byte of it.
func (m *faulting) read(at int) byte {
	from, to, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	defer from.Close()
	defer to.Close()
	if _, err := unix.Write(int(to.Fd()), m.memory[at:at+1]); err != nil {
		panic(err)
	}
	var b [1]byte
	if _, err := from.Read(b[:]); err != nil {
		panic(err)
	}
	return b[0]
}

// all is all of it, once it is there.
func (m *faulting) all() []byte { return m.memory }
