package freeze

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/test/bench/load"
)

// redisImage is that of the application "redis" in test/zoo.
const redisImage = "localhost/stasis-zoo-redis:dev"

// loads are how much clients ask of Redis, as a part of what it can answer.
var loads = []struct {
	part float64 // 0: as much as they can
	what string  // as a part of Throughput's key
}{
	{0.5, "_redis_at_half"},
	{0, "_redis"},
}

// loadRedis has the node know Redis' image.
func (h *hold) loadRedis(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, filepath.Join(h.Root, "bin/zoo"), "-archives", "-apps", "redis")
	cmd.Dir, cmd.Stderr = h.Root, h.Out
	archive, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("bin/zoo -archives: %w", err)
	}
	_, err = h.pods.Devcluster(ctx, "load", strings.TrimSpace(string(archive)))
	return err
}

// redis has clients ask a Redis of 1.1 GB while it is checkpointed.
func (h *hold) redis(ctx context.Context, report *Report) (err error) {
	from, address, err := h.pods.redis(ctx)
	if from != nil {
		defer func() { err = errors.Join(err, from.end(context.WithoutCancel(ctx))) }()
	}
	if err != nil {
		return err
	}
	if err := load.Fill(ctx, address, load.Keys); err != nil {
		return err
	}
	if err := quiet(ctx); err != nil {
		return err
	}
	most, err := mostOf(ctx, address)
	if err != nil {
		return err
	}
	h.say("Redis answers %.0f requests a second", most)
	for _, l := range loads {
		for _, c := range h.contenders() {
			if !h.paysFor(c) {
				continue
			}
			if err := warm(Shape{2 * paysShape.Containers, paysShape.MiB}); err != nil {
				return err
			}
			done, err := answered(ctx, c, from, address, l.part*most)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			h.gotDone(report, c.key+"_throughput"+l.what, done)
		}
	}
	return nil
}

// redis makes a Pod of Redis, which keeps everything in memory, and returns it when it
// answers.
func (p *pods) redis(ctx context.Context) (*podSubject, string, error) {
	p.count++
	s := &podSubject{pods: p, shape: paysShape, pod: &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: fmt.Sprintf("bench-%d", p.count)},
		Spec: corev1.PodSpec{TerminationGracePeriodSeconds: new(int64(0)), Containers: []corev1.Container{{
			Name: "c1", Image: redisImage, ImagePullPolicy: corev1.PullNever,
			Command:         []string{"redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no"},
			SecurityContext: &corev1.SecurityContext{RunAsUser: new(int64(1000))},
			Resources:       corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}},
		}}},
	}}
	if err := p.Create(ctx, s.pod); err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var address string
	err := every(ctx, asking, "Redis answers", func() (bool, error) {
		if err := p.Get(ctx, client.ObjectKeyFromObject(s.pod), s.pod); err != nil || s.pod.Status.PodIP == "" {
			return false, err
		}
		address = net.JoinHostPort(s.pod.Status.PodIP, "6379")
		conn, err := net.DialTimeout("tcp", address, asking)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
	if err != nil {
		err = errors.Join(err, s.describe(ctx))
	}
	return s, address, err
}

// mostOf is how many requests are answered in a second when clients ask as many as they can.
func mostOf(ctx context.Context, address string) (float64, error) {
	l, err := load.Start(ctx, address, 0)
	if err != nil {
		return 0, err
	}
	time.Sleep(settling)
	begun := time.Now()
	time.Sleep(before)
	samples, err := l.Stop()
	if err != nil {
		return 0, err
	}
	return rate(samples, begun, time.Now())
}

// answered returns how many requests were answered when so many a second are made, as a part
// of what is usual then.
func answered(ctx context.Context, c contender, from *podSubject, address string, requests float64) ([]got, error) {
	l, err := load.Start(ctx, address, requests)
	if err != nil {
		return nil, err
	}
	time.Sleep(before + settling)
	begun := time.Now()
	t, err := c.checkpoint(ctx, from)
	ready := time.Now()
	time.Sleep(settling)
	samples, stopErr := l.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return nil, err
	}
	reading, frozen := t.(*podTaken).reading(), t.(*podTaken).reported()
	if err := t.remove(ctx); err != nil {
		return nil, err
	}
	thaw, err := thawed(samples, begun, ready, frozen)
	if err != nil {
		return nil, err
	}
	return shares(samples, begun, thaw, reading, ready)
}

// settling is how long clients ask before what they get counts.
const settling = 200 * time.Millisecond

// thawed is when answers came again after the time without any that is nearest to the one
// for which the Pod stood still.
func thawed(samples []load.Sample, begun, ready time.Time, frozen time.Duration) (at time.Time, err error) {
	off := time.Duration(-1)
	for i := 0; i < len(samples); {
		last := i // of those that show no answer more
		for last+1 < len(samples) && samples[last+1].Done == samples[i].Done {
			last++
		}
		from, to := samples[i].At, samples[last].At
		if d := (to.Sub(from) - frozen).Abs(); from.After(begun) && to.Before(ready) && (off < 0 || d < off) {
			off, at = d, to
		}
		i = last + 1
	}
	if at.IsZero() {
		return at, fmt.Errorf("nobody looked at the answers between %s and %s", begun.Format(time.TimeOnly), ready.Format(time.TimeOnly))
	}
	return at, nil
}
