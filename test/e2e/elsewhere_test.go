package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/store/servers"
)

// BenchmarkElsewhere says what it takes to have a large Pod in a store and on another
// node. It makes lines of "make bench"; the memory that its Pods hold does not compress.
func BenchmarkElsewhere(b *testing.B) {
	b.Run("storing", storingALargePod)
	b.Run("restoring", restoringElsewhere)
}

func figure(name string, value float64, unit string) {
	fmt.Printf("bench: %s %.3f %s\n", name, value, unit)
}

// A restore of a GiB takes a while on a machine that does other things, too.
const longPatience = 10 * time.Minute

// holding is a Pod that holds so many MiB.
func (s *scene) holding(name string, mib int, restoreFrom string) *corev1.Pod {
	pod := MakePod(name).Container("subject", imageSubject, "subject", "hold", strconv.Itoa(mib))
	if restoreFrom != "" {
		pod.RestoreFrom(restoreFrom)
	}
	return pod.Obj()
}

// held waits until a Pod has its memory, and returns the checksum of it.
func (s *scene) held(name string) (sum string) {
	s.Helper()
	s.within(longPatience, "pod "+name+" holds its memory", func() (err error) {
		sum, err = s.exec(name, "subject", "subject", "get", "/held")
		return err
	})
	return sum
}

func (s *scene) taken(name, pod string, change ...func(*checkpointv1alpha1.PodCheckpoint)) *checkpointv1alpha1.PodCheckpoint {
	s.Helper()
	c := s.ask4Checkpoint(name, pod, change...)
	s.within(longPatience, "podcheckpoint "+name+" is Ready", func() error {
		if err := s.Get(s.Context(), s.key(name), c); err != nil {
			return err
		}
		if ready := c.ReadyCondition(); ready != nil && ready.Reason == checkpointv1alpha1.ReasonCheckpointFailed {
			s.Fatalf("podcheckpoint %s: %s", name, ready.Message)
		}
		if !c.IsReady() {
			return fmt.Errorf("%+v", c.Status.Conditions)
		}
		return nil
	})
	return c
}

// storingALargePod watches the memory of an agent that captures and stores 4 GiB.
func storingALargePod(b *testing.B) {
	s := newScene(b)
	_, s3 := servers.S3(b, s.machine())
	store := s.checkpointStore("s3", false, s3)
	pod := s.holding("large", 4096, "")
	pod.Spec.NodeName = nodeOne
	s.create(pod)
	s.held("large")
	agent := s.processOf(s.agentOn(nodeOne), "stasis-agent")
	idle, err := statusOf(agent, "VmRSS")
	if err != nil {
		s.Fatal(err)
	}
	w := watchMemory(s, agent)
	begun := time.Now()
	c := s.taken("large", "large", inStore(store))
	took, peak := time.Since(begun), w.end()
	if share := c.Status.Store.Memory; share == nil || share.Bytes < 4<<30 {
		s.Fatalf("%+v bytes of memory were stored", share)
	}
	figure("agent_before_storing_mib", idle/1024, "MiB")
	figure("agent_storing_4gib_peak_mib", peak.resident/1024, "MiB")
	figure("agent_storing_4gib_peak_anonymous_mib", peak.anonymous/1024, "MiB")
	figure("agent_storing_4gib_s", took.Seconds(), "s")
}

