//go:build amd64

package cow

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watched captures what it is asked for and says when memory begins to be read, and when it
// has been.
func watched() {
	c := capture{log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if err := json.NewDecoder(os.Stdin).Decode(&c.request); err != nil {
		panic(err)
	}
	if share, err := strconv.ParseFloat(os.Getenv("COW_LEAST_SHARE"), 64); err == nil {
		leastShare = share
	}
	c.settled = func() { fmt.Println("reads") }
	c.done = func(*process) { fmt.Println("has read, gives way:", givesWay(os.Getpid())) }
	if _, err := c.run(context.Background(), func() error { return nil }); err != nil {
		panic(err)
	}
}

// givesWay says whether a process has a thread, or its session has a group, of the priority
// of reading.
func givesWay(pid int) bool {
	group, err := os.ReadFile(fmt.Sprintf("/proc/%d/autogroup", pid))
	if err == nil && strings.HasSuffix(string(group), fmt.Sprintf(" nice %d\n", readingNice)) {
		return true
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		panic(err)
	}
	for _, task := range tasks {
		var tid int
		fmt.Sscan(filepath.Base(task), &tid)
		attributes, err := unix.SchedGetAttr(tid, 0)
		if err == nil && (attributes.Policy == unix.SCHED_IDLE || attributes.Nice == readingNice) {
			return true
		}
	}
	return false
}

// look is one at a capture, so long after it has begun to read.
type look struct {
	after time.Duration
	low   bool // it gives way to others
}

// looksWhileRead captures a worker of 1 GiB and looks, while its memory is read, whether that
// gives way to others. It must not when it has been read: a parent stands still while it
// collects its child.
func looksWhileRead(t *testing.T, attr *syscall.SysProcAttr, env string, limits ...Limit) (looks []look) {
	t.Helper()
	s := begin(t, "worker", nil)
	s.line(t)
	request, err := json.Marshal(Request{Sandbox: "s", Containers: []Container{imagesOf(t, s.pid())}, Limits: limits})
	must(t, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "COW_TEST=watched", env)
	cmd.SysProcAttr = attr
	cmd.Stdin, cmd.Stderr = bytes.NewReader(request), os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	if line := <-lines; line != "reads" {
		t.Fatalf("it says %q", line)
	}
	begun := time.Now()
	for {
		select {
		case line := <-lines:
			if line != "has read, gives way: false" {
				t.Errorf("it says %q", line)
			}
			must(t, cmd.Wait())
			noChildren(t, s.pid())
			s.end(t)
			return looks
		case <-time.After(time.Millisecond):
			looks = append(looks, look{time.Since(begun), givesWay(cmd.Process.Pid)})
		}
	}
}

// mostly says whether in most of the looks within a time, of which there were some, it gave
// way.
func mostly(t *testing.T, looks []look, from, to time.Duration) bool {
	t.Helper()
	all, low := 0, 0
	for _, l := range looks {
		if l.after < from || l.after > to {
			continue
		}
		if all++; l.low {
			low++
		}
	}
	if all < 10 {
		t.Fatalf("between %s and %s it was looked %d times", from, to, all)
	}
	return low > all/2
}

func TestReadingGivesWayToEverybodyElse(t *testing.T) {
	for name, attr := range map[string]*syscall.SysProcAttr{
		"as a group":  {Setsid: true},
		"as a thread": nil,
	} {
		t.Run(name, func(t *testing.T) {
			if !mostly(t, looksWhileRead(t, attr, ""), 0, getsGoing) {
				t.Error("it does not give way")
			}
		})
	}
}

func TestReadingThatDoesNotGetOnGivesWayNoMore(t *testing.T) {
	looks := looksWhileRead(t, &syscall.SysProcAttr{Setsid: true}, "COW_LEAST_SHARE=2")
	if !mostly(t, looks, 0, getsGoing) {
		t.Error("it does not give way from the first")
	}
	if mostly(t, looks, getsGoing, time.Hour) {
		t.Error("it still gives way")
	}
}

func TestReadingGivesWayNoMoreWhenMemoryRunsShort(t *testing.T) {
	file := filepath.Join(t.TempDir(), "usage")
	must(t, writeText(file, "850"))
	limit := Limit{Usage: file, Stat: file, Bytes: 1000, Reserve: 100}
	if mostly(t, looksWhileRead(t, &syscall.SysProcAttr{Setsid: true}, "", limit), 0, getsGoing) {
		t.Error("it gives way")
	}
}

func TestHowMuchOfAProcessorAThreadHasHad(t *testing.T) {
	threads, stop := make(chan readingThread), make(chan struct{})
	for _, idle := range []bool{true, false} {
		go func() {
			runtime.LockOSThread()
			threads <- readingThread{tid: unix.Gettid()}
			for !idle {
				select {
				case <-stop:
					return
				default:
				}
			}
			<-stop
		}()
	}
	defer close(stop)
	a, b := <-threads, <-threads
	beforeA, beforeB := a.used(), b.used() // threads are used again
	const much = 50 * time.Millisecond
	for a.used()-beforeA < much && b.used()-beforeB < much {
		time.Sleep(time.Millisecond)
	}
	if least := min(a.used()-beforeA, b.used()-beforeB); least > much/2 {
		t.Errorf("the thread that waits has had %s", least)
	}
	if gone := (readingThread{tid: 1 << 22}).used(); gone != 0 {
		t.Errorf("a thread that is not there has had %s", gone)
	}
}
