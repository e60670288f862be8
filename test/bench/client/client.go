// Package client is a program's client, in a process of its own: it asks every
// millisecond and notes how long the answers take.
package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"podstasis.dev/stasis/test/bench/self"
)

// Command is the first argument of this program when it is to be a client; the
// address follows.
const Command = "client"

// every is how often a request is due.
const every = time.Millisecond

// patience is how long one answer is waited for.
const patience = time.Minute

// Seen is what a client has seen.
type Seen struct {
	Requests int // that were due and answered
	// Longest is the longest time between two answers.
	Longest time.Duration
	// P999 is the 99.9th percentile of the times from when a request was due to its
	// answer. One that was due while another one was waited for counts as if it had been
	// asked then and answered with the other: it is a client that was kept waiting, too.
	P999 time.Duration
}

// Run is the client: it asks until in ends, then writes what it has seen to out.
// Until the first connection is made it tries again and again; later ones count.
func Run(ctx context.Context, address string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		_, _ = io.Copy(io.Discard, in) // its end is all that matters
	}()
	var conn net.Conn
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	var seen Seen
	var took []time.Duration
	var due, last time.Time
	for ctx.Err() == nil {
		if conn == nil {
			var err error
			if conn, err = net.DialTimeout("tcp", address, 20*time.Millisecond); err != nil {
				time.Sleep(every)
				continue
			}
		}
		if due.IsZero() {
			due = time.Now()
		}
		time.Sleep(time.Until(due))
		if err := ask(conn); err != nil {
			conn.Close()
			conn = nil
			continue
		}
		now := time.Now()
		if !last.IsZero() {
			seen.Longest = max(seen.Longest, now.Sub(last))
		}
		last = now
		// What was due meanwhile would have been asked by others, and answered now.
		for ; !due.After(now); due = due.Add(every) {
			took = append(took, now.Sub(due))
		}
	}
	seen.Requests, seen.P999 = len(took), percentile(took, 0.999)
	return json.NewEncoder(out).Encode(seen)
}

func ask(conn net.Conn) error {
	message := []byte("touch...")
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := conn.Write(message); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, message)
	return err
}

// percentile is the value that a part of all are not above; 0 of none.
func percentile(of []time.Duration, part float64) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[min(int(float64(len(sorted))*part), len(sorted)-1)]
}

// Client is a client that runs.
type Client struct {
	process *self.Process
	address string
}

// Start starts a client of an address.
func Start(ctx context.Context, address string) (*Client, error) {
	p, err := self.Start(ctx, Command, address)
	return &Client{p, address}, err
}

// Stop ends the client and returns what it has seen; no answer at all is an error.
func (c *Client) Stop() (seen Seen, err error) {
	err = c.process.Stop(&seen)
	if err == nil && seen.Requests == 0 {
		err = fmt.Errorf("%s %s: nobody answered", Command, c.address)
	}
	return seen, err
}
