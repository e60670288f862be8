package cow

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// subject is what the tests capture. It prints what is to be known of it, works until its
// standard input ends, and then fails if it has noticed anything.
func subject(kind string) {
	var broken atomic.Pointer[string]
	notice := func(format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		broken.CompareAndSwap(nil, &text)
	}
	var stop atomic.Bool
	switch kind {
	case "hammer":
		hammer(&stop)
	case "sleeper":
		go sleepers(&stop, notice)
		go parent(&stop, notice)
		go ticker(&stop, notice)
		fmt.Println("ready")
		go func() {
			io.Copy(io.Discard, os.Stdin)
			stop.Store(true)
		}()
		leaderSleeps(&stop, notice) // on the first thread
	case "kept":
		kept()
	}
	if kind != "sleeper" {
		io.Copy(io.Discard, os.Stdin)
		stop.Store(true)
	}
	if why := broken.Load(); why != nil {
		fmt.Println("BROKEN:", *why)
		os.Exit(1)
	}
	os.Exit(0)
}

const (
	hammers     = 4
	hammerPages = 512
)

// hammer has threads write numbers that ever grow to pages, each to its own, in order.
// It prints the address of the count that they take the numbers from, and of the pages.
func hammer(stop *atomic.Bool) {
	memory, err := unix.Mmap(-1, 0, (1+hammers*hammerPages)*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	base := unsafe.Pointer(&memory[0])
	count := (*atomic.Uint64)(base)
	var full sync.WaitGroup // every page has been written to
	full.Add(hammers)
	for h := range hammers {
		go func() {
			runtime.LockOSThread()
			for i := 0; !stop.Load(); i++ {
				if i == 2*hammerPages {
					full.Done()
				}
				page := unsafe.Add(base, (1+h*hammerPages+i%hammerPages)*pageSize)
				n := count.Add(1)
				(*atomic.Uint64)(page).Store(n)
				(*atomic.Uint64)(unsafe.Add(page, pageSize-8)).Store(n)
			}
		}()
	}
	full.Wait()
	fmt.Println(uintptr(base), uintptr(base)+pageSize)
	runtime.KeepAlive(memory)
}

// leaderSleeps makes system calls of the kinds that the kernel takes up again in different
// ways, directly: none may be seen to have been interrupted.
func leaderSleeps(stop *atomic.Bool, notice func(string, ...any)) {
	deafen()
	for !stop.Load() {
		slow(notice)
	}
}

func sleepers(stop *atomic.Bool, notice func(string, ...any)) {
	for range 3 {
		go func() {
			runtime.LockOSThread()
			deafen()
			for !stop.Load() {
				slow(notice)
			}
		}()
	}
}

// deafen blocks signals, for whose sake a call may well be interrupted.
func deafen() {
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil); err != nil {
		panic(err)
	}
}

func slow(notice func(string, ...any)) {
	const span = 30 * time.Millisecond
	check := func(what string, fn func() unix.Errno, want unix.Errno) {
		began := time.Now()
		errno := fn()
		if took := time.Since(began); errno != want || took < span-time.Millisecond {
			notice("%s returned %v after %v", what, errno, took)
		}
	}
	ts := unix.NsecToTimespec(int64(span))
	check("nanosleep", func() unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
		return errno
	}, 0)
	check("poll", func() unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_POLL, 0, 0, uintptr(span.Milliseconds()))
		return errno
	}, 0)
	var word uint32
	check("futex", func() unix.Errno {
		_, _, errno := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&word)), 128, 0, uintptr(unsafe.Pointer(&ts)), 0, 0)
		return errno
	}, unix.ETIMEDOUT)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		notice("pipe: %v", err)
		return
	}
	defer unix.Close(pipe[0])
	time.AfterFunc(span, func() {
		unix.Write(pipe[1], []byte("x"))
		unix.Close(pipe[1])
	})
	var b [1]byte
	check("read", func() unix.Errno {
		n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(pipe[0]), uintptr(unsafe.Pointer(&b[0])), 1)
		if errno == 0 && n != 1 {
			notice("read returned %d", n)
		}
		return errno
	}, 0)
	// The end of the stream comes when the writer has closed it, and at once.
	began := time.Now()
	if n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(pipe[0]), uintptr(unsafe.Pointer(&b[0])), 1); n != 0 || errno != 0 || time.Since(began) > 5*time.Second {
		notice("read at the end returned %d, %v after %v", n, errno, time.Since(began))
	}
}

// parent starts children and waits for any: only its own may be found.
func parent(stop *atomic.Bool, notice func(string, ...any)) {
	for !stop.Load() {
		cmd := exec.Command("/bin/sh", "-c", "exit 7")
		if err := cmd.Start(); err != nil {
			notice("start: %v", err)
			return
		}
		var status unix.WaitStatus
		var pid int
		err := error(unix.EINTR)
		for err == unix.EINTR {
			pid, err = unix.Wait4(-1, &status, 0, nil)
		}
		if err != nil || pid != cmd.Process.Pid || status.ExitStatus() != 7 {
			notice("wait found %d (%v), status %x; the child is %d", pid, err, status, cmd.Process.Pid)
		}
		if pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil); err != unix.ECHILD {
			notice("it has another child: %d, %v", pid, err)
		}
	}
}

// ticker counts what a timer sends.
func ticker(stop *atomic.Bool, notice func(string, ...any)) {
	got := make(chan os.Signal, 100)
	signal.Notify(got, unix.SIGUSR1)
	for !stop.Load() {
		if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
			notice("kill: %v", err)
		}
		select {
		case <-got:
		case <-time.After(20 * time.Second):
			notice("a signal was lost")
		}
		time.Sleep(time.Millisecond)
	}
}

// kept has memory of the kinds that children do not get, and others. It prints the
// addresses of: don't fork, wipe on fork, no access, a file's written to, huge, shared.
func kept() {
	at := func(fd, flags int, word uint64) []byte {
		m, err := unix.Mmap(fd, 0, 4*pageSize, unix.PROT_READ|unix.PROT_WRITE, flags)
		if err != nil {
			panic(err)
		}
		*(*uint64)(unsafe.Pointer(&m[pageSize])) = word
		return m
	}
	do := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	private := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	dont, wipe, closed := at(-1, private, 1), at(-1, private, 2), at(-1, private, 3)
	do(unix.Madvise(dont, unix.MADV_DONTFORK))
	do(unix.Madvise(wipe, unix.MADV_WIPEONFORK))
	do(unix.Mprotect(closed, unix.PROT_NONE))
	f, err := os.CreateTemp("", "cow")
	do(err)
	os.Remove(f.Name())
	do(f.Truncate(4 * pageSize))
	file := at(int(f.Fd()), unix.MAP_PRIVATE, 4)
	fmt.Println(address(dont), address(wipe), address(closed), address(file))
	runtime.KeepAlive([][]byte{dont, wipe, closed, file})
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[pageSize])) }
