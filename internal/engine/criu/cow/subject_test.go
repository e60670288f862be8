//go:build amd64

package cow

import (
	"fmt"
	"io"
	"math/rand/v2"
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
	case "worker":
		worker(&stop)
	case "reader":
		reader(&stop)
	case "strict":
		hammer(&stop)
		forbid()
		fmt.Println("strict")
	case "family":
		family(notice)
	}
	if kind != "sleeper" {
		command, _ := io.ReadAll(os.Stdin)
		stop.Store(true)
		switch string(command) {
		case "exec":
			unix.Exec("/bin/sleep", []string{"sleep", "1000"}, nil)
		case "exit":
			os.Exit(5)
		}
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
				if i%64 == 0 { // others want to run, too
					time.Sleep(100 * time.Microsecond)
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

const workerPages = 1 << 30 / pageSize

// worker has a thread sum up pages at random and write to each. It prints the address of
// the number of those that it has done.
func worker(stop *atomic.Bool) { works(stop, 1) }

// reader writes to one of twenty.
func reader(stop *atomic.Bool) { works(stop, 20) }

func works(stop *atomic.Bool, each uint64) {
	memory, err := unix.Mmap(-1, 0, (1+workerPages)*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	count := (*atomic.Uint64)(unsafe.Pointer(&memory[0]))
	words := unsafe.Slice((*uint64)(unsafe.Pointer(&memory[pageSize])), workerPages*pageSize/8)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range words {
		words[i] = random.Uint64()
	}
	fmt.Println(uintptr(unsafe.Pointer(&memory[0])))
	go func() {
		for !stop.Load() {
			page := words[random.IntN(workerPages)*pageSize/8:][:pageSize/8]
			sum := uint64(1)
			for _, word := range page {
				sum = (sum ^ word) * 1099511628211
			}
			if count.Add(1)%each == 0 {
				page[sum%uint64(len(page))] = sum
			}
		}
	}()
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
		if took := time.Since(began); errno != want || took < span-time.Millisecond && what != "read" {
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

// forbid has the kernel end this process for what a capture has it do: a fork (other than
// for threads), close_range(2), wait4(2).
func forbid() {
	const data, flags = 0, 16 // struct seccomp_data: nr, args[0]
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	kill := unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_KILL_PROCESS}
	allow := unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW}
	equal := func(k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	filter := []unix.SockFilter{
		load(data),
		equal(unix.SYS_CLOSE_RANGE, 4, 0),
		equal(unix.SYS_WAIT4, 3, 0),
		equal(unix.SYS_CLONE, 0, 3),
		load(flags),
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.CLONE_VM, Jt: 1, Jf: 0},
		kill,
		allow,
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		panic(errno)
	}
}

var childInput io.Closer // open for as long as the process lives

// family has a child, and becomes the parent of what that leaves. It prints the child's ID
// and what that prints. When the child has ended it notices any other that there is.
func family(notice func(string, ...any)) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "COW_TEST=hammer")
	var err error
	if childInput, err = cmd.StdinPipe(); err != nil {
		panic(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		panic(err)
	}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%d %s", cmd.Process.Pid, line[:n])
	go func() {
		// The end of its output comes with its own.
		began := time.Now()
		if _, err := io.ReadAll(out); err != nil {
			notice("read what the child prints: %v", err)
		}
		ended := time.Now()
		var status unix.WaitStatus
		pid, err := unix.Wait4(cmd.Process.Pid, &status, 0, nil)
		if err != nil || pid != cmd.Process.Pid {
			notice("wait: %d, %v", pid, err)
		}
		fmt.Println("ended", ended.Sub(began).Nanoseconds(), int(status))
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid > 0 {
				notice("wait found %d", pid)
			} else if err != nil && err != unix.ECHILD && err != unix.EINTR {
				notice("wait: %v", err)
			}
			time.Sleep(50 * time.Microsecond)
		}
	}()
}
