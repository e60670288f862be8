package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// A Pod that others are connected to: "echo" answers whoever speaks, "dial" speaks to
// it without end and says what becomes of its connections.

const (
	echoPort = "9000"
	ownPort  = "9001" // where dial listens, at the Pod's own address
	greeting = "hello"
)

// echo sends back what comes, by TCP after a greeting, and by UDP.
func echo(ctx context.Context) error {
	listener, err := listenTCP(ctx, ":"+echoPort)
	if err != nil {
		return err
	}
	packets, err := net.ListenPacket("udp", ":"+echoPort)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 1024)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			packets.WriteTo(buf[:n], from)
		}
	}()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.WriteString(conn, greeting)
				io.Copy(conn, conn)
			}()
		}
	}()
	fmt.Println("echo: listening")
	<-ctx.Done()
	return nil
}

// dial keeps a connection busy, leaves what came on another unread until the first
// one ends, listens at the Pod's own address, and has a UDP socket that is connected.
func dial(ctx context.Context, host string) error {
	address := net.JoinHostPort(host, echoPort)
	listener, err := listenTCP(ctx, net.JoinHostPort(podAddress(), ownPort))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, greeting)
			conn.Close()
		}
	}()
	packets, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	unread, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	for busy := 0; ctx.Err() == nil; busy++ {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, make([]byte, len(greeting))); err != nil {
			return err
		}
		fmt.Println("dial: connected")
		err = speak(ctx, conn, packets)
		if ctx.Err() != nil {
			return nil
		}
		fmt.Println("dial: ended:", reason(err))
		if busy == 0 {
			data, err := io.ReadAll(unread)
			fmt.Printf("dial: unread was %q, then: %s\n", data, reason(err))
		}
	}
	return nil
}

func reason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return fmt.Sprint(err)
}

func speak(ctx context.Context, conn, packets net.Conn) error {
	for n := uint64(0); ctx.Err() == nil; n++ {
		if err := say(conn, n); err != nil {
			return err
		}
		if heard, err := hear(conn); err != nil {
			return err
		} else if heard != n {
			return fmt.Errorf("heard %d, expected %d", heard, n)
		}
		if n%20 == 0 {
			fmt.Println("dial: tcp", n)
			if err := say(packets, n); err != nil {
				return fmt.Errorf("udp: %w", err)
			}
			packets.SetReadDeadline(time.Now().Add(time.Second))
			for heard, err := hear(packets); err == nil; heard, err = hear(packets) {
				if heard == n { // and not the answer to an earlier one, which came late
					fmt.Println("dial: udp", n)
					break
				}
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// reach prints what somebody says first.
func reach(address string) error {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, conn)
	return err
}

// plug holds one end of a Unix connection: it makes the socket and accepts, or dials.
func plug(ctx context.Context, part, path string) error {
	if part == "dial" {
		awaitFile(path)
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Println("plug: connected")
	} else {
		listener, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
	}
	<-ctx.Done()
	return nil
}
