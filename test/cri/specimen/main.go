// specimen is what the tests of a checkpoint's contents capture: a small service of
// three processes that holds one of everything that can be told apart from outside.
// It works with files below /data and prints "ready". SIGUSR1 makes it change some of
// it and print "changed".
package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	runtime.LockOSThread() // so that the main thread keeps its name
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "worker":
		err = work()
	case len(os.Args) > 1 && os.Args[1] == "exit":
		return
	default:
		err = serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "specimen:", err)
		os.Exit(1)
	}
}

// serve makes the state up, starts the others and waits for ever.
func serve() error {
	for _, make := range []func() error{openFiles, openSockets, openDescriptors, fillMemory, changeRoot} {
		if err := make(); err != nil {
			return err
		}
	}
	nameThread("ticker")
	shared, err := sharedMemory()
	if err != nil {
		return err
	}
	atWork, working, err := os.Pipe()
	if err != nil {
		return err
	}
	var exit *exec.Cmd
	for _, args := range [][]string{{"worker", "--queue=orders"}, {"exit"}} {
		cmd := exec.Command(os.Args[0], args...)
		cmd.ExtraFiles = []*os.File{shared, working}
		cmd.Env = append(os.Environ(), "QUEUE_PASSWORD=hunter2")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000, Groups: []uint32{1000, 2000}}}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %v: %w", args, err)
		}
		// Nobody collects it: what has ended stays as a zombie.
		exit = cmd
	}
	// Both close the pipe, the one when it has all that it will have.
	if err := working.Close(); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, atWork); err != nil {
		return err
	}
	atWork.Close()
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Waitid(unix.P_PID, exit.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	if err != nil {
		return fmt.Errorf("wait for what ends: %w", err)
	}
	change := make(chan os.Signal, 1)
	signal.Notify(change, unix.SIGUSR1)
	fmt.Println("ready")
	for range change {
		if err := changeAll(); err != nil {
			return err
		}
		fmt.Println("changed")
	}
	return nil
}

// work maps the memory that it shares with its parent.
func work() error {
	if _, err := mapShared(3); err != nil {
		return err
	}
	if err := os.Chdir("/data"); err != nil {
		return err
	}
	f, err := os.Open("/data/queue")
	if err != nil {
		return err
	}
	keep(f)
	if err := unix.Close(4); err != nil {
		return err
	}
	time.Sleep(math.MaxInt64) // select{} alone would be a deadlock to the Go runtime
	return nil
}

// keep holds a value for as long as the process lives.
func keep(v any) {
	go func() {
		<-make(chan struct{})
		runtime.KeepAlive(v)
	}()
}

// nameThread keeps a thread of that name, which it has when this returns.
func nameThread(name string) {
	named := make(chan struct{})
	defer func() { <-named }()
	go func() {
		runtime.LockOSThread()
		b, err := unix.BytePtrFromString(name)
		if err == nil {
			unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0)
		}
		close(named)
		for {
			unix.Nanosleep(&unix.Timespec{Sec: 3600}, nil)
		}
	}()
}
