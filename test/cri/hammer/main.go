// hammer is what the tests capture to see whether memory is of one moment, and whether a
// process notices that it is captured or restored: threads that write to memory in rounds
// and check, before each write, what they had written the round before; a process beside
// it; and much that begins and ends. It prints "round N" and "BROKEN: why".
//
//	hammer MIB    that much memory
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	threads  = 3
	pageSize = 4096
)

func broken(format string, args ...any) {
	fmt.Printf("BROKEN: "+format+"\n", args...)
	time.Sleep(time.Hour)
}

func main() {
	switch os.Args[1] {
	case "exit":
		os.Exit(7)
	case "echo":
		write(mapped(8<<20), 9, nil) // and it has memory, too
		echo()
	}
	size, err := strconv.Atoi(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	memory := mapped(size << 20)
	var rounds [threads]atomic.Int64
	part := len(memory) / threads / pageSize * pageSize
	for i := range threads {
		write(memory[i*part:(i+1)*part], uint64(i+1), &rounds[i])
	}
	go talk()
	go churn()
	go parent()
	go signals()
	go sleep()
	for last := int64(0); ; time.Sleep(5 * time.Millisecond) {
		least := rounds[0].Load()
		for i := range rounds {
			least = min(least, rounds[i].Load())
		}
		if least > last {
			last = least
			fmt.Println("round", last)
		}
	}
}

func mapped(size int) []byte {
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		broken("mmap: %v", err)
	}
	return m
}

// write has a thread write to memory, round after round. Pages without end go from there
// to here: the last page's number is the round's until the next begins.
func write(memory []byte, seed uint64, rounds *atomic.Int64) {
	go func() {
		runtime.LockOSThread()
		for round := uint64(1); ; round++ {
			for at := 0; at < len(memory); at += pageSize {
				page := memory[at : at+pageSize]
				was, will := uint64(0), value(seed, round, at)
				if round > 1 {
					was = value(seed, round-1, at)
				}
				for _, offset := range []int{0, 1024, pageSize - 8} {
					if got := binary.NativeEndian.Uint64(page[offset:]); got != was {
						broken("thread %d, round %d: byte %d holds %x, not %x", seed, round, at+offset, got, was)
					}
					binary.NativeEndian.PutUint64(page[offset:], will)
				}
			}
			if rounds != nil {
				rounds.Store(int64(round))
			}
			time.Sleep(time.Millisecond)
		}
	}()
}

func value(seed, round uint64, at int) uint64 {
	return seed<<56 | round<<32 | uint64(at)
}

// talk exchanges numbers with a process: neither may be ahead of the other.
func talk() {
	cmd := exec.Command(os.Args[0], "echo")
	in, err := cmd.StdinPipe()
	if err != nil {
		broken("pipe: %v", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		broken("pipe: %v", err)
	}
	if err := cmd.Start(); err != nil {
		broken("start: %v", err)
	}
	var b [8]byte
	for n := uint64(1); ; n++ {
		binary.NativeEndian.PutUint64(b[:], n)
		if _, err := in.Write(b[:]); err != nil {
			broken("write to the process: %v", err)
		}
		if _, err := io.ReadFull(out, b[:]); err != nil {
			broken("read from the process: %v", err)
		}
		if got := binary.NativeEndian.Uint64(b[:]); got != n+1 {
			broken("the process answered %d to %d", got, n)
		}
	}
}

// echo answers each number with the next. That they come in order it checks, too.
func echo() {
	var b [8]byte
	for last := uint64(0); ; last++ {
		if _, err := io.ReadFull(os.Stdin, b[:]); err != nil {
			os.Exit(0)
		}
		got := binary.NativeEndian.Uint64(b[:])
		if got != last+1 {
			fmt.Fprintf(os.Stderr, "BROKEN: after %d came %d\n", last, got)
		}
		binary.NativeEndian.PutUint64(b[:], got+1)
		os.Stdout.Write(b[:])
	}
}

// churn maps memory, uses it, gives it up.
func churn() {
	for n := byte(1); ; n++ {
		m := mapped(int(n%16+1) << 16)
		for i := 0; i < len(m); i += 512 {
			m[i] = n
		}
		half := len(m) / 2
		if err := unix.Madvise(m[:half], unix.MADV_DONTNEED); err != nil {
			broken("madvise: %v", err)
		}
		for i := 0; i < len(m); i += 512 {
			if want := n; i >= half && m[i] != want || i < half && m[i] != 0 {
				broken("memory of madvise: byte %d of %d holds %d", i, len(m), m[i])
			}
		}
		if err := unix.Munmap(m); err != nil {
			broken("munmap: %v", err)
		}
	}
}

// parent has children and waits for any that there are.
func parent() {
	for {
		pid, err := syscall.ForkExec(os.Args[0], []string{os.Args[0], "exit"}, &syscall.ProcAttr{})
		if err != nil {
			broken("fork: %v", err)
		}
		var status unix.WaitStatus
		got, err := 0, error(unix.EINTR)
		for err == unix.EINTR {
			got, err = unix.Wait4(-1, &status, 0, nil)
		}
		if err != nil || got != pid || status.ExitStatus() != 7 {
			broken("wait for %d found %d: %v, %x", pid, got, err, status)
		}
		time.Sleep(time.Millisecond)
	}
}

// signals sends itself some and counts them.
func signals() {
	got := make(chan os.Signal, 16)
	signal.Notify(got, unix.SIGUSR1)
	for {
		if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
			broken("kill: %v", err)
		}
		select {
		case <-got:
		case <-time.After(time.Minute):
			broken("a signal was lost")
		}
		time.Sleep(time.Millisecond)
	}
}

// sleep waits in system calls that the kernel takes up again in different ways. A CRIU
// that captures them has them interrupted, which is allowed; they may not end early
// without saying so.
func sleep() {
	const span = 40 * time.Millisecond
	ts := unix.NsecToTimespec(int64(span))
	var word uint32
	for {
		began := time.Now()
		_, _, errno := unix.Syscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
		if took := time.Since(began); errno != 0 && errno != unix.EINTR || errno == 0 && took < span-time.Millisecond {
			broken("nanosleep returned %v after %v", errno, took)
		}
		_, _, errno = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&word)), 128, 0, uintptr(unsafe.Pointer(&ts)), 0, 0)
		if errno != unix.ETIMEDOUT && errno != unix.EINTR {
			broken("futex returned %v", errno)
		}
	}
}
