package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/demo/exchange"
)

const (
	period   = 10 * time.Millisecond  // between two exchanges
	patience = 200 * time.Millisecond // before a message is sent again
	workers  = 4
)

// errDisagree is the end of a program that cannot go on with the other.
var errDisagree = errors.New("DISAGREE")

// counter is program a. Nothing of it is stored anywhere but the ledger's records.
type counter struct {
	out    io.Writer
	socket *net.UDPConn
	peer   netip.AddrPort
	ledger *os.File
	now    func() time.Time

	nonce  uint64
	last   exchange.Message // the exchange under way, or the last one
	closed exchange.Reply   // the last exchange that was answered
	checks uint64
	tally  [workers]atomic.Uint64 // one a thread
	seen   [workers]uint64
}

func run(ctx context.Context, out io.Writer) error {
	peer, err := netip.ParseAddrPort(addressB)
	if err != nil {
		return err
	}
	socket, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addressA)))
	if err != nil {
		return err
	}
	defer socket.Close()
	file, err := os.OpenFile(ledger, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	nonce, err := random()
	if err != nil {
		return err
	}
	c := &counter{out: out, socket: socket, peer: peer, ledger: file, now: time.Now, nonce: nonce}
	for i := range workers {
		go c.work(ctx, i)
	}
	return c.count(ctx)
}

// random draws from the kernel itself: the C library's and Go's generators keep
// state in memory, which two restored copies would share.
func random() (uint64, error) {
	var x uint64
	n, _, errno := unix.Syscall(unix.SYS_GETRANDOM, uintptr(unsafe.Pointer(&x)), unsafe.Sizeof(x), 0)
	if errno != 0 || n != unsafe.Sizeof(x) {
		return 0, fmt.Errorf("getrandom: %w", errno)
	}
	return x, nil
}

// work is a thread with a tally of its own.
func (c *counter) work(ctx context.Context, i int) {
	runtime.LockOSThread()
	for ctx.Err() == nil {
		c.tally[i].Add(1)
		time.Sleep(period)
	}
}

func (c *counter) status() string {
	return fmt.Sprintf("a t=%d count=%d peer=%d nonce=%016x checks=%d ok",
		c.now().UnixMicro(), c.last.Count, c.closed.Count, c.nonce, c.checks)
}

func (c *counter) disagree(format string, args ...any) error {
	// b is told, so that both start anew; if it does not hear it finds out itself.
	_, _ = c.socket.WriteToUDPAddrPort([]byte(exchange.Disagree), c.peer)
	return fmt.Errorf("%w count=%d nonce=%016x: %s", errDisagree, c.last.Count, c.nonce, fmt.Sprintf(format, args...))
}

// count makes one exchange after the other.
func (c *counter) count(ctx context.Context) error {
	for next := c.now(); ctx.Err() == nil; {
		if err := c.checkWorkers(); err != nil {
			return err
		}
		if err := c.begin(); err != nil {
			return err
		}
		if err := c.await(ctx); err != nil {
			return err
		}
		// A frozen program does not catch up on what it missed.
		if next = next.Add(period); c.now().After(next) {
			next = c.now().Add(period)
		}
		if err := c.serve(ctx, next); err != nil {
			return err
		}
	}
	return nil
}

