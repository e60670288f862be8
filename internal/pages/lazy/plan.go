// Package lazy gives restored processes their memory while they run. CRIU restores a
// container with --lazy-pages: it makes mappings and leaves them empty, and a process
// that touches a page which is not there waits (userfaultfd(2)) until somebody gives it.
// That is done here, by two processes of the host's for each container: the server, which
// gives pages, and the keeper, which holds the container to account.
//
// The kernel fills what is missing with zeros as soon as nobody holds the userfaultfd any
// more. So the keeper holds it too, and when the server ends before all pages are in, for
// whatever reason, kills the container before it lets go. No process ever runs on a page
// that it did not have, and none waits for ever.
//
// Both are parts of stasis-runtime, which is started many times: what is here knows no
// format of images. The agent, which does (package pages), writes a Plan.
package lazy

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Plan says which memory a container's processes are to be given.
type Plan struct {
	// Dir is the checkpoint's directory, ManifestDigest what its manifest's digest is.
	Dir            string `json:"dir"`
	ManifestDigest string `json:"manifestDigest"`
	// Partial says that the checkpoint is still being brought to this node: the list of
	// digests is there, and files of pages are as long as they will be. A block that is
	// not there is asked for (Ask).
	Partial bool `json:"partial,omitempty"`
	// Bandwidth bounds what is streamed in a second, in bytes; what a process waits for
	// is not held back by it. 0: unbounded.
	Bandwidth int64 `json:"bandwidth,omitempty"`
	// Patience is how long a process may wait for a page before the container is killed.
	Patience time.Duration `json:"patience"`
	// Order is a file in which the order is kept that blocks were asked for, for the next
	// restore; may be empty.
	Order string `json:"order,omitempty"`
	// Processes are those of the container.
	Processes []Process `json:"processes"`
}

// Process is the memory of one process.
type Process struct {
	// PID is what the images call it.
	PID uint32 `json:"pid"`
	// File holds its pages, by its path in the checkpoint.
	File string `json:"file"`
	// Runs are in order of their addresses.
	Runs []Run `json:"-"`
}

// Run is a run of pages that are to be given: Pages of them, from the address Start on
// and from page number Page of the file on.
type Run struct{ Start, Pages, Page uint64 }

const (
	maxPlanHead = 1 << 20
	maxRuns     = 1 << 24
	maxPage     = 1 << 31
	maxAddress  = 1 << 57
	planMagic   = "STASLAZ1"
)

// Bytes is how much memory it is.
func (p *Plan) Bytes() int64 {
	var sum int64
	for _, process := range p.Processes {
		for _, r := range process.Runs {
			sum += int64(r.Pages) * pageSize
		}
	}
	return sum
}

// Write writes the plan to a file.
func (p *Plan) Write(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write which memory is given lazily: %w", err)
	}
	w := bufio.NewWriter(f)
	if err := errors.Join(p.encode(w), w.Flush(), f.Close()); err != nil {
		return fmt.Errorf("write which memory is given lazily: %w", err)
	}
	return nil
}

// encode writes: the magic number, the size of the JSON, the JSON; for each process the
// number of runs, and of each its three numbers.
func (p *Plan) encode(w io.Writer) error {
	head, err := json.Marshal(p)
	if err != nil {
		return err
	}
	out := append([]byte(planMagic), binary.LittleEndian.AppendUint32(nil, uint32(len(head)))...)
	if _, err := w.Write(append(out, head...)); err != nil {
		return err
	}
	var buf []byte
	for _, process := range p.Processes {
		buf = binary.LittleEndian.AppendUint32(buf[:0], uint32(len(process.Runs)))
		for _, r := range process.Runs {
			buf = binary.LittleEndian.AppendUint64(buf, r.Start)
			buf = binary.LittleEndian.AppendUint64(buf, r.Pages)
			buf = binary.LittleEndian.AppendUint64(buf, r.Page)
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

// ReadPlan reads a plan.
func ReadPlan(file string) (*Plan, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read which memory is given lazily: %w", err)
	}
	defer f.Close()
	p, err := decodePlan(bufio.NewReader(f))
	if err != nil {
		return nil, fmt.Errorf("read which memory is given lazily: %s: %w", file, err)
	}
	return p, nil
}

func decodePlan(r io.Reader) (*Plan, error) {
	var head [12]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.LittleEndian.Uint32(head[8:])
	if string(head[:8]) != planMagic || size > maxPlanHead {
		return nil, errors.New("it is no such plan")
	}
	text, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return nil, err
	}
	var p Plan
	if err := json.Unmarshal(text, &p); err != nil {
		return nil, err
	}
	total := 0
	for i := range p.Processes {
		var count [4]byte
		if _, err := io.ReadFull(r, count[:]); err != nil {
			return nil, err
		}
		n := int(binary.LittleEndian.Uint32(count[:]))
		if total += n; total > maxRuns {
			return nil, fmt.Errorf("more than %d runs of pages", maxRuns)
		}
		last := uint64(0)
		var b [24]byte
		for range n {
			if _, err := io.ReadFull(r, b[:]); err != nil {
				return nil, err
			}
			run := Run{binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])}
			if run.Start%pageSize != 0 || run.Start < last || run.Pages > maxPage || run.Page > maxPage || run.Page+run.Pages > maxPage ||
				run.Start > maxAddress || run.Start+run.Pages*pageSize > maxAddress {
				return nil, fmt.Errorf("the run of %d pages at %x cannot be", run.Pages, run.Start)
			}
			last = run.Start + run.Pages*pageSize
			p.Processes[i].Runs = append(p.Processes[i].Runs, run)
		}
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		return nil, errors.New("it goes on behind its end")
	}
	return &p, nil
}
