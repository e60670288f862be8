package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Two containers, "a" and "b", share memory in three ways, a semaphore, a message and
// two TCP connections, and never stop changing all of it. Whatever one of them finds
// that the other cannot have left ends it with an error: a cut through the middle of
// the two, memory that is not shared any more, a connection that lost a byte.

const (
	shareKey   = 0x57a515
	sharePort  = "7001"
	shareFiles = "/dev/shm/share:/share/region" // of /dev/shm and of an emptyDir
	shareEvery = 200 * time.Millisecond
)

// region is shared memory: how many transactions there were, of each and in all.
type region [8]atomic.Uint64

const (
	regionTotal = 0
	regionReady = 7
)

type shared struct {
	me, other int // 1 and 2
	mine      uint64
	regions   []*region
	semaphore int
	queue     int
}

// share is container name's part.
func share(ctx context.Context, name string) error {
	s := &shared{me: 1, other: 2}
	if name == "b" {
		s.me, s.other = 2, 1
	}
	if err := s.open(); err != nil {
		return err
	}
	fmt.Println("share: begins", name)
	failed := make(chan error, 4)
	if s.me == 1 {
		listener, err := listenTCP(ctx, ":"+sharePort)
		if err != nil {
			return err
		}
		go func() { failed <- s.converse(listener) }()
	} else {
		addresses := []string{"127.0.0.1", podAddress()}
		if os.Getenv("SHARE_LOOPBACK_ALONE") != "" {
			addresses = addresses[:1]
		}
		for _, address := range addresses {
			go func() { failed <- s.talk(ctx, net.JoinHostPort(address, sharePort)) }()
		}
	}
	go func() { failed <- s.transact(ctx) }()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("share: VIOLATION %w", err)
	}
}

