// wire is a program whose TCP connections are never idle: pairs of them answer each
// other over loopback, and whoever connects to its port is read, whatever is sent.
//
//	wire serve PORT PAIRS
//	wire flood PORT CONNECTIONS
//
// Each pair counts: one end sends a number, the other answers with the next. wire prints
// how many rounds all pairs have done, ten times a second, and "BAD ..." if a number is not
// the one that was expected, or a pair's connection has ended.
//
// flood sends to a wire, a few bytes at a time and as fast as it can, until it is ended.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "wire:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("want serve|flood PORT COUNT, got %d arguments", len(args))
	}
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	switch args[0] {
	case "serve":
		return serve(args[1], count)
	case "flood":
		return flood(args[1], count)
	}
	return fmt.Errorf("%q is not serve or flood", args[0])
}

func serve(port string, pairs int) error {
	sink, err := listen(net.JoinHostPort("0.0.0.0", port))
	if err != nil {
		return err
	}
	go accept(sink, func(c net.Conn) { io.Copy(io.Discard, c) })
	echo, err := listen("127.0.0.1:0")
	if err != nil {
		return err
	}
	go accept(echo, answer)
	var rounds atomic.Uint64
	for range pairs {
		c, err := net.Dial("tcp4", echo.Addr().String())
		if err != nil {
			return err
		}
		go ask(c, &rounds)
	}
	for {
		fmt.Println(rounds.Load())
		time.Sleep(100 * time.Millisecond)
	}
}

func flood(port string, connections int) error {
	ended := make(chan error)
	for range connections {
		c, err := net.Dial("tcp4", net.JoinHostPort("127.0.0.1", port))
		if err != nil {
			return err
		}
		go func() {
			for {
				if err := send(c, 0); err != nil {
					ended <- err
					return
				}
				time.Sleep(time.Millisecond)
			}
		}()
	}
	return <-ended
}

// listen is net.Listen without multipath TCP, which CRIU does not know.
func listen(address string) (net.Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	return config.Listen(context.Background(), "tcp4", address)
}

func accept(l net.Listener, serve func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Println("BAD listener:", err)
			return
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

// answer sends each number back, and one more.
func answer(c net.Conn) {
	for {
		n, err := receive(c)
		if err == nil {
			err = send(c, n+1)
		}
		if err != nil {
			fmt.Println("BAD answering end:", err)
			return
		}
	}
}

// ask counts with the other end.
func ask(c net.Conn, rounds *atomic.Uint64) {
	for n := uint64(0); ; n++ {
		err := send(c, n)
		var got uint64
		if err == nil {
			got, err = receive(c)
		}
		if err != nil || got != n+1 {
			fmt.Printf("BAD asking end: %d after %d: %v\n", got, n, err)
			return
		}
		rounds.Add(1)
		// Longer than a delayed acknowledgement takes (40 ms), so that the kernel sends some
		// at any moment, also while processes stand still.
		time.Sleep(time.Duration(n%7) * 10 * time.Millisecond)
	}
}

func send(c net.Conn, n uint64) error {
	var message [8]byte
	binary.BigEndian.PutUint64(message[:], n)
	_, err := c.Write(message[:])
	return err
}

func receive(c net.Conn) (uint64, error) {
	var message [8]byte
	_, err := io.ReadFull(c, message[:])
	return binary.BigEndian.Uint64(message[:]), err
}
