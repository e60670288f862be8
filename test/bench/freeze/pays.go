package freeze

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/test/bench/app"
	seenby "podstasis.dev/stasis/test/bench/client"
	"podstasis.dev/stasis/test/bench/load"
)

// Seen is what a client saw that asked every millisecond, over the Pod's network.
type Seen struct {
	What, Key     string
	Longest, P999 []time.Duration
}

// Throughput is what a program got done after the thaw, as a part of what it got done
// before.
type Throughput struct {
	Key   string
	Ratio []float64
}

// writes are after how many pages that it sums up a program writes to one.
var writes = []struct {
	each int
	what string // as a part of Throughput's key
}{
	{1, ""},          // the limit: more than this nobody can
	{20, "_1_in_20"}, // 47,000 a second here: a core of a store in memory that is updated all the time
}

// paysShape is what a client talks to and what works.
var paysShape = gib1

const (
	before = 2 * time.Second // is looked at before a checkpoint
	after  = 3 * time.Second // and after it, and after a restore
)

// pays measures what a program and its client see of checkpoints and restores: once
// each.
func (h *hold) pays(ctx context.Context, report *Report) error {
	if err := h.clients(ctx, report); err != nil {
		return fmt.Errorf("what clients see: %w", err)
	}
	for _, w := range writes {
		if err := h.throughput(ctx, report, w.each, w.what); err != nil {
			return fmt.Errorf("what a program gets done: %w", err)
		}
	}
	if err := h.redis(ctx, report); err != nil {
		return fmt.Errorf("what Redis gets done: %w", err)
	}
	return nil
}

// paysFor says whether a contender is looked at. The kubelet's endpoint cannot be: containerd
// fails to checkpoint a container that has a connection.
func (h *hold) paysFor(c contender) bool {
	return c.place == h.pods && len(c.only) == 0 && c.key != "kubelet"
}

// address is where a Pod's first program answers.
func (s *podSubject) address(ctx context.Context) (string, error) {
	err := every(ctx, asking, "Pod "+s.pod.Name+" has an address", func() (bool, error) {
		err := s.pods.Get(ctx, client.ObjectKeyFromObject(s.pod), s.pod)
		return s.pod.Status.PodIP != "", err
	})
	return net.JoinHostPort(s.pod.Status.PodIP, strconv.Itoa(app.Port)), err
}

