package servers

import (
	"net"
	"sync"
	"testing"
)

// Line passes what clients and a server send each other, and can be cut and held up. It
// ends with the test.
type Line struct {
	net.Listener
	to string

	mu      sync.Mutex
	changed *sync.Cond
	sent    int64 // by all clients, as far as it was let through
	cut     int64 // bytes after which a connection is cut; 0: none is
	cuts    int
	hold    int64 // what may be sent in all; negative: anything
	held    bool
}

// NewLine makes a line to a server, at an IP address of this machine.
func NewLine(t testing.TB, host, to string) *Line {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	line := &Line{Listener: l, to: to, hold: -1}
	line.changed = sync.NewCond(&line.mu)
	t.Cleanup(func() {
		l.Close()
		line.Release()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go line.pass(client)
		}
	}()
	return line
}

// CutAfter cuts the first connection whose client has sent more than so many bytes.
func (l *Line) CutAfter(bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = bytes
}

// Cuts is how many connections were cut.
func (l *Line) Cuts() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cuts
}

// HoldAfter lets so many bytes more of the clients through, and then none until Release.
func (l *Line) HoldAfter(bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hold, l.held = l.sent+bytes, false
}

// Held says that something waits to be let through.
func (l *Line) Held() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// Release lets everything through again. Connections that were held up are cut.
func (l *Line) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hold, l.held = -1, false
	l.changed.Broadcast()
}

// Sent is how many bytes of clients were let through.
func (l *Line) Sent() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

// may waits until n bytes of a client that has sent so many may pass; false cuts its
// connection.
func (l *Line) may(n int, before int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut > 0 && before+int64(n) > l.cut {
		l.cut = 0
		l.cuts++
		return false
	}
	if l.hold >= 0 && l.sent+int64(n) > l.hold {
		l.held = true
		for l.hold >= 0 {
			l.changed.Wait()
		}
		return false
	}
	l.sent += int64(n)
	return true
}

func (l *Line) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", l.to)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		defer client.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := server.Read(buf)
			if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 32<<10)
	for passed := int64(0); ; {
		n, err := client.Read(buf)
		if n > 0 {
			if !l.may(n, passed) {
				return
			}
			passed += int64(n)
			if _, err := server.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
