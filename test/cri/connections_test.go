package cri_test

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// flood sends to a port of a Pod, over its loopback but from outside its containers, until
// the test has ended.
func (p *pod) flood(t *testing.T, port, connections int) {
	t.Helper()
	cmd := exec.Command("nsenter", "--net", "--target", p.processes(t)[0], built(t, "wire"), "flood", strconv.Itoa(port), strconv.Itoa(connections))
	var said strings.Builder
	cmd.Stderr = &said
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		select {
		case err := <-ended:
			t.Errorf("the flood ended: %v: %s", err, said.String())
		default:
			cmd.Process.Kill()
			<-ended
		}
	})
}

// talks waits until the pairs of a wire have done some more rounds, and nothing is wrong.
func (p *pod) talks(t *testing.T, container string, more int) {
	t.Helper()
	first := -1
	eventually(t, container+" counts on", func() bool {
		lines := p.lines(t, container)
		for _, line := range lines {
			if strings.HasPrefix(line, "BAD") {
				t.Fatalf("container %s: %s", container, line)
			}
		}
		if len(lines) == 0 {
			return false
		}
		last, err := strconv.Atoi(lines[len(lines)-1])
		must(t, err)
		if first < 0 {
			first = last
		}
		return last >= first+more
	})
}

func TestConnectionsAreCapturedWhileOthersSend(t *testing.T) {
	p := theNode.run(t, "", theNode.running(t, "a", "wire", "serve", "7000", "30"))
	p.talks(t, "a", 100)
	p.flood(t, 7000, 200)
	var last string
	for _, mode := range []string{"cow", "plain", "cow"} {
		last, _ = p.checkpointWith(t, map[string]string{"capture": mode})
		p.talks(t, "a", 100)
	}
	// It would succeed in the end, after having frozen the Pod again and again.
	for _, line := range p.logged(t, "a TCP connection went on") {
		t.Error(line)
	}
	restored := theNode.restore(t, last, p.configs...)
	restored.talks(t, "a", 100)
	p.talks(t, "a", 100)
}
