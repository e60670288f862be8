package client

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"testing"
	"time"
)

// played is a server that answers, but pauses for a while before one of its answers, and
// says when it has given as many again.
func played(t *testing.T, pauseAt int, pause time.Duration, enough func()) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		message := make([]byte, 8)
		for n := 0; ; n++ {
			if _, err := io.ReadFull(conn, message); err != nil {
				return
			}
			if n == pauseAt {
				time.Sleep(pause)
			}
			if _, err := conn.Write(message); err != nil {
				return
			}
			if n == 2*pauseAt {
				enough()
			}
		}
	}()
	return l.Addr().String()
}

func TestAClientSeesAPauseAndAllWhoWereKeptWaiting(t *testing.T) {
	const pause = 300 * time.Millisecond
	in, end := io.Pipe()
	var out bytes.Buffer
	if err := Run(t.Context(), played(t, 100, pause, func() { end.Close() }), in, &out); err != nil {
		t.Fatal(err)
	}
	var seen Seen
	if err := json.Unmarshal(out.Bytes(), &seen); err != nil {
		t.Fatal(err)
	}
	if seen.Longest < pause || seen.Requests < 401 {
		t.Errorf("a pause of %s shows as %+v", pause, seen)
	}
	// One answer was late; but three hundred were due meanwhile.
	if seen.P999 < pause/2 || seen.P999 > seen.Longest {
		t.Errorf("of those who were kept waiting for %s, the 99.9th percentile is %s", pause, seen.P999)
	}
}

func TestPercentiles(t *testing.T) {
	var of []time.Duration
	for n := range 1000 {
		of = append(of, time.Duration(1000-n))
	}
	if got := percentile(of, 0.999); got != 1000 {
		t.Errorf("got %d", got)
	}
	if got := percentile(of, 0.5); got != 501 {
		t.Errorf("got %d", got)
	}
	if got := percentile(nil, 0.5); got != 0 {
		t.Errorf("of nothing: %d", got)
	}
}
