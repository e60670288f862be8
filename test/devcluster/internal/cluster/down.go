package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"podstasis.dev/stasis/test/devcluster/internal/cgroup"
	"podstasis.dev/stasis/test/devcluster/internal/cri"
	"podstasis.dev/stasis/test/devcluster/internal/kube"
	"podstasis.dev/stasis/test/devcluster/internal/network"
	"podstasis.dev/stasis/test/devcluster/internal/node"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

// Down ends the cluster whose state is in dir, an absolute path, and leaves nothing of it
// but the logs; whatever state it is in, and also when it has been brought up only in part.
func Down(ctx context.Context, dir string) error {
	if os.Geteuid() != 0 {
		return errors.New("not root: a cluster's processes and mounts are root's; run this with sudo")
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := lockState(dir)
	if err != nil {
		return err
	}
	defer unlock()
	return clear(ctx, dir)
}

func clear(ctx context.Context, dir string) error {
	c, err := plan.Load(dir)
	if err != nil {
		// Names follow from the directory alone: all can be found without a description.
		c = plan.Cluster{ID: plan.ID(dir), Dir: dir}
	}
	r := Running{c}
	groups, err := cgroup.Find()
	if err != nil {
		return err
	}
	// In good order as far as that goes; what does not is ended the hard way below.
	r.stopPods(ctx)
	var doomed cgroup.Doomed
	if err := r.mark(groups, &doomed); err != nil {
		return err
	}
	// From here on orphans are the machine's and no longer found as the supervisors' descendants.
	r.stopSupervisors(ctx)
	containers := doomed.Groups(plan.RuntimeCgroup)
	if err := groups.Kill(c.Cgroup(), &doomed, 30*time.Second); err != nil {
		return err
	}
	for _, group := range append(containers, c.Slice()) {
		if err := groups.Remove(group); err != nil {
			return err
		}
	}
	if c.RuntimeGroup {
		groups.RemoveEmpty(plan.RuntimeCgroup)
	}
	if err := network.Disconnect(c); err != nil {
		return err
	}
	if err := node.Remove(dir); err != nil {
		return err
	}
	// A process that an interrupted up has just started may come into a group late. It finds
	// no namespace to enter any more.
	for try := 0; ; try++ {
		err := groups.Remove(c.Cgroup())
		if err == nil {
			break
		}
		if try == 10 {
			return err
		}
		if err := groups.Kill(c.Cgroup(), &doomed, 30*time.Second); err != nil {
			return err
		}
	}
	for _, name := range []string{"nodes", "ns", "pki", "kubeconfig", "kubeconfig.tmp", "cluster.json.tmp", "cluster.json"} {
		err := os.RemoveAll(filepath.Join(dir, name))
		for try := 0; err != nil && try < 20; try++ { // a process that was just killed may still have written
			time.Sleep(50 * time.Millisecond)
			err = os.RemoveAll(filepath.Join(dir, name))
		}
		if err != nil {
			return fmt.Errorf("removing the cluster's files: %w", err)
		}
	}
	return nil
}

// mark dooms everything that belongs to the cluster: by its control group, by descent, and
// by the namespaces that it is in.
func (r Running) mark(groups cgroup.Hierarchies, doomed *cgroup.Doomed) error {
	pids, err := groups.Processes(r.Cgroup())
	if err != nil {
		return err
	}
	doomed.Add(pids...)
	if pids, err = groups.Processes(r.Slice()); err != nil {
		return err
	}
	doomed.Add(pids...)
	if pids, err = node.Processes(r.NamespaceDir()); err != nil {
		return err
	}
	doomed.Add(pids...)
	return nil
}

// eachSupervisor calls do for all supervisors that answer, at the same time.
func (r Running) eachSupervisor(ctx context.Context, do func(supervise.Client, []supervise.Status)) {
	places, err := os.ReadDir(filepath.Join(r.Dir, "nodes"))
	if err != nil {
		return // there are none
	}
	var all sync.WaitGroup
	for _, place := range places {
		all.Go(func() {
			client := r.client(place.Name())
			if components, err := client.Status(ctx); err == nil {
				do(client, components)
			}
		})
	}
	all.Wait()
}

// stopSupervisors ends all programs. What they would save at their end is thrown away: they
// get little time.
func (r Running) stopSupervisors(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r.eachSupervisor(ctx, func(client supervise.Client, _ []supervise.Status) {
		_ = client.Shutdown(ctx, time.Second) // what it leaves is killed
	})
}

// stopPods ends Pods through the container runtimes that answer.
func (r Running) stopPods(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	r.eachSupervisor(ctx, func(client supervise.Client, components []supervise.Status) {
		for _, c := range components {
			// It would start Pods again.
			if c.Name == "kubelet" {
				_ = client.Kill(ctx, c.Name, true) // it may be down already
			}
		}
		for _, c := range components {
			if c.Name != "containerd" || c.PID == 0 {
				continue
			}
			runtime, err := cri.Dial(cri.Socket(c.PID, kube.ContainerdSocket))
			if err != nil {
				return
			}
			defer runtime.Close()
			_ = runtime.StopPods(ctx) // what is left of them is killed
		}
	})
}
