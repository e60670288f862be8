package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/nodeinstall"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
	"podstasis.dev/stasis/internal/restoring"
)

const (
	// defaultLazyFrom is from how many MiB of memory on a Pod runs before all of it is in
	// its processes, where all is on this node. Of less, little is gained: a Pod of 64 MiB
	// runs some 20 ms sooner (docs/benchmarks.md).
	defaultLazyFrom = 256
	// lazyPatience is how long a process waits for a page.
	lazyPatience = time.Minute
	// maxOrders is of how many restores it is kept in which order pages were asked for.
	maxOrders = 256
	ordersDir = "memory-order"
)

// memory says how memory is given to processes while they run.
func (o Options) memory() restoring.Memory {
	policy := o.lazyPolicy()
	policy.Unsupported = lazy.Supported()
	if policy.Unsupported != nil {
		o.Log.Warn("restored processes wait until all their memory is there", "reason", policy.Unsupported)
	}
	orders := filepath.Join(o.Root, ordersDir)
	if err := keepNewest(orders, maxOrders); err != nil {
		o.Log.Warn("in which order pages were asked for is kept for too long", "error", err)
	}
	return restoring.Memory{Policy: policy, Bandwidth: int64(o.LazyBandwidth) << 20, Patience: lazyPatience, OrderDir: orders}
}

func (o Options) lazyPolicy() pages.Policy {
	if o.LazyThreshold <= 0 {
		return pages.Policy{Threshold: math.MaxInt64}
	}
	return pages.Policy{Threshold: int64(o.LazyThreshold) << 20}
}

// keepNewest removes the oldest files of a directory.
func keepNewest(dir string, most int) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	age := map[string]time.Time{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			age[e.Name()] = info.ModTime()
		}
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return age[b.Name()].Compare(age[a.Name()]) })
	for _, e := range entries[min(len(entries), most):] {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// Memory implements restoring.Observer.
func (o *observer) Memory(ctx context.Context, sandbox nodeapi.Sandbox, container string, s lazy.Status) error {
	bytes := resource.NewQuantity(s.Total, resource.BinarySI).String()
	reason, message := v1alpha1.EventMemoryRestored, fmt.Sprintf("Container %s: all memory that it is given while it runs is there, %s in %s", container, bytes, s.Until.Sub(s.Since).Round(time.Millisecond))
	if s.Stage == lazy.StageLost {
		reason, message = v1alpha1.EventMemoryLost, fmt.Sprintf("Container %s was killed: its memory could not be restored from PodCheckpoint %s: %s", container, from(sandbox), s.Message)
		o.metrics.runtimeErrors.WithLabelValues(operationRestore).Inc()
		o.log.Error("memory of a restored container lost", append(about(sandbox), "container", container, "message", s.Message)...)
	} else {
		o.log.Info("memory of a restored container is there", append(about(sandbox), "container", container, "bytes", s.Total, "took", s.Until.Sub(s.Since))...)
	}
	if !hasPod(sandbox) {
		return nil
	}
	_, marker := o.connected()
	if marker == nil {
		return errUnconnected
	}
	if reason == v1alpha1.EventMemoryLost {
		o.event(sandbox, corev1.EventTypeWarning, reason, message)
		marker.set(ctx, refOf(sandbox), v1alpha1.PodConditionRestoring, corev1.ConditionFalse, reason, message)
		return nil
	}
	return marker.note(ctx, refOf(sandbox), sandbox.ID+"/"+container, reason, message)
}

// Kill implements restoring.Node.
func (n *restoresNode) Kill(ctx context.Context, root, containerID string) error {
	ctx, cancel := context.WithTimeout(ctx, questionPatience)
	defer cancel()
	gone, err := n.abandoned(root, containerID)
	if gone && err == nil {
		return nil
	}
	_, err = n.host.Run(ctx, hostns.Command{
		Name: filepath.Join(nodeinstall.HostPrefix, "bin", "stasis-runtime"),
		Args: []string{"--root", root, "kill", containerID, "KILL"},
	})
	var exit *hostns.ExitError
	if errors.As(err, &exit) {
		return nil // it does not run
	}
	return err
}
