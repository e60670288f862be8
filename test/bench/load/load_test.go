package load

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// played is a server that knows what GET and SET are, and notes which keys it was asked for.
type played struct {
	address string

	mu         sync.Mutex
	gets, sets map[string]int
}

func play(t *testing.T, answers func(command, key string) string) *played {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &played{address: l.Addr().String(), gets: map[string]int{}, sets: map[string]int{}}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(t, conn, answers)
		}
	}()
	return p
}

func (p *played) serve(t *testing.T, conn net.Conn, answers func(command, key string) string) {
	defer conn.Close()
	in, out := bufio.NewReader(conn), bufio.NewWriter(conn)
	for {
		var words []string
		var n int
		if _, err := fmt.Fscanf(in, "*%d\r\n", &n); err != nil {
			return // the client has closed it, or was cut
		}
		for range n {
			var size int
			if _, err := fmt.Fscanf(in, "$%d\r\n", &size); err != nil {
				return
			}
			word := make([]byte, size+2)
			if _, err := io.ReadFull(in, word); err != nil {
				return
			}
			words = append(words, strings.TrimSuffix(string(word), "\r\n"))
		}
		p.mu.Lock()
		switch {
		case n == 2 && words[0] == "GET":
			p.gets[words[1]]++
		case n == 3 && words[0] == "SET" && len(words[2]) == valueSize:
			p.sets[words[1]]++
		default:
			t.Errorf("the server is asked %.3q", words)
		}
		p.mu.Unlock()
		fmt.Fprint(out, answers(words[0], words[1]))
		if in.Buffered() == 0 {
			if out.Flush() != nil {
				return
			}
		}
	}
}

func right(command, _ string) string {
	if command == "SET" {
		return "+OK\r\n"
	}
	return fmt.Sprintf("$%d\r\n%s\r\n", valueSize, strings.Repeat("v", valueSize))
}

func run(t *testing.T, address string, rate float64, length time.Duration) ([]Sample, error) {
	in, end := io.Pipe()
	time.AfterFunc(length, func() { end.Close() })
	var out bytes.Buffer
	if err := Run(t.Context(), address, rate, in, &out); err != nil {
		return nil, err
	}
	var samples []Sample
	return samples, json.Unmarshal(out.Bytes(), &samples)
}

func TestClientsKeepTheirRateAndUpdateWithHalfOfTheirRequests(t *testing.T) {
	p := play(t, right)
	const rate = 6400
	samples, err := run(t, p.address, rate, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	first, last := samples[0], samples[len(samples)-1]
	due := rate * last.At.Sub(first.At).Seconds()
	// The last batches may be on their way; nobody is ahead of time.
	if got := float64(last.Done - first.Done); got < due/2 || got > due+clients*batch {
		t.Errorf("%g requests were answered within %s, where %g were due", got, last.At.Sub(first.At), due)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	gets, sets := 0, 0
	for _, n := range p.gets {
		gets += n
	}
	for _, n := range p.sets {
		sets += n
	}
	if all := gets + sets; sets < all*2/5 || sets > all*3/5 {
		t.Errorf("of %d requests %d were updates", all, sets)
	}
	if len(p.sets) < sets*9/10 {
		t.Errorf("%d updates were of %d keys", sets, len(p.sets))
	}
}

func TestClientsWithoutARateAskAsOftenAsTheyAreAnswered(t *testing.T) {
	p := play(t, right)
	samples, err := run(t, p.address, 0, 500*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	asked := 0
	for _, of := range []map[string]int{p.gets, p.sets} {
		for _, n := range of {
			asked += n
		}
	}
	if done := int(samples[len(samples)-1].Done); done < 10*batch || done > asked {
		t.Errorf("%d requests are said to be answered, %d were made", done, asked)
	}
}

func TestAServerThatFailsIsTold(t *testing.T) {
	for _, answer := range []string{"-OOM command not allowed\r\n", "$-1\r\n", "\r\n", "$1\r\nv\r\n"} {
		p := play(t, func(string, string) string { return answer })
		_, err := run(t, p.address, 0, time.Minute)
		if err == nil || !strings.Contains(err.Error(), "the server") {
			t.Errorf("a server that answers %q: %v", answer, err)
		}
	}
}

func TestFillSetsEachKeyOnce(t *testing.T) {
	p := play(t, right)
	const keys = 1000
	if err := Fill(t.Context(), p.address, keys); err != nil {
		t.Fatal(err)
	}
	if len(p.sets) != keys || len(p.gets) != 0 {
		t.Errorf("%d keys were set, %d asked for", len(p.sets), len(p.gets))
	}
	for key, n := range p.sets {
		if n != 1 {
			t.Fatalf("%s was set %d times", key, n)
		}
	}
}
