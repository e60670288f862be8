package criu

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// leaderEnv has this test be a process whose first thread has ended. The others end when
// standard input does.
const leaderEnv = "STASIS_TEST_LEADER"

func init() {
	if os.Getenv(leaderEnv) == "" {
		return
	}
	runtime.LockOSThread() // the first thread: no goroutine comes here any more
	go func() {
		fmt.Println("ready")
		bufio.NewReader(os.Stdin).ReadString('\n')
		os.Exit(0)
	}()
	unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0) // of this thread alone
}

func TestAProcessWhoseFirstThreadHasEndedForGoodIsRefusedAndOneThatEndsIsWaitedFor(t *testing.T) {
	begin := func() (proc string, end func()) {
		t.Helper()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), leaderEnv+"=1")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Fatalf("it said %q: %v", line, err)
		}
		proc = "/proc/" + strconv.Itoa(cmd.Process.Pid)
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			if without, err := leaderless(proc); err != nil || time.Now().After(end) {
				t.Fatalf("its first thread has not ended: %v", err)
			} else if without {
				break
			}
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return proc, func() { in.Close() }
	}
	stays, _ := begin()
	if problem, err := problemOfLeader(stays, leaderPatience); err != nil || !strings.Contains(problem, "its first thread has ended") {
		t.Errorf("one that stays: %q, %v", problem, err)
	}
	ends, end := begin()
	end() // nobody collects it: it is there, and has ended
	if problem, err := problemOfLeader(ends, time.Minute); err != nil || problem != "" {
		t.Errorf("one that ends: %q, %v", problem, err)
	}
	if problem, err := problemOfLeader("/proc/self", time.Minute); err != nil || problem != "" {
		t.Errorf("an ordinary one: %q, %v", problem, err)
	}
}
