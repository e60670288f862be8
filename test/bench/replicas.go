package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"podstasis.dev/stasis/internal/store"
)

// replica is one process's checkpoint: a directory with the engine's images.
type replica struct{ app, dir string }

const replicaCount = 10

// applications are programs, each started ten times, with work of its own in every one.
var applications = []struct {
	name string
	args []string // the program, then its arguments; a file that it makes when it is at work follows
}{
	{"python", []string{"python3", "index.py"}},
	{"jvm", []string{"java", "-Xmx192m", "-XX:-UsePerfData", "Sessions.java"}},
}

// dump starts the replicas of all applications and has CRIU dump them, once.
func (b *bench) dump(ctx context.Context) ([]replica, error) {
	if b.dumps != nil {
		return b.dumps, nil
	}
	var all []replica
	for _, a := range applications {
		for number := range replicaCount {
			r := replica{a.name, filepath.Join(b.dumpsDir, a.name, strconv.Itoa(number), "criu")}
			all = append(all, r)
			if _, err := os.Stat(filepath.Join(r.dir, "inventory.img")); err == nil {
				continue
			}
			if err := os.MkdirAll(r.dir, 0o700); err != nil {
				return nil, err
			}
			if err := b.dumpOne(ctx, r, a.args); err != nil {
				return nil, fmt.Errorf("replica %d of %s: %w", number, a.name, err)
			}
		}
	}
	b.dumps = all
	return all, nil
}

func (b *bench) dumpOne(ctx context.Context, r replica, args []string) error {
	ready := filepath.Join(filepath.Dir(r.dir), "ready")
	log, err := os.Create(filepath.Join(filepath.Dir(r.dir), "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, args[0], append(args[1:len(args):len(args)], ready)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.apps, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w (Debian: apt-get install python3 openjdk-17-jre-headless)", err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		if said, _ := os.ReadFile(log.Name()); time.Since(begun) > 2*time.Minute || bytes.Contains(said, []byte("rror")) {
			return fmt.Errorf("%s is not at work: %s", args[0], said)
		}
	}
	time.Sleep(500 * time.Millisecond) // of work
	out, err := exec.CommandContext(ctx, b.criu, "dump", "-t", strconv.Itoa(cmd.Process.Pid), "-D", r.dir, "-o", "dump.log", "--manage-cgroups=ignore").CombinedOutput()
	if err != nil {
		said, _ := os.ReadFile(filepath.Join(r.dir, "dump.log"))
		return fmt.Errorf("%s dump: %w\n%s%s", b.criu, err, out, said[max(0, len(said)-2000):])
	}
	return errors.Join(os.Remove(ready), os.Remove(log.Name()))
}

// replicas stores ten processes of each application, one checkpoint after the other.
func replicas(ctx context.Context, b *bench, dir string) error {
	dumps, err := b.dump(ctx)
	if err != nil {
		return err
	}
	var allLogical, allStored int64
	for _, a := range applications {
		path := filepath.Join(dir, a.name)
		s, done, err := newStore(ctx, path)
		if err != nil {
			return err
		}
		var logical, stored int64
		for number, r := range dumps {
			if r.app != a.name {
				continue
			}
			c, err := s.Put(ctx, os.DirFS(r.dir), store.PutOptions{Alike: []string{a.name}})
			if err != nil {
				return errors.Join(err, done())
			}
			logical += c.LogicalBytes
			if number%replicaCount == 0 {
				report(a.name+"_first_stored_ratio", float64(c.NewBytes)/float64(c.LogicalBytes), "stored/logical")
			}
		}
		if stored, err = bytesIn(path); err != nil {
			return errors.Join(err, done())
		}
		if err := done(); err != nil {
			return err
		}
		report(a.name+"_replica_mib", float64(logical)/replicaCount/(1<<20), "MiB")
		report("replicas_stored_ratio_"+a.name, float64(stored)/float64(logical), "stored/logical")
		allLogical, allStored = allLogical+logical, allStored+stored
	}
	report("replicas_stored_ratio", float64(allStored)/float64(allLogical), "stored/logical")
	return nil
}
