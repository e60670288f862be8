package lazy

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What ioctl_userfaultfd(2) and userfaultfd(2) say; x/sys has none of it. The numbers are
// those of amd64 and arm64.
const (
	uffdAPI      = 0xaa
	ioctlAPI     = 0xc018aa3f
	ioctlWake    = 0x8010aa02
	ioctlCopy    = 0xc028aa03
	ioctlZero    = 0xc020aa04
	messageBytes = 32

	eventFault  = 0x12
	eventFork   = 0x13
	eventRemap  = 0x14
	eventRemove = 0x15
	eventUnmap  = 0x16

	featureFork   = 1 << 1
	featureRemap  = 1 << 2
	featureRemove = 1 << 3
	featureUnmap  = 1 << 6
	features      = featureFork | featureRemap | featureRemove | featureUnmap
)

type uffdioAPI struct{ api, features, ioctls uint64 }

type uffdioRange struct{ start, size uint64 }

type uffdioCopy struct {
	dst, src, size, mode uint64
	copied               int64
}

type uffdioZero struct {
	start, size, mode uint64
	zeroed            int64
}

// Supported says, by its error, why this kernel cannot restore memory lazily. It asks
// for all that CRIU and the server need.
func Supported() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd(2) is not to be had: %w", errno)
	}
	defer unix.Close(int(fd))
	api := uffdioAPI{api: uffdAPI, features: features}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return fmt.Errorf("the kernel's userfaultfd does not follow fork, mremap, munmap and madvise: %w", errno)
	}
	return nil
}

// uffd is a process's userfaultfd.
type uffd struct{ file *os.File }

func (u uffd) control(call func(fd uintptr) unix.Errno) unix.Errno {
	conn, err := u.file.SyscallConn()
	if err != nil {
		return unix.EBADF
	}
	var errno unix.Errno
	if err := conn.Control(func(fd uintptr) { errno = call(fd) }); err != nil {
		return unix.EBADF
	}
	return errno
}

// copy puts data at an address, and wakes who waits for it. It returns how many bytes
// it has put there, also where it did not get to the end.
func (u uffd) copy(address uint64, data []byte) (int, unix.Errno) {
	var pin runtime.Pinner
	pin.Pin(&data[0])
	defer pin.Unpin()
	c := uffdioCopy{dst: address, src: uint64(uintptr(unsafe.Pointer(&data[0]))), size: uint64(len(data))}
	errno := u.control(func(fd uintptr) unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlCopy, uintptr(unsafe.Pointer(&c)))
		return errno
	})
	return int(max(c.copied, 0)), errno
}

// zero puts pages of zeros at an address.
func (u uffd) zero(address, size uint64) unix.Errno {
	z := uffdioZero{start: address, size: size}
	return u.control(func(fd uintptr) unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlZero, uintptr(unsafe.Pointer(&z)))
		return errno
	})
}

// wake lets go who waits for a page that is there.
func (u uffd) wake(address uint64) {
	r := uffdioRange{address, pageSize}
	u.control(func(fd uintptr) unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlWake, uintptr(unsafe.Pointer(&r)))
		return errno
	})
}

// message is what the kernel says about an address space.
type message struct {
	event   uint8
	a, b, c uint64 // fault: -, address; fork: fd; remap: from, to, size; remove, unmap: start, end
}

// decodeMessage decodes struct uffd_msg.
func decodeMessage(b *[messageBytes]byte) message {
	order := binary.NativeEndian
	m := message{event: b[0], a: order.Uint64(b[8:]), b: order.Uint64(b[16:]), c: order.Uint64(b[24:])}
	if m.event == eventFork {
		m.a = uint64(order.Uint32(b[8:]))
	}
	return m
}