// restoringElsewhere restores a Pod of 1 GiB where it was, and on another node: from node
// to node, and from a store.
func restoringElsewhere(b *testing.B) {
	const mib = 1024
	s := newScene(b)
	_, s3 := servers.S3(b, s.machine())
	store := s.checkpointStore("s3", false, s3)
	pod := s.holding("source", mib, "")
	pod.Spec.NodeName = nodeOne
	s.create(pod)
	sum := s.held("source")
	for name, change := range map[string]func(*checkpointv1alpha1.PodCheckpoint){"home": nil, "peer": nil, "store": inStore(store)} {
		if change == nil {
			change = func(*checkpointv1alpha1.PodCheckpoint) {}
		}
		s.taken(name, "source", change)
	}
	s.remove("source")
	for _, way := range []string{"home", "peer", "store"} {
		node := nodeTwo
		if way == "home" {
			node = nodeOne
		}
		var c checkpointv1alpha1.PodCheckpoint
		if err := s.Get(s.Context(), s.key(way), &c); err != nil {
			s.Fatal(err)
		}
		name := "restored-" + way
		restored := s.holding(name, mib, way)
		restored.Annotations[checkpointv1alpha1.AnnotationRestoreMemory] = "eager" // at home as elsewhere
		restored.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node}
		before, begun := s.received(node), time.Now()
		s.create(restored)
		s.within(longPatience, "pod "+name+" runs", func() error {
			for _, status := range s.pod(name).Status.ContainerStatuses {
				if status.State.Running != nil {
					return nil
				}
			}
			return errors.New("it does not run yet")
		})
		took, moved := time.Since(begun), s.received(node)-before
		if got := s.held(name); got != sum {
			s.Errorf("%s: the memory is another: %s, and was %s", name, got, sum)
		}
		s.remove(name)
		figure("restore_"+way+"_1gib_s", took.Seconds(), "s")
		if way == "home" {
			continue
		}
		logical := float64(c.Status.Size.LogicalBytes)
		figure("restore_"+way+"_1gib_moved_mib", moved/(1<<20), "MiB")
		figure("restore_"+way+"_1gib_moved_ratio", moved/logical, "moved/logical")
	}
}

// received is how many bytes have come to a node from outside of it.
func (s *scene) received(node string) float64 {
	s.Helper()
	for line := range strings.Lines(s.onNode(node, "cat /proc/self/net/dev")) {
		if name, figures, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == "eth0" {
			bytes, err := strconv.ParseFloat(strings.Fields(figures)[0], 64)
			if err != nil {
				s.Fatal(err)
			}
			return bytes
		}
	}
	s.Fatalf("node %s has no eth0", node)
	return 0
}

// processOf is the process of a Pod's container, by its program's name: nodes share the
// machine's processes.
func (s *scene) processOf(pod *corev1.Pod, program string) (dir string) {
	s.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		s.Fatal(err)
	}
	var found []string
	for _, dir := range all {
		comm, err := os.ReadFile(dir + "/comm")
		groups, more := os.ReadFile(dir + "/cgroup")
		if err == nil && more == nil && strings.TrimSpace(string(comm)) == program && strings.Contains(string(groups), string(pod.UID)) {
			found = append(found, dir)
		}
	}
	if len(found) != 1 {
		s.Fatalf("Pod %s has the processes %v of %s", pod.Name, found, program)
	}
	return found[0]
}

// memoryPeak is in KiB.
type memoryPeak struct {
	resident  float64 // as the kernel keeps it: with the program and its libraries
	anonymous float64 // at the moments that were looked at
}

type memoryWatch struct {
	s    *scene
	dir  string
	stop context.CancelFunc
	done sync.WaitGroup
	peak memoryPeak
}

// watchMemory has the kernel begin anew with a process's peak, and looks at its memory ten
// times a second.
func watchMemory(s *scene, dir string) *memoryWatch {
	s.Helper()
	if err := os.WriteFile(dir+"/clear_refs", []byte("5"), 0); err != nil {
		s.Fatal(err)
	}
	ctx, stop := context.WithCancel(s.Context())
	w := &memoryWatch{s: s, dir: dir, stop: stop}
	w.done.Go(func() {
		for ctx.Err() == nil {
			if kib, err := statusOf(dir, "RssAnon"); err == nil {
				w.peak.anonymous = max(w.peak.anonymous, kib)
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	return w
}

func (w *memoryWatch) end() memoryPeak {
	w.s.Helper()
	w.stop()
	w.done.Wait()
	var err error
	if w.peak.resident, err = statusOf(w.dir, "VmHWM"); err != nil {
		w.s.Fatal(err)
	}
	return w.peak
}

// statusOf is what a process's status says, in KiB.
func statusOf(dir, what string) (float64, error) {
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, what+":"); ok {
			return strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		}
	}
	return 0, fmt.Errorf("%s/status has no %s", dir, what)
}
