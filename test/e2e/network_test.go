package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// P27: what a Pod has with others. They go on with the source.
func TestConnectionsToOtherPodsEndOnTheRestoredSideAlone(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.running(MakePod("peer").Container("echo", imageSubject, "subject", "echo").Obj())
	dialing := func(name string) *podBuilder {
		return MakePod(name).Container("dial", imageSubject, "subject", "dial", s.pod("peer").Status.PodIP)
	}
	s.running(dialing("source").Obj())
	s.says("source", "dial: tcp 20\n")
	s.checkpoint("one", "source")
	s.running(dialing("restored").RestoreFrom("one").Obj())

	s.says("restored",
		"dial: ended: connection reset by peer\n",
		`dial: unread was "hello", then: connection reset by peer`, // what had come is not lost
		"dial: connected\n", // anew
		"dial: tcp 20\n",
		"dial: udp ", // from the new address
	)
	// It listens where it is now, and nowhere else.
	if out, err := s.exec("peer", "echo", "subject", "reach", s.pod("restored").Status.PodIP+":9001"); err != nil || out != "hello" {
		t.Errorf("the restored Pod says %q at its own address, %v", out, err)
	}
	// The source has noticed nothing.
	said := s.logs("source", "dial")
	s.eventually("the source speaks on", func() error {
		if now := s.logs("source", "dial"); !strings.Contains(strings.TrimPrefix(now, said), "dial: tcp") {
			return fmt.Errorf("since then %q", strings.TrimPrefix(now, said))
		}
		return nil
	})
	if log := s.logs("source", "dial"); strings.Contains(log, "ended") || strings.Count(log, "connected") != 1 {
		t.Errorf("a connection of the source ended: %s", log)
	}
	s.unharmed("source")
}

// says waits until a Pod's only container has logged all of this, in this order.
func (s *scene) says(pod string, wanted ...string) {
	s.Helper()
	s.eventually(pod+" says what it should", func() error {
		log := s.logs(pod, s.pod(pod).Spec.Containers[0].Name)
		rest := log
		for _, w := range wanted {
			_, after, found := strings.Cut(rest, w)
			if !found {
				return fmt.Errorf("%q is not there (in this place): %s", w, log)
			}
			rest = after
		}
		return nil
	})
}