// open finds what is shared; a makes it, b waits for it.
func (s *shared) open() error {
	flags := 0
	if s.me == 1 {
		flags = unix.IPC_CREAT
	}
	for _, path := range filepath.SplitList(shareFiles) {
		if s.me == 2 {
			awaitFile(path)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		if err := f.Truncate(4096); err != nil {
			return err
		}
		memory, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		s.regions = append(s.regions, (*region)(unsafe.Pointer(&memory[0])))
	}
	segment, err := retry(s.me == 2, func() (int, error) { return unix.SysvShmGet(shareKey, 4096, flags|0o600) })
	if err != nil {
		return fmt.Errorf("shmget: %w", err)
	}
	memory, err := unix.SysvShmAttach(segment, 0, 0)
	if err != nil {
		return fmt.Errorf("shmat: %w", err)
	}
	sysv := (*region)(unsafe.Pointer(&memory[0]))
	s.regions = append(s.regions, sysv)
	if s.semaphore, err = retry(s.me == 2, func() (int, error) { return call(unix.SYS_SEMGET, shareKey, 1, uintptr(flags|0o600)) }); err != nil {
		return fmt.Errorf("semget: %w", err)
	}
	if s.queue, err = retry(s.me == 2, func() (int, error) { return call(unix.SYS_MSGGET, shareKey, uintptr(flags|0o600), 0) }); err != nil {
		return fmt.Errorf("msgget: %w", err)
	}
	if s.me == 1 {
		if err := s.send(0); err != nil {
			return err
		}
		sysv[regionReady].Store(1)
		return s.semop(1)
	}
	for sysv[regionReady].Load() == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

func awaitFile(path string) {
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// retry asks again as long as there is nothing, if one is to wait.
func retry(wait bool, ask func() (int, error)) (int, error) {
	for {
		id, err := ask()
		if !wait || !errors.Is(err, unix.ENOENT) {
			return id, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func call(trap, a, b, c uintptr) (int, error) {
	r, _, errno := unix.Syscall(trap, a, b, c)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// semop adds to the semaphore, or waits until it can be taken from.
func (s *shared) semop(by int16) error {
	op := struct {
		number uint16
		by     int16
		flags  int16
	}{by: by}
	for {
		_, err := call(unix.SYS_SEMOP, uintptr(s.semaphore), uintptr(unsafe.Pointer(&op)), 1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// message is what msgsnd(2) takes.
type message struct {
	kind  int64
	total uint64
}

func (s *shared) send(total uint64) error {
	m := message{1, total}
	_, _, errno := unix.Syscall6(unix.SYS_MSGSND, uintptr(s.queue), uintptr(unsafe.Pointer(&m)), 8, 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("msgsnd: %w", errno)
	}
	return nil
}

func (s *shared) receive() (uint64, error) {
	var m message
	_, _, errno := unix.Syscall6(unix.SYS_MSGRCV, uintptr(s.queue), uintptr(unsafe.Pointer(&m)), 8, 0, unix.IPC_NOWAIT, 0)
	if errno != 0 {
		return 0, fmt.Errorf("msgrcv: %w", errno)
	}
	return m.total, nil
}

func (s *shared) transact(ctx context.Context) error {
	said := time.Now()
	for ctx.Err() == nil {
		total, err := s.transaction()
		if err != nil {
			return err
		}
		if now := time.Now(); now.Sub(said) >= shareEvery {
			said = now
			fmt.Printf("share: total %d mine %d\n", total, s.mine)
		}
		time.Sleep(200 * time.Microsecond)
	}
	return nil
}

func (s *shared) transaction() (uint64, error) {
	if err := s.semop(-1); err != nil {
		return 0, fmt.Errorf("semop: %w", err)
	}
	message, err := s.receive()
	if err != nil {
		return 0, err
	}
	var values [3][3]uint64
	for i, r := range s.regions {
		values[i] = [3]uint64{r[0].Load(), r[1].Load(), r[2].Load()}
	}
	first := values[0]
	if values[1] != first || values[2] != first || first[0] != first[1]+first[2] || first[s.me] != s.mine || message != first[0] {
		return 0, fmt.Errorf("/dev/shm, emptyDir, System V segment: %v; message %d; my own count %d", values, message, s.mine)
	}
	for _, r := range s.regions {
		r[regionTotal].Add(1)
		r[s.me].Add(1)
	}
	s.mine++
	if err := s.send(message + 1); err != nil {
		return 0, err
	}
	return message + 1, s.semop(1)
}

// converse answers every number with the next, as long as they come in order.
func (s *shared) converse(listener net.Listener) error {
	failed := make(chan error)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				failed <- err
				return
			}
			go func() {
				for next := uint64(0); ; next += 2 {
					if n, err := hear(conn); err != nil || n != next {
						failed <- fmt.Errorf("connection from %s: heard %d, expected %d: %w", conn.RemoteAddr(), n, next, err)
						return
					}
					if err := say(conn, next+1); err != nil {
						failed <- fmt.Errorf("connection from %s: %w", conn.RemoteAddr(), err)
						return
					}
				}
			}()
		}
	}()
	return <-failed
}

func (s *shared) talk(ctx context.Context, address string) error {
	var conn net.Conn
	for {
		var err error
		if conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	said := time.Now()
	for next := uint64(0); ; next += 2 {
		if err := say(conn, next); err != nil {
			return fmt.Errorf("connection to %s: %w", address, err)
		}
		if n, err := hear(conn); err != nil || n != next+1 {
			return fmt.Errorf("connection to %s: heard %d, expected %d: %w", address, n, next+1, err)
		}
		if now := time.Now(); now.Sub(said) >= shareEvery {
			said = now
			fmt.Printf("share: said %d to %s\n", next, address)
		}
	}
}

func say(w io.Writer, n uint64) error {
	_, err := w.Write(binary.BigEndian.AppendUint64(nil, n))
	return err
}

func hear(r io.Reader) (uint64, error) {
	var b [8]byte
	_, err := io.ReadFull(r, b[:])
	return binary.BigEndian.Uint64(b[:]), err
}

// podAddress is the Pod's own.
func podAddress() string {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return err.Error()
	}
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() && ip.IP.To4() != nil {
			return ip.IP.String()
		}
	}
	return "none"
}
