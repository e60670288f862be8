package cow

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Supported says why no memory can be captured this way on this node; nil if it can.
func Supported() error {
	if !supported {
		return fmt.Errorf("%w: not on this kind of processor", ErrUnfit)
	}
	s, err := newScanner(os.Getpid())
	if err != nil {
		return err
	}
	return s.close()
}

// errLeader says that the first thread of a process has ended and others have not, and
// leaderPatience how long that may last.
var errLeader = fmt.Errorf("%w: its first thread has ended", ErrUnfit)

const leaderPatience = time.Second

// Examine looks, while a process runs, for what keeps its memory from being captured this
// way (ErrUnfit). It returns how much of it is kept from children.
func Examine(pid int) (kept int64, err error) {
	// One that is executing another program, or ending, has no memory for a moment; or none
	// but threads that are about to end.
	for began, looks := time.Now(), 0; ; looks++ {
		kept, err = examine(pid)
		if !errors.Is(err, errNoVDSO) && !errors.Is(err, errLeader) ||
			errors.Is(err, errNoVDSO) && looks >= 20 || errors.Is(err, errLeader) && time.Since(began) > leaderPatience {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil // it has ended
	}
	return kept, err
}

func examine(pid int) (kept int64, err error) {
	s, err := readStat(pid)
	if err != nil {
		return 0, err
	}
	if s.state == 'Z' {
		if threads, err := threadsOf(pid); err == nil && len(threads) > 1 {
			return 0, errLeader
		}
		return 0, nil
	}
	if _, err := findPlace(pid); err != nil {
		return 0, err
	}
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return 0, err
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(proc, "fd", fd.Name())); err == nil && target == "anon_inode:[userfaultfd]" {
			return 0, fmt.Errorf("%w: it handles page faults itself (userfaultfd)", ErrUnfit)
		}
	}
	f, err := os.Open(filepath.Join(proc, "smaps"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var of struct {
		name          string
		private       bool
		present, swap int64
	}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<10)
	for lines.Scan() {
		line := lines.Text()
		name, rest, ok := strings.Cut(line, ":")
		switch {
		case !ok || strings.Contains(name, "-") || strings.Contains(name, " "): // a head
			words := strings.Fields(line)
			of.private, of.name, of.present, of.swap = len(words) > 1 && strings.HasSuffix(words[1], "p"), strings.Join(words[min(5, len(words)):], " "), 0, 0
			if of.name == "/[aio]" || strings.HasPrefix(of.name, "/[aio] ") {
				return 0, fmt.Errorf("%w: it has a ring of aio(7)", ErrUnfit)
			}
		case name == "Rss":
			of.present = kilobytes(rest)
		case name == "Swap":
			of.swap = kilobytes(rest)
		case name == "VmFlags":
			for flag := range strings.FieldsSeq(rest) {
				switch flag {
				case "um", "uw", "ui":
					return 0, fmt.Errorf("%w: its page faults are handled by a process (userfaultfd)", ErrUnfit)
				case "ht":
					if of.private {
						return 0, fmt.Errorf("%w: it has huge pages of its own (MAP_HUGETLB)", ErrUnfit)
					}
				case "dc", "wf":
					if of.private && !strings.HasPrefix(of.name, "[v") {
						kept += of.present + of.swap
					}
				}
			}
		}
	}
	return kept, lines.Err()
}

func kilobytes(text string) int64 {
	n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(text), "kB")), 10, 64)
	if err != nil {
		return 0
	}
	return n << 10
}

// MaxKept is how much memory, kept from children, is captured while the processes stand
// still.
const MaxKept = maxHeld
