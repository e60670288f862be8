package main

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	rings, members = 50, 100
	timers         = 2000
	connections    = 50
)

// fault is the first thing that was found to be wrong.
type fault struct {
	once sync.Once
	text atomic.Pointer[string]
}

func (f *fault) say(format string, args ...any) {
	f.once.Do(func() { f.text.Store(new(fmt.Sprintf(format, args...))) })
}

func goroutines() (func() string, error) {
	var wrong fault
	var passes, fired, echoes atomic.Uint64
	for range rings {
		ring(&wrong, &passes)
	}
	for i := range timers {
		timer(&wrong, &fired, time.Duration(50+i%200)*time.Millisecond)
	}
	var ports []string
	for range connections {
		port, err := echo(&wrong, &echoes)
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	nonce := rand.Text()
	return func() string {
		if text := wrong.text.Load(); text != nil {
			return "wrong=" + *text + "\n"
		}
		return fmt.Sprintf("nonce=%s\nconnections=%s\npasses=%d\nfired=%d\nechoes=%d\n",
			nonce, strings.Join(ports, ","), passes.Load(), fired.Load(), echoes.Load())
	}, nil
}

// ring passes a number around; each member adds one.
func ring(wrong *fault, passes *atomic.Uint64) {
	first := make(chan uint64)
	last := first
	for range members - 1 {
		in, out := last, make(chan uint64)
		go func() {
			for n := range in {
				out <- n + 1
			}
		}()
		last = out
	}
	go func() {
		for n := uint64(0); ; n += members {
			first <- n
			if got := <-last; got != n+members-1 {
				wrong.say("a ring of %d brought %d back as %d", members, n, got)
			}
			passes.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
}

// timer fires again and again, never before its time.
func timer(wrong *fault, fired *atomic.Uint64, after time.Duration) {
	begin := time.Now()
	time.AfterFunc(after, func() {
		if took := time.Since(begin); took < after {
			wrong.say("a timer of %s fired after %s", after, took)
		}
		fired.Add(1)
		timer(wrong, fired, after)
	})
}

// echo sends numbers over a loopback connection and has them come back in order.
func echo(wrong *fault, echoes *atomic.Uint64) (port string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	near, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		return "", err
	}
	far, err := listener.Accept()
	if err != nil {
		return "", err
	}
	go func() {
		_, err := io.Copy(far, far)
		wrong.say("the far end of a connection: %v", err)
	}()
	go func() {
		buffer := make([]byte, 8)
		for n := uint64(0); ; n++ {
			binary.BigEndian.PutUint64(buffer, n)
			if _, err := near.Write(buffer); err != nil {
				wrong.say("a connection: %v", err)
				return
			}
			if _, err := io.ReadFull(near, buffer); err != nil {
				wrong.say("a connection: %v", err)
				return
			}
			if got := binary.BigEndian.Uint64(buffer); got != n {
				wrong.say("echo %d of %d", got, n)
				return
			}
			echoes.Add(1)
			time.Sleep(10 * time.Millisecond)
		}
	}()
	_, port, err = net.SplitHostPort(near.LocalAddr().String())
	return port, err
}
