// Package freeze measures checkpoints and restores of running programs, by Stasis and by
// others, side by side: how long the program stood still by its own clock, how long it
// took until the checkpoint was there, how large that is, how long a restore took to the
// program's first instruction and until all of its memory was there.
//
// A contender is one way to do it. What it works on runs in a place: a Pod, a container of
// runc, a container of podman. To add a contender is to add a line to contenders.
package freeze

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/bench/app"
)

// Shape is what is checkpointed: so many containers, each with a program that holds so
// much memory that does not compress.
type Shape struct{ Containers, MiB int }

func (s Shape) String() string {
	if s.Containers == 1 {
		return size(s.MiB)
	}
	return fmt.Sprintf("%d × %s", s.Containers, size(s.MiB))
}

// size is an amount of memory as people write it.
func size(mib int) string {
	if mib%1024 == 0 {
		return fmt.Sprintf("%d GiB", mib/1024)
	}
	return fmt.Sprintf("%d MiB", mib)
}

// place runs programs.
type place interface {
	// start returns when their processes exist.
	start(ctx context.Context, s Shape) (subject, error)
}

// subject is what runs: the processes of one Shape.
type subject interface {
	processes() []app.Process
	// end returns when they have ended.
	end(ctx context.Context) error
}

// taken is a checkpoint.
type taken interface {
	bytes() int64
	// reported is how long the contender says that the program stood still; 0 if it does not.
	reported() time.Duration
	remove(ctx context.Context) error
}

// contender is one way to checkpoint, with its ways to restore.
type contender struct {
	name  string // in the table
	key   string // in names of figures
	place place
	// checkpoint returns when the checkpoint can be used. The subject runs on.
	checkpoint func(ctx context.Context, from subject) (taken, error)
	restores   []restoration
	// fewer says that one of three rounds is enough where there is much memory: it takes
	// long.
	fewer bool
	// only are the shapes that are enough; none: all.
	only []Shape
	// often are the shapes of which it is measured several times in a round: contenders that
	// are compared to a tenth, where one checkpoint differs from the next by a fifth.
	often []Shape
	// large says that it is measured with more memory than others are.
	large bool
}

// restoration is one way to restore. The source has ended by then.
type restoration struct {
	name, key string
	restore   func(ctx context.Context, from taken) (restored, error)
}

// restored is what comes of it.
type restored struct {
	subject
	// asked is when the restore was asked for, created when the container runtime was
	// to start the containers; the same moment for those who restore containers only.
	asked, created time.Time
}

// Result is what was measured of one contender and one shape. Durations are of rounds;
// what a contender cannot do is empty.
type Result struct {
	Contender, Key string
	Shape          Shape
	Freeze         []time.Duration // by the program's clock
	Reported       []time.Duration // by the contender
	Ready          []time.Duration // from the request to a checkpoint that can be used
	Bytes          []int64
	Profiles       []profile // of Stasis: where the time went
	Stats          []Stats
	Restores       []RestoreResult
}

// RestoreResult is what was measured of one way to restore.
type RestoreResult struct {
	Name, Key string
	Asked     []time.Duration // from the request to the last program's first instruction
	First     []time.Duration // from the containers' creation to it
	All       []time.Duration // and until all memory was there
	Whole     []time.Duration // from the request until then: whoever checks memory first has done so by then, too
}

// turns is how often in a round those are measured that are measured often.
const turns = 3

// patience is how long anything may take.
const patience = 5 * time.Minute

// round measures every contender once, for one shape, and appends to their results.
// Contenders of one place share what they checkpoint.
func round(ctx context.Context, s Shape, results []*Result, contenders []contender, say func(string, ...any)) error {
	for len(contenders) > 0 {
		n := 1
		for n < len(contenders) && contenders[n].place == contenders[0].place {
			n++
		}
		if err := roundIn(ctx, s, results[:n], contenders[:n], say); err != nil {
			return err
		}
		results, contenders = results[n:], contenders[n:]
	}
	return nil
}

func roundIn(ctx context.Context, s Shape, results []*Result, contenders []contender, say func(string, ...any)) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	last := context.WithoutCancel(ctx)
	from, err := contenders[0].place.start(ctx, s)
	if err != nil {
		return err
	}
	running := true
	end := func() error {
		if !running {
			return nil
		}
		running = false
		return from.end(last)
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := settled(ctx, from); err != nil {
		return err
	}
	var checkpoints []taken
	defer func() {
		for _, c := range checkpoints {
			err = errors.Join(err, c.remove(last))
		}
	}()
	for turn := range turns {
		for i := range contenders {
			if turn%2 == 1 { // each finds the machine as another one has left it
				i = len(contenders) - 1 - i
			}
			c := contenders[i]
			if turn > 0 && !slices.Contains(c.often, s) {
				continue
			}
			t, err := measureCheckpoint(ctx, s, results[i], c, from, say)
			if err == nil && turn > 0 {
				err = t.remove(ctx) // the first is restored
			}
			if err != nil {
				return fmt.Errorf("%s, %s: checkpoint: %w", c.name, s, err)
			}
			if turn == 0 {
				checkpoints = append(checkpoints, t)
			}
		}
	}
	if err := end(); err != nil {
		return err
	}
	for i, c := range contenders {
		for j, r := range c.restores {
			if err := measureRestore(ctx, s, &results[i].Restores[j], r, checkpoints[i], say); err != nil {
				return fmt.Errorf("%s, %s: %s: %w", c.name, s, r.name, err)
			}
		}
	}
	return nil
}

