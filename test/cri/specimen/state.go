package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// openFiles opens files in ways that can be told apart.
func openFiles() error {
	if err := os.MkdirAll("/data", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/data/queue", []byte("a queue"), 0o644); err != nil {
		return err
	}
	log, err := os.OpenFile("/data/orders.log", os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	if _, err := log.WriteString("twelve bytes"); err != nil {
		return err
	}
	keep(log)
	gone, err := os.Create("/data/deleted")
	if err != nil {
		return err
	}
	keep(gone)
	dir, err := os.Open("/data")
	if err != nil {
		return err
	}
	keep(dir)
	return os.Remove("/data/deleted")
}

// openSockets listens, connects to itself, and holds sockets of every family.
func openSockets() error {
	l, err := net.Listen("tcp4", "0.0.0.0:8080")
	if err != nil {
		return err
	}
	near, err := net.Dial("tcp4", "127.0.0.1:8080")
	if err != nil {
		return err
	}
	far, err := l.Accept()
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp4", "127.0.0.1:5353")
	if err != nil {
		return err
	}
	unixListener, err := net.Listen("unix", "/data/control.sock")
	if err != nil {
		return err
	}
	abstract, err := net.Listen("unix", "@specimen")
	if err != nil {
		return err
	}
	netlink, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	keep([]any{l, near, far, udp, unixListener, abstract, netlink})
	return nil
}

// openDescriptors holds descriptors that are no files.
func openDescriptors() error {
	if _, err := unix.Eventfd(7, unix.EFD_CLOEXEC); err != nil {
		return err
	}
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return err
	}
	day := unix.NsecToTimespec(int64(24 * time.Hour))
	if err := unix.TimerfdSettime(timer, 0, &unix.ItimerSpec{Value: day}, nil); err != nil {
		return err
	}
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	if _, err := unix.InotifyAddWatch(watch, "/shared", unix.IN_CREATE); err != nil {
		return err
	}
	var pipe [2]int
	return unix.Pipe2(pipe[:], unix.O_CLOEXEC)
}

// apart maps memory that the kernel does not make one mapping with what lies beside it.
func apart(size int) ([]byte, error) {
	page := os.Getpagesize()
	all, err := unix.Mmap(-1, 0, size+2*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	own := all[page : page+size]
	return own, unix.Mprotect(own, unix.PROT_READ|unix.PROT_WRITE)
}

// fillMemory has 8 MiB of its own and maps a file.
func fillMemory() error {
	own, err := apart(8 << 20)
	if err != nil {
		return fmt.Errorf("map 8 MiB: %w", err)
	}
	fill(own, 0x5a)
	f, err := os.OpenFile("/data/table", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := f.Truncate(1 << 20); err != nil {
		return err
	}
	table, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map /data/table: %w", err)
	}
	table[0] = 1
	keep([][]byte{own, table})
	return nil
}

// sharedMemory makes 2 MiB that several processes map.
func sharedMemory() (*os.File, error) {
	fd, err := unix.MemfdCreate("orders", 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(fd, 2<<20); err != nil {
		return nil, err
	}
	mapped, err := mapShared(fd)
	if err != nil {
		return nil, err
	}
	fill(mapped, 0xa5)
	return os.NewFile(uintptr(fd), "orders"), nil
}

func mapShared(fd int) ([]byte, error) {
	mapped, err := unix.Mmap(fd, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map shared memory: %w", err)
	}
	return mapped, nil
}

func fill(b []byte, v byte) {
	for i := range b {
		b[i] = v
	}
}

// changeRoot changes the file system of the image: a file more, one less, a
// directory made anew.
func changeRoot() error {
	if err := errors.Join(os.Remove("/etc/group"), os.RemoveAll("/usr/bin"), os.Mkdir("/usr/bin", 0o755)); err != nil {
		return err
	}
	return errors.Join(
		os.MkdirAll("/etc", 0o755),
		os.WriteFile("/etc/written", []byte("written\n"), 0o600),
		os.WriteFile("/usr/bin/env", []byte("new"), 0o755))
}

// changeAll changes some of everything.
func changeAll() error {
	f, err := os.Create("/data/second")
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp4", "0.0.0.0:9090")
	if err != nil {
		return err
	}
	more, err := apart(4 << 20)
	if err != nil {
		return err
	}
	fill(more, 0x3c)
	keep([]any{f, l, more})
	return errors.Join(os.Remove("/data/queue"), os.WriteFile("/etc/written", []byte("written again\n"), 0o600))
}
