// Command bench measures what checkpoints cost once they have been taken: how much a
// store grows by them, how fast it takes them and gives them back, each next to what
// ordinary tools do with the same bytes in the same run, and how much memory that takes.
//
//	make bench
//	make bench BENCH='increment|memory'
//
// Each figure is a line "bench: NAME VALUE UNIT". Ratios are what to go by: the machine
// is in both of their sides.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/test/bench/client"
	"podstasis.dev/stasis/test/bench/freeze"
	"podstasis.dev/stasis/test/bench/load"
)

// measurements run one after the other. Each has a directory to itself, which is empty.
var measurements = []struct {
	name string
	run  func(ctx context.Context, b *bench, dir string) error
}{
	{"increment", increments},
	{"replicas", replicas},
	{"speed", speed},
	{"memory", memory},
	{"overhead", overhead},
	{"freeze", freezes},
	{"services", services},
	{"elsewhere", elsewhere},
}

type bench struct {
	criu, apps string
	dumps      []replica // made by the first that needs them
	dumpsDir   string    // what is in it is not made again
	rounds     int
	shapes     []freeze.Shape
	update     string
}

// commands are what this program does instead when it is started by itself: what is
// measured has a process to itself.
var commands = map[string]struct {
	args int
	run  func(ctx context.Context, args []string) error
}{
	putOnly: {2, func(ctx context.Context, args []string) error { return putAndTell(ctx, args[0], args[1]) }},
	client.Command: {1, func(ctx context.Context, args []string) error {
		return client.Run(ctx, args[0], os.Stdin, os.Stdout)
	}},
	load.Command: {2, func(ctx context.Context, args []string) error {
		rate, err := strconv.ParseFloat(args[1], 64)
		if err != nil {
			return err
		}
		return load.Run(ctx, args[0], rate, os.Stdin, os.Stdout)
	}},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 {
		if c, found := commands[os.Args[1]]; found && len(os.Args) == 2+c.args {
			if err := c.run(ctx, os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	only := flag.String("only", "", "run the measurements whose `names` match this regular expression")
	dir := flag.String("dir", "/dev/shm", "`directory` to work in, on a file system in memory with 16 GiB free")
	dumps := flag.String("dumps", "", "`directory` to keep the processes' images in, and to take those from that are there")
	profile := flag.String("profile", "", "`file` for a profile of this program's CPU time")
	var b bench
	flag.IntVar(&b.rounds, "rounds", 3, "rounds of freeze that `count`, after one that does not")
	shapes := flag.String("shapes", "", "what freeze checkpoints, as in `64,1024,2x512`: containers and MiB; empty for all")
	flag.StringVar(&b.update, "update", "", "`file` to write the tables of freeze into, between its markers, and the plot beside it")
	criu := flag.String("criu", "dist/criu/bin/criu", "the `program` that dumps processes")
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	var err error
	if b.shapes, err = freeze.ParseShapes(*shapes); err == nil {
		err = b.run(ctx, *only, *dir, *dumps, *criu)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, only, dir, dumps, criu string) (err error) {
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(dir, "stasis-bench.")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	b.dumpsDir = cmp.Or(dumps, filepath.Join(work, "dumps"))
	if b.criu, err = filepath.Abs(criu); err != nil {
		return err
	}
	if b.apps, err = filepath.Abs("test/bench/apps"); err != nil {
		return err
	}
	for _, m := range measurements {
		if !match.MatchString(m.name) {
			continue
		}
		own := filepath.Join(work, m.name)
		if err := os.Mkdir(own, 0o700); err != nil {
			return err
		}
		if err := m.run(ctx, b, own); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if err := os.RemoveAll(own); err != nil {
			return err
		}
	}
	return nil
}

func report(name string, value float64, unit string) {
	fmt.Printf("bench: %s %.3f %s\n", name, value, unit)
}

// newStore makes a store in a directory, which must not be there.
func newStore(ctx context.Context, dir string) (*store.Store, func() error, error) {
	b, err := open.Open(ctx, open.Config{Kind: open.Directory, Path: dir})
	if err != nil {
		return nil, nil, err
	}
	err = store.Create(ctx, b, nil)
	if errors.Is(err, store.ErrExists) {
		err = nil
	}
	var s *store.Store
	if err == nil {
		s, err = store.Open(ctx, b, nil)
	}
	if err != nil {
		return nil, nil, errors.Join(err, b.Close())
	}
	return s, b.Close, nil
}

// bytesIn are the sizes of all files below a directory.
func bytesIn(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		sum += info.Size()
		return err
	})
	return sum, err
}

// cpuTime is what this process and those that it waited for have taken, in seconds.
func cpuTime() (sum float64) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			panic(err) // for another who only
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
	}
	return sum
}

// command runs a program and fails with what it said.
func command(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// timed returns how long something took, and how much of the CPUs, in seconds.
func timed(f func() error) (took, cpu float64, err error) {
	begun, used := time.Now(), cpuTime()
	err = f()
	return time.Since(begun).Seconds(), cpuTime() - used, err
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