// settled waits until all programs have filled their memory.
func settled(ctx context.Context, from subject) error {
	for _, p := range from.processes() {
		err := eventually(ctx, "a program has filled its memory", func() (bool, error) { return p.Ready() })
		if err == nil {
			err = p.Flush(ctx) // it looks at the clocks
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func measureCheckpoint(ctx context.Context, s Shape, to *Result, c contender, from subject, say func(string, ...any)) (taken, error) {
	if err := warm(s); err != nil {
		return nil, err
	}
	begun := time.Now()
	t, err := c.checkpoint(ctx, from)
	if err != nil {
		return nil, err
	}
	ready := time.Now()
	var longest time.Duration
	for _, p := range from.processes() {
		if err := p.Flush(ctx); err != nil {
			return t, err
		}
		gap, err := p.Longest(begun, ready)
		if err != nil {
			return t, err
		}
		longest = max(longest, gap.Length)
	}
	if longest == 0 {
		return t, errors.New("no program noticed that it stood still")
	}
	to.Freeze = append(to.Freeze, longest)
	to.Ready = append(to.Ready, ready.Sub(begun))
	to.Bytes = append(to.Bytes, t.bytes())
	if r := t.reported(); r > 0 {
		to.Reported = append(to.Reported, r)
	}
	if of, ok := t.(interface {
		window() (profile, Stats, error)
	}); ok {
		p, stats, err := of.window()
		if err != nil {
			return t, fmt.Errorf("take its freeze window apart: %w", err)
		}
		if len(p) > 0 {
			to.Profiles, to.Stats = append(to.Profiles, p), append(to.Stats, stats)
		}
	}
	say("%s, %s: frozen %d ms, said %d ms, ready %d ms", c.name, s, longest.Milliseconds(), t.reported().Milliseconds(), ready.Sub(begun).Milliseconds())
	return t, nil
}

func measureRestore(ctx context.Context, s Shape, to *RestoreResult, r restoration, from taken, say func(string, ...any)) (err error) {
	if err := warm(s); err != nil {
		return err
	}
	// Others' images are in memory: so are these, whatever was written since.
	if f, ok := from.(interface{ read() error }); ok {
		if err := f.read(); err != nil {
			return err
		}
	}
	got, err := r.restore(ctx, from)
	if err != nil {
		if got.subject != nil {
			err = errors.Join(err, got.end(context.WithoutCancel(ctx)))
		}
		return err
	}
	defer func() { err = errors.Join(err, got.end(context.WithoutCancel(ctx))) }()
	var first, all time.Time
	for _, p := range got.processes() {
		err := eventually(ctx, "a restored program runs", func() (bool, error) {
			gap, found, err := p.Over(got.asked)
			if found && gap.To.After(first) {
				first = gap.To
			}
			return found, err
		})
		if err != nil {
			return err
		}
	}
	all = first // unless it is seen to come later
	for _, p := range got.processes() {
		looks := 0
		err := eventually(ctx, "all memory of a restored program is there", func() (bool, error) {
			looks++
			resident, err := p.Resident()
			return resident >= int64(s.MiB)<<20, err
		})
		if err != nil {
			return err
		}
		if looks > 1 {
			all = time.Now()
		}
	}
	to.Asked = append(to.Asked, first.Sub(got.asked))
	to.First = append(to.First, first.Sub(got.created))
	to.All = append(to.All, all.Sub(got.created))
	to.Whole = append(to.Whole, all.Sub(got.asked))
	say("%s, %s: first instruction %d ms after the request, %d ms after its container was created; all memory %d ms", r.name, s,
		first.Sub(got.asked).Milliseconds(), first.Sub(got.created).Milliseconds(), all.Sub(got.created).Milliseconds())
	return nil
}

// glance is how often it is looked at processes, whether something has happened; asking
// is how often the API server is asked, which costs more.
const (
	glance = 5 * time.Millisecond
	asking = 50 * time.Millisecond
)

// eventually looks until it has happened.
func eventually(ctx context.Context, what string, look func() (bool, error)) error {
	return every(ctx, glance, what, look)
}

func every(ctx context.Context, interval time.Duration, what string, look func() (bool, error)) error {
	for {
		switch ok, err := look(); {
		case err != nil:
			return fmt.Errorf("until %s: %w", what, err)
		case ok:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not in time: %w", what, context.Cause(ctx))
		case <-time.After(interval):
		}
	}
}

// warm touches as much memory as a shape has and gives it back. A virtual machine may
// have given free memory back to its host; to get it again is slow, and would be
// measured instead.
func warm(s Shape) error {
	const part = 256 << 20
	var parts [][]byte
	defer func() {
		for _, p := range parts {
			_ = unix.Munmap(p)
		}
	}()
	for left := int64(s.Containers*s.MiB) << 20; left > 0; left -= part {
		p, err := unix.Mmap(-1, 0, int(min(left, part)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return fmt.Errorf("touch the memory that will be used: %w", err)
		}
		parts = append(parts, p)
		for i := 0; i < len(p); i += 4096 {
			p[i] = 1
		}
	}
	return nil
}
