package main

import (
	"crypto/rand"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const (
	sysSetup, sysEnter = 425, 426 // io_uring_setup(2), io_uring_enter(2)
	enterGetEvents     = 1
	offSQRing, offSQEs = 0, 0x10000000
)

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags, sqCPU, sqIdle, features, wqFD uint32
	reserved                                                   [3]uint32
	sq                                                         struct {
		head, tail, mask, entries, flags, dropped, array, reserved1 uint32
		user                                                        uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, reserved1 uint32
		user                                                        uint64
	}
}

// ioUring does one operation (a no-op) after the other in a ring.
func ioUring() (func() string, error) {
	var p params
	fd, _, errno := syscall.RawSyscall(sysSetup, 4, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	ring, err := syscall.Mmap(int(fd), offSQRing, int(p.cq.cqes+p.cqEntries*16), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mapping the ring: %w", err)
	}
	if _, err := syscall.Mmap(int(fd), offSQEs, int(p.sqEntries*64), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("mapping the entries: %w", err)
	}
	at := func(offset uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&ring[offset])) }
	var operations atomic.Uint64
	var wrong fault
	go func() {
		for { // entry 0 is all zeros: a no-op
			at(p.sq.tail).Add(1)
			if n, _, errno := syscall.Syscall6(sysEnter, fd, 1, 1, enterGetEvents, 0, 0); errno != 0 || n != 1 {
				wrong.say("io_uring_enter: %d, %v", n, errno)
				return
			}
			at(p.cq.head).Store(at(p.cq.tail).Load())
			operations.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	nonce := rand.Text()
	return func() string {
		if text := wrong.text.Load(); text != nil {
			return "wrong=" + *text + "\n"
		}
		return fmt.Sprintf("nonce=%s\noperations=%d\n", nonce, operations.Load())
	}, nil
}