// begin counts on, writes that to the ledger and to the log, and asks b.
func (c *counter) begin() error {
	if c.last.Count > 0 {
		// What was written last must still be what was written.
		was := make([]byte, exchange.RecordSize)
		if _, err := c.ledger.ReadAt(was, exchange.Offset(c.last.Count)); err != nil {
			return c.disagree("reading the ledger: %v", err)
		}
		if !bytes.Equal(was, c.last.Record()) {
			return c.disagree("the ledger's last record is %x, written was %x", was, c.last.Record())
		}
		c.checks++
	}
	token, err := random()
	if err != nil {
		return err
	}
	c.last = exchange.Message{Count: c.last.Count + 1, Token: token, Chain: c.closed.Chain}
	fmt.Fprintln(c.out, c.status())
	// Written on at the file's own position, which must be where the record belongs.
	if exchange.Offset(c.last.Count) == 0 {
		if _, err := c.ledger.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("rewinding the ledger: %w", err)
		}
	}
	position, err := c.ledger.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("asking for the position in the ledger: %w", err)
	}
	if position != exchange.Offset(c.last.Count) {
		return c.disagree("the position in the ledger is %d, must be %d", position, exchange.Offset(c.last.Count))
	}
	if _, err := c.ledger.Write(c.last.Record()); err != nil {
		return fmt.Errorf("writing the ledger: %w", err)
	}
	return nil
}

// await asks b until it has answered.
func (c *counter) await(ctx context.Context) error {
	for ctx.Err() == nil {
		// Not sent is not worse than lost: it is sent again.
		_, _ = c.socket.WriteToUDPAddrPort([]byte(c.last.String()), c.peer)
		if err := c.serve(ctx, c.now().Add(patience)); err != nil {
			return err
		}
		if c.closed.Count == c.last.Count {
			return nil
		}
	}
	return nil
}

// serve takes datagrams until the given time, or until the exchange under way is
// answered.
func (c *counter) serve(ctx context.Context, until time.Time) error {
	open := c.closed.Count != c.last.Count
	buffer := make([]byte, 256)
	for ctx.Err() == nil && (!open || c.closed.Count != c.last.Count) {
		if err := c.socket.SetReadDeadline(until); err != nil {
			return err
		}
		n, from, err := c.socket.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			continue // b is not there yet
		}
		if err != nil {
			return fmt.Errorf("receiving: %w", err)
		}
		switch text := string(buffer[:n]); {
		case text == exchange.Query:
			_, _ = c.socket.WriteToUDPAddrPort([]byte(c.status()), from) // who asks, asks again
		case text == exchange.Disagree:
			return fmt.Errorf("%w: b says so", errDisagree)
		default:
			if err := c.take(text); err != nil {
				return err
			}
		}
	}
	return nil
}

// take checks an answer of b.
func (c *counter) take(text string) error {
	reply, err := exchange.ParseReply(text)
	if err != nil {
		return c.disagree("%v", err)
	}
	if reply == c.closed {
		return nil // b answered twice because it was asked twice
	}
	if reply.Count != c.last.Count || reply.Token != c.last.Token {
		return c.disagree("b answers %q to %q", text, c.last)
	}
	if want := exchange.Extend(c.closed.Chain, reply.Count, reply.Token, reply.Answer); reply.Chain != want {
		return c.disagree("b's chain is %016x, must be %016x", reply.Chain, want)
	}
	c.closed = reply
	c.checks++
	return nil
}

// checkWorkers checks that no thread's tally went back.
func (c *counter) checkWorkers() error {
	for i := range workers {
		now := c.tally[i].Load()
		if now < c.seen[i] {
			return c.disagree("thread %d had counted to %d, now %d", i, c.seen[i], now)
		}
		c.seen[i] = now
	}
	return nil
}

// status asks the programs at addresses for their status lines.
func status(out io.Writer, addresses ...string) error {
	for _, address := range addresses {
		socket, err := net.Dial("udp4", address)
		if err != nil {
			return err
		}
		line, err := ask(socket)
		_ = socket.Close()
		if err != nil {
			return fmt.Errorf("asking %s: %w", address, err)
		}
		fmt.Fprintln(out, strings.TrimSpace(line))
	}
	return nil
}

func ask(socket net.Conn) (string, error) {
	var err error
	for range 10 {
		if _, err = io.WriteString(socket, exchange.Query); err != nil {
			continue
		}
		if err = socket.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		buffer := make([]byte, 256)
		var n int
		if n, err = socket.Read(buffer); err == nil {
			return string(buffer[:n]), nil
		}
	}
	return "", err
}
