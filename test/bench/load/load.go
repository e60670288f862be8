// Package load has clients ask a Redis server, in a process of its own, as YCSB's workload
// A does: half of the requests update a value, half of them read one (Cooper et al.,
// Benchmarking Cloud Serving Systems with YCSB, 2010). All keys are as likely as each
// other, which touches the most pages.
package load

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"podstasis.dev/stasis/test/bench/self"
)

// Command is the first argument of this program when it is to be the clients; the address
// and the rate follow.
const Command = "load"

const (
	// Keys and valueSize make 1.1 GB in the server.
	Keys      = 1_000_000
	valueSize = 900

	clients = 8
	batch   = 16 // requests that a client sends before it reads the answers
	each    = 2 * time.Millisecond
)

// Sample is how many requests had been answered at a moment.
type Sample struct {
	At   time.Time
	Done uint64
}

// Fill sets the first keys, and returns when the server has answered to each.
func Fill(ctx context.Context, address string, keys int) error {
	c, err := dial(ctx, address)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	const most = 256
	for key := 0; key < keys; key += most {
		n := min(most, keys-key)
		for i := range n {
			c.set(key + i)
		}
		if err := c.ask(n); err != nil {
			return fmt.Errorf("fill %s: %w", address, err)
		}
	}
	return nil
}

// Run has the clients ask until in ends, then writes the samples to out. Together they send
// so many requests a second, whatever the answers take, or as many as are answered if the
// rate is 0.
func Run(ctx context.Context, address string, rate float64, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		_, _ = io.Copy(io.Discard, in) // its end is all that matters
		cancel(errEnd)
	}()
	var done atomic.Uint64
	var all sync.WaitGroup
	for n := range clients {
		c, err := dial(ctx, address)
		if err != nil {
			cancel(err)
			break
		}
		all.Go(func() {
			defer c.conn.Close()
			if err := c.work(ctx, n, rate, &done); err != nil {
				cancel(err)
			}
		})
	}
	var samples []Sample
	for tick := time.NewTicker(each); ctx.Err() == nil; {
		select {
		case <-ctx.Done():
			tick.Stop()
		case <-tick.C:
			samples = append(samples, Sample{time.Now(), done.Load()})
		}
	}
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, errEnd) {
		return err
	}
	return json.NewEncoder(out).Encode(samples)
}

var errEnd = errors.New("that was all")

// client is a connection.
type client struct {
	conn  net.Conn
	in    *bufio.Reader
	out   []byte // requests that have not been sent
	value []byte
}

func dial(ctx context.Context, address string) (*client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), value: make([]byte, valueSize)}
	for i := range c.value {
		c.value[i] = byte('a' + rand.IntN(26))
	}
	return c, nil
}

// work asks until the context ends. With a rate each batch has a time at which it is due, and
// one that is late does not put off the next.
func (c *client) work(ctx context.Context, number int, rate float64, done *atomic.Uint64) error {
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	var every time.Duration
	if rate > 0 {
		every = time.Duration(float64(time.Second) * clients * batch / rate)
	}
	due := time.Now().Add(every * time.Duration(number) / clients)
	for ; ctx.Err() == nil; due = due.Add(every) {
		if rate > 0 {
			time.Sleep(time.Until(due))
		}
		for range batch {
			if key := rand.IntN(Keys); rand.IntN(2) == 0 {
				c.set(key)
			} else {
				c.get(key)
			}
		}
		if err := c.ask(batch); err != nil && ctx.Err() == nil {
			return err
		}
		done.Add(batch)
	}
	return nil
}

// Requests are arrays of strings in Redis' protocol (RESP2, redis.io/docs/reference/protocol-spec).

const keySize = 12

func (c *client) set(key int) {
	c.value[rand.IntN(valueSize)] = byte('a' + rand.IntN(26))
	c.out = append(c.out, "*3\r\n$3\r\nSET\r\n"...)
	c.key(key)
	c.out = append(c.out, '$')
	c.out = strconv.AppendInt(c.out, valueSize, 10)
	c.out = append(c.out, "\r\n"...)
	c.out = append(c.out, c.value...)
	c.out = append(c.out, "\r\n"...)
}

func (c *client) get(key int) {
	c.out = append(c.out, "*2\r\n$3\r\nGET\r\n"...)
	c.key(key)
}

func (c *client) key(key int) {
	c.out = fmt.Appendf(c.out, "$%d\r\nkey:%0*d\r\n", keySize, keySize-len("key:"), key)
}

// ask sends what is to be sent, and reads the answers to so many requests.
func (c *client) ask(n int) error {
	_, err := c.conn.Write(c.out)
	c.out = c.out[:0]
	for ; n > 0 && err == nil; n-- {
		err = c.answer()
	}
	return err
}

func (c *client) answer() error {
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	line = bytes.TrimSuffix(line, []byte("\r\n"))
	if len(line) == 0 {
		return errors.New("the server gives an answer that is empty")
	}
	switch line[0] {
	case '+':
		return nil
	case '$':
		n, err := strconv.Atoi(string(line[1:]))
		if err == nil && n == valueSize {
			_, err = c.in.Discard(n + len("\r\n"))
			return err
		}
	}
	return fmt.Errorf("the server answers %q", line)
}

// Load are clients that ask.
type Load struct{ process *self.Process }

// Start has clients ask so many times a second; 0 is as often as they can.
func Start(ctx context.Context, address string, rate float64) (*Load, error) {
	p, err := self.Start(ctx, Command, address, strconv.FormatFloat(rate, 'f', 0, 64))
	return &Load{p}, err
}

// Stop ends the clients and returns what was answered, as it was looked at every two
// milliseconds.
func (l *Load) Stop() (samples []Sample, err error) {
	err = l.process.Stop(&samples)
	return samples, err
}
