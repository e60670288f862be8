package web

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// pipe returns both ends of a connection, the first of them watched.
func pipe(t *testing.T, silence time.Duration) (net.Conn, net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close(); far.Close() })
	return &watched{Conn: near, silence: silence}, far
}

func TestAConnectionOnWhichNothingMovesIsBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for what, call := range map[string]func(net.Conn, []byte) (int, error){"read": net.Conn.Read, "write": net.Conn.Write} {
			near, _ := pipe(t, 20*time.Millisecond) // a write ends reads, too
			failed := make(chan error, 1)
			go func() {
				_, err := call(near, make([]byte, 1))
				failed <- err
			}()
			var timeout net.Error
			select {
			case err := <-failed:
				if !errors.As(err, &timeout) || !timeout.Timeout() {
					t.Errorf("%s: %v, want a timeout", what, err)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("%s: still waiting", what)
			}
		}
	})
}

func TestATransferThatGoesOnMayTakeAsLongAsItWants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := pipe(t, 500*time.Millisecond)
		answered := make(chan error, 1)
		go func() { // the client waits for the answer all along
			_, err := near.Read(make([]byte, 1))
			answered <- err
		}()
		go func() {
			io.CopyN(io.Discard, far, 10)
			far.Write([]byte("x"))
		}()
		for range 10 {
			time.Sleep(100 * time.Millisecond)
			if _, err := near.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-answered; err != nil {
			t.Errorf("the answer after a long upload: %v", err)
		}
	})
}

func TestRetryAfterIsReadInBothItsForms(t *testing.T) {
	for value, want := range map[string]time.Duration{"": 0, "17": 17 * time.Second, "-1": 0, "soon": 0, "9999999": 24 * time.Hour, "Mon, 02 Jan 2006 15:04:05 GMT": 0} {
		if got := RetryAfter(http.Header{"Retry-After": {value}}); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
	at := time.Now().Add(time.Minute).UTC().Format(http.TimeFormat)
	if got := RetryAfter(http.Header{"Retry-After": {at}}); got < 50*time.Second || got > time.Minute {
		t.Errorf("%s: %s", at, got)
	}
}

func TestAServerThatIsNotTrustedIsRefused(t *testing.T) {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	client, err := Client(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Get(server.URL)
	if err := Classify(t.Context(), err); !errors.Is(err, backend.ErrDenied) {
		t.Errorf("a server of an unknown CA: %v, want ErrDenied", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Classify(ended, errors.New("broken")); !errors.Is(err, context.Canceled) {
		t.Errorf("an error of a context that has ended: %v", err)
	}
	if _, err := Client(bytes.Repeat([]byte("x"), 10)); err == nil {
		t.Error("a CA that is none was taken")
	}
}
