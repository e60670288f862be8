package cow

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// While their memory is read, the processes run: reading gives way to them, and to
// everything else on the node, so that they have to share no processor with it that
// another has free. It does as long as it gets on: while there are children, the processes
// pay for what they write to, and whoever wants the checkpoint waits for it.

// readingNice is the nice value with which memory is read: where all processors are wanted,
// a tenth of what somebody gets who has none (sched(7)).
const readingNice = 10

// leastShare is what part of a processor reading has to get for it to get on. How fast a
// processor reads is the machine's affair, by a factor of four. (A variable for tests.)
var leastShare = 0.25

// getsGoing is after how long that is first asked for.
const getsGoing = 300 * time.Millisecond

// getsOn says whether so much of a processor is enough for the time that has passed.
func getsOn(used, passed time.Duration) bool {
	return passed < getsGoing || float64(used) >= leastShare*float64(passed)
}

// readingThread is one that reads memory.
type readingThread struct {
	tid   int
	group bool // it is in a scheduling group with nothing but this process
}

// newReadingThread gives the calling thread, which does nothing else, the priority of reading.
//
// A thread of the root cgroup counts as one of its session (sched(7), "The autogroup
// feature"): the session's weight is what matters among others, and within it, with
// nobody beside it, SCHED_IDLE costs nothing. With SCHED_IDLE the kernel takes the thread's
// processor for free: whoever wakes up is put there and not beside the processes. Where
// there are no such groups it would get next to nothing, and has its nice value alone.
func newReadingThread() (readingThread, error) {
	r := readingThread{tid: unix.Gettid(), group: autogrouped()}
	return r, r.set(readingNice, unix.SCHED_IDLE)
}

// hurry gives it the priority of everybody again. Any thread may call it, and when that one
// has ended.
func (r readingThread) hurry() error { return r.set(0, unix.SCHED_NORMAL) }

// used is how much of a processor's time the thread has had; 0 when it has ended. Any thread
// of the process may ask.
func (r readingThread) used() time.Duration {
	// The kernel's name of a thread's clock, as pthread_getcpuclockid(3) makes it: the thread,
	// inverted, and that it is one thread's time on a processor (CPUCLOCK_PERTHREAD_MASK,
	// CPUCLOCK_SCHED).
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^r.tid<<3|4|2), &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

func (r readingThread) set(nice int, policy uint32) error {
	attributes := unix.SchedAttr{Policy: unix.SCHED_NORMAL, Nice: int32(nice)}
	var err error
	if r.group {
		attributes.Policy, attributes.Nice = policy, 0
		err = os.WriteFile(autogroupFile, []byte(strconv.Itoa(nice)), 0)
	}
	if e := unix.SchedSetAttr(r.tid, &attributes, 0); e != nil && !errors.Is(e, unix.ESRCH) {
		err = errors.Join(err, fmt.Errorf("set the priority of thread %d: %w", r.tid, e))
	}
	return err
}

const autogroupFile = "/proc/self/autogroup"

// autogrouped says whether the kernel schedules this process, which is alone in its session,
// as a group.
func autogrouped() bool {
	session, err := unix.Getsid(0)
	if err != nil || session != os.Getpid() {
		return false
	}
	enabled, err := os.ReadFile("/proc/sys/kernel/sched_autogroup_enabled")
	return err == nil && string(enabled) == "1\n"
}