// clients has a client look on.
func (h *hold) clients(ctx context.Context, report *Report) (err error) {
	last := context.WithoutCancel(ctx)
	from, err := h.pods.pod(ctx, paysShape, nil)
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
	address, err := from.address(ctx)
	if err != nil {
		return err
	}
	err = h.sees(ctx, report, "nothing", "undisturbed", address, func() error {
		time.Sleep(before)
		return nil
	})
	if err != nil {
		return err
	}
	var checkpoints []taken
	defer func() {
		for _, c := range checkpoints {
			err = errors.Join(err, c.remove(last))
		}
	}()
	all := slices.DeleteFunc(h.contenders(), func(c contender) bool { return !h.paysFor(c) })
	for _, c := range all {
		if err := warm(paysShape); err != nil {
			return err
		}
		err := h.sees(ctx, report, "checkpoint: "+c.name, "checkpoint_"+c.key, address, func() error {
			time.Sleep(before)
			t, err := c.checkpoint(ctx, from)
			if err == nil {
				checkpoints = append(checkpoints, t)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := end(); err != nil {
		return err
	}
	for i, c := range all {
		for _, r := range c.restores {
			if err := h.seesRestore(ctx, report, r, checkpoints[i]); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	return nil
}

// sees starts a client, lets something happen and some time pass, and notes what it
// has seen.
func (h *hold) sees(ctx context.Context, report *Report, what, key, address string, happen func() error) error {
	c, err := seenby.Start(ctx, address)
	if err != nil {
		return err
	}
	err = happen()
	time.Sleep(after)
	seen, stopErr := c.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return err
	}
	h.say("a client, %s: longest gap %.1f ms, 99.9th percentile %.1f ms", what, ms(seen.Longest), ms(seen.P999))
	i := slices.IndexFunc(report.Seen, func(s *Seen) bool { return s.Key == key })
	if i < 0 {
		i = len(report.Seen)
		report.Seen = append(report.Seen, &Seen{What: what, Key: key})
	}
	s := report.Seen[i]
	s.Longest, s.P999 = append(s.Longest, seen.Longest), append(s.P999, seen.P999)
	return nil
}

// seesRestore has a client connect as soon as the restored Pod can be reached.
func (h *hold) seesRestore(ctx context.Context, report *Report, r restoration, from taken) (err error) {
	if err := warm(paysShape); err != nil {
		return err
	}
	got, err := r.restore(ctx, from)
	if got.subject != nil {
		defer func() { err = errors.Join(err, got.end(context.WithoutCancel(ctx))) }()
	}
	if err != nil {
		return err
	}
	address, err := got.subject.(*podSubject).address(ctx)
	if err != nil {
		return err
	}
	return h.sees(ctx, report, "after a restore: "+r.name, "restore_"+r.key, address, func() error { return nil })
}

// throughput has a program work on its memory, and counts.
func (h *hold) throughput(ctx context.Context, report *Report, each int, what string) (err error) {
	last := context.WithoutCancel(ctx)
	workers := *h.pods
	workers.args, workers.cgroup = []string{"work", strconv.Itoa(each)}, "" // its class is another
	workers.cpu = "1"                                                       // it works all the time: without it, it would get what nobody else wants
	defer func() { h.pods.count = workers.count }()
	from, err := workers.pod(ctx, paysShape, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.end(last)) }()
	if err := settled(ctx, from); err != nil {
		return err
	}
	address, err := from.address(ctx)
	if err != nil {
		return err
	}
	for _, c := range h.contenders() {
		if !h.paysFor(c) {
			continue
		}
		// Images take as much as there is, and so do copies of what is written to.
		if err := warm(Shape{2 * paysShape.Containers, paysShape.MiB}); err != nil {
			return err
		}
		done, err := throughputOf(ctx, c, from, address)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		h.gotDone(report, c.key+"_throughput"+what, done)
	}
	return nil
}

// gotDone notes what was got done.
func (h *hold) gotDone(report *Report, key string, done []got) {
	for _, d := range done {
		h.say("%s: %.0f%%", key+d.until, 100*d.ratio)
		report.throughput(key+d.until, d.ratio)
	}
}

func (r *Report) throughput(key string, ratio float64) {
	i := slices.IndexFunc(r.Throughput, func(t *Throughput) bool { return t.Key == key })
	if i < 0 {
		i = len(r.Throughput)
		r.Throughput = append(r.Throughput, &Throughput{Key: key})
	}
	r.Throughput[i].Ratio = append(r.Throughput[i].Ratio, ratio)
}

// got is what was got done from the thaw until a moment, as a part of the usual.
type got struct {
	until string // as a part of Throughput's key: nothing, until the checkpoint was Ready
	ratio float64
}

// throughputOf returns what was got done until the checkpoint was Ready and, where memory
// is read while the program runs, until that had been read.
func throughputOf(ctx context.Context, c contender, from *podSubject, address string) (all []got, err error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop, stopped := make(chan struct{}), make(chan error, 1)
	var samples []load.Sample
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			case <-time.After(5 * time.Millisecond):
			}
			message := []byte("work....")
			if _, err := conn.Write(message); err != nil {
				stopped <- err
				return
			}
			if _, err := io.ReadFull(conn, message); err != nil {
				stopped <- err
				return
			}
			samples = append(samples, load.Sample{At: time.Now(), Done: binary.LittleEndian.Uint64(message)})
		}
	}()
	time.Sleep(before)
	begun := time.Now()
	t, err := c.checkpoint(ctx, from)
	ready := time.Now()
	time.Sleep(200 * time.Millisecond)
	close(stop)
	if err := errors.Join(err, <-stopped); err != nil {
		return nil, err
	}
	reading, frozen := t.(*podTaken).reading(), t.(*podTaken).reported()
	if err := errors.Join(t.remove(ctx), from.found[0].Flush(ctx)); err != nil {
		return nil, err
	}
	// Not the longest: a busy machine can have it stand still for longer, later.
	gap, err := from.found[0].Nearest(frozen, begun, ready)
	if err != nil {
		return nil, err
	}
	return shares(samples, begun, gap.To, reading, ready)
}

// shares are of what was got done until the checkpoint was Ready and, where memory was read
// while the program ran, until that had been read.
func shares(samples []load.Sample, begun, thaw time.Time, reading time.Duration, ready time.Time) (all []got, err error) {
	usual, err := rate(samples, begun.Add(-before), begun)
	if err != nil {
		return nil, err
	}
	add := func(until string, to time.Time) error {
		paying, err := rate(samples, thaw, to)
		all = append(all, got{until, paying / usual})
		return err
	}
	if reading > 0 {
		err = add("_while_read", thaw.Add(reading))
	}
	return all, errors.Join(err, add("", ready))
}

// rate is what got done in a second, between the first and the last sample within a
// time.
func rate(samples []load.Sample, from, to time.Time) (float64, error) {
	var within []load.Sample
	for _, s := range samples {
		if s.At.After(from) && s.At.Before(to) {
			within = append(within, s)
		}
	}
	if len(within) < 2 {
		return 0, fmt.Errorf("the program was asked %d times within %s how far it is", len(within), to.Sub(from).Round(time.Millisecond))
	}
	first, last := within[0], within[len(within)-1]
	return float64(last.Done-first.Done) / last.At.Sub(first.At).Seconds(), nil
}
