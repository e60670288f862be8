package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// strike is one kill, as the seed decides it.
type strike struct {
	component string
	node      int           // of the nodes, where the component has one on each
	amid      bool          // wait until something stands still on a node, and strike there
	delay     time.Duration // after that, or after the phase's begin
}

const (
	agent      = "agent"
	criu       = "CRIU"
	containerd = "containerd"
	kubelet    = "kubelet"
	controller = "controller"
	apiserver  = "kube-apiserver"
)

// The agent is what must never leave a Pod frozen, so it is struck most.
var targets = []string{agent, agent, agent, criu, criu, containerd, containerd, kubelet, kubelet, controller, apiserver}

func draw(random *rand.Rand, targets []string, nodes int) strike {
	s := strike{component: targets[random.IntN(len(targets))], node: random.IntN(nodes), amid: random.IntN(2) == 0}
	if s.delay = time.Duration(random.IntN(1500)) * time.Millisecond; s.amid {
		s.delay /= 10 // a Pod stands still for some 100 to 500 ms
	}
	return s
}

// damage is what the adversary did in a round, and what it saw.
type damage struct {
	mu      sync.Mutex
	kills   map[string]int
	hurt    map[string]bool // UIDs of Pods of which a CRIU was killed
	trapped map[string]bool // UIDs of those of them that lost a process and no container
	gaps    bool            // a containerd was killed: logs may lack lines
	killed  map[string]bool // nodes whose containerd was killed
	slowest time.Duration   // that a source stood still after a kill of the agent
	wrong   []error
}

func (d *damage) done(component, node string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kills[component]++
	if component == containerd {
		d.gaps, d.killed[node] = true, true
	}
}

func (d *damage) count(component string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kills[component]
}

func (d *damage) found(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wrong = append(d.wrong, err)
}

// attack strikes while phase is under way, and returns when the last strike's
// consequences have been looked at. Sources are the Pods, by UID, that must not
// stand still longer than 2 s after a kill of the agent.
func (s *soak) attack(ctx context.Context, strikes []strike, d *damage, sources map[string]bool, phase func(context.Context) error) error {
	during, over := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, strike := range strikes {
		wg.Go(func() {
			if err := s.strike(during, strike, d, sources); err != nil && during.Err() == nil {
				d.found(fmt.Errorf("killing %s: %w", strike.component, err))
			}
		})
	}
	err := phase(ctx)
	over()
	wg.Wait()
	return err
}

func (s *soak) strike(ctx context.Context, k strike, d *damage, sources map[string]bool) error {
	node := s.nodes.names()[k.node]
	switch {
	case k.component == criu:
		return s.killCRIU(ctx, k.delay/5, d)
	case k.amid:
		for found := false; !found; {
			if !pause(ctx, 5*time.Millisecond) {
				return nil
			}
			s.watcher.look()
			for c := range s.watcher.frozen() {
				node, found = c.node, true
			}
		}
	}
	if !pause(ctx, k.delay) {
		return nil
	}
	var err error
	switch k.component {
	case agent:
		return s.killAgent(node, d, sources)
	case controller:
		_, err = s.killPrograms(node, "stasis-controller")
	case apiserver:
		_, err = s.cluster.Devcluster(context.WithoutCancel(ctx), "kill", "control-plane", apiserver)
	default:
		_, err = s.cluster.Devcluster(context.WithoutCancel(ctx), "kill", node, k.component)
	}
	if err == nil {
		d.done(k.component, node)
	}
	// One that is being started again cannot be killed.
	if err != nil && !strings.Contains(err.Error(), "does not run") && !errors.Is(err, errNone) {
		return err
	}
	return nil
}

// pause waits, and says whether ctx still goes on.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

var errNone = errors.New("there is none at this moment")

// killPrograms kills a program in the containers of a node.
func (s *soak) killPrograms(node, program string) (at time.Time, err error) {
	processes, err := s.nodes.processes()
	if err != nil {
		return at, err
	}
	err = errNone
	for _, p := range processes {
		if p.node == node && !p.host && p.program() == program {
			at, err = time.Now(), unix.Kill(p.pid, unix.SIGKILL)
		}
	}
	return at, err
}

// thawWithin is P13's promise of how long a Pod stands still after the death of
// what froze it.
const thawWithin = 2 * time.Second

func (s *soak) killAgent(node string, d *damage, sources map[string]bool) error {
	at, err := s.killPrograms(node, "stasis-agent")
	if errors.Is(err, errNone) {
		return nil
	} else if err != nil {
		return err
	}
	d.done(agent, node)
	s.watcher.look()
	left := s.watcher.frozen()
	maps.DeleteFunc(left, func(c cgroup, _ time.Time) bool { return c.node != node || !sources[c.uid] })
	s.hit(len(left) > 0)
	for len(left) > 0 {
		time.Sleep(10 * time.Millisecond)
		now := s.watcher.frozen()
		maps.DeleteFunc(left, func(c cgroup, since time.Time) bool { return !now[c].Equal(since) })
		stood := time.Since(at)
		d.mu.Lock()
		d.slowest = max(d.slowest, stood)
		d.mu.Unlock()
		if stood > thawWithin && len(left) > 0 {
			return fmt.Errorf("still frozen %s after it: %v", stood, slices.Collect(maps.Keys(left)))
		}
	}
	return nil
}

// killCRIU kills the CRIUs of one capture.
func (s *soak) killCRIU(ctx context.Context, delay time.Duration, d *damage) error {
	for {
		all, err := s.captures("")
		if err != nil {
			return err
		}
		if len(all) > 0 {
			sandbox := all[0].capture()
			if !pause(ctx, delay) {
				return nil
			}
			if all, err = s.captures(sandbox); err != nil {
				return err
			}
			groups, err := s.nodes.cgroups()
			if err != nil {
				return err
			}
			for _, c := range groups {
				if c.id == sandbox && len(all) > 0 {
					d.mu.Lock()
					d.hurt[c.uid] = true
					d.mu.Unlock()
				}
			}
			for _, p := range all {
				if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
			if len(all) > 0 {
				d.done(criu, "")
				return nil
			}
		}
		if !pause(ctx, 10*time.Millisecond) {
			return nil
		}
	}
}

// captures are the CRIUs at work, of one sandbox or of all.
func (s *soak) captures(sandbox string) ([]process, error) {
	all, err := s.nodes.processes()
	return slices.DeleteFunc(all, func(p process) bool {
		of := p.capture()
		return of == "" || sandbox != "" && of != sandbox || !slices.Contains(p.args, "swrk")
	}), err
}
