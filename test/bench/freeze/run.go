package freeze

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// Shapes are measured one after the other.
var Shapes = []Shape{{1, 64}, {1, 512}, {2, 512}, {4, 512}, {1, 1024}, {1, 4096}, {1, 8192}}

// Options say what is measured and where.
type Options struct {
	Root   string // the checkout
	Dir    string // an empty directory on a file system in memory
	CRIU   string // the program
	Rounds int    // that count, after a first one that does not; one less for much memory
	Shapes []Shape
	Out    io.Writer // is told what goes on
}

// hold is what a run has at hand.
type hold struct {
	Options
	runc   *runc
	podman *podman
	pods   *pods
	store  string // a CheckpointStore
	begun  time.Time
}

// contenders are measured side by side. Those of one place stand together.
func (h *hold) contenders() []contender {
	restore := func(how string) restoration {
		return restoration{"Stasis, " + how, how, h.pods.restore(map[string]string{checkpointv1alpha1.AnnotationRestoreMemory: how})}
	}
	return []contender{
		{name: "CRIU by runc, to memory", key: "criu", place: h.runc, checkpoint: h.runc.checkpoint,
			restores: []restoration{{"CRIU by runc, from memory", "criu", h.runc.restore}}},
		{name: "Stasis, plain", key: "plain", place: h.pods, checkpoint: h.pods.checkpoint(map[string]string{"capture": "plain"}, ""), restores: []restoration{restore("eager")}, often: []Shape{gib1}},
		{name: "Stasis, copy-on-write", key: "cow", place: h.pods, checkpoint: h.pods.checkpoint(map[string]string{"capture": "cow"}, ""), restores: []restoration{restore("lazy")}, often: []Shape{gib1}, large: true},
		{name: "Stasis, to a store", key: "stored", place: h.pods, checkpoint: h.pods.checkpoint(nil, h.store), only: []Shape{gib1}, often: []Shape{gib1}},
		{name: "Stasis, plain, to a store", key: "plain_stored", place: h.pods, checkpoint: h.pods.checkpoint(map[string]string{"capture": "plain"}, h.store), only: []Shape{gib1}, often: []Shape{gib1}},
		{name: "kubelet's endpoint, containerd", key: "kubelet", place: h.pods, checkpoint: h.pods.checkpointByKubelet, fewer: true},
		{name: "podman, to memory", key: "podman", place: h.podman, checkpoint: h.podman.checkpoint,
			restores: []restoration{{"podman, from memory", "podman", h.podman.restore}}},
	}
}

// Run measures everything and returns what came of it.
func Run(ctx context.Context, o Options) (report *Report, err error) {
	h := &hold{Options: o, begun: time.Now()}
	last := context.WithoutCancel(ctx)
	c, err := Cluster(ctx, o.Root)
	if c != nil {
		defer func() { err = errors.Join(err, c.Down(last)) }()
	}
	if err != nil {
		return nil, err
	}
	if err := h.prepare(ctx, c); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.podman.close(last)) }()
	report = &Report{}
	for _, s := range o.Shapes {
		results, err := h.shape(ctx, s)
		if err != nil {
			return nil, err
		}
		report.Results = append(report.Results, results...)
	}
	for range o.Rounds {
		if err := h.pays(ctx, report); err != nil {
			return nil, err
		}
	}
	report.Took = time.Since(h.begun)
	return report, nil
}

// Cluster makes a cluster with Stasis in it, which has come to rest. It is there, to be
// taken down, also after an error.
func Cluster(ctx context.Context, root string) (*cluster.Cluster, error) {
	cluster.Images = []string{"stasis-agent", "stasis-controller", "stasis-ballast"}
	c, err := cluster.Up(ctx, root, filepath.Join(root, ".devcluster-bench"), 1)
	if err == nil {
		_, err = c.OnNode(ctx, node, "mkdir -p "+storeMount)
	}
	if err == nil {
		err = c.InstallFrom(ctx, "test/bench/config")
	}
	if err == nil {
		_, err = c.OnNode(ctx, node, criuForContainerd)
	}
	if err == nil {
		err = client.IgnoreAlreadyExists(c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace}}))
	}
	if err == nil {
		err = every(ctx, asking, "Pods can be created", func() (bool, error) {
			err := c.Get(ctx, client.ObjectKey{Namespace: Namespace, Name: "default"}, &corev1.ServiceAccount{})
			return err == nil, client.IgnoreNotFound(err)
		})
	}
	if err == nil {
		err = quiet(ctx)
	}
	return c, err
}

func (h *hold) prepare(ctx context.Context, c *cluster.Cluster) (err error) {
	if h.pods, err = newPods(ctx, c); err != nil {
		return err
	}
	if h.store, err = h.pods.store(ctx); err != nil {
		return err
	}
	if err := h.loadRedis(ctx); err != nil {
		return err
	}
	program := filepath.Join(h.Dir, "runc")
	// The cluster's, for who runs containers without it.
	if err := copyProgram(filepath.Join(h.pods.root, "usr/local/bin/runc"), program); err != nil {
		return err
	}
	criu := filepath.Dir(h.CRIU)
	h.runc = &runc{program: program, criu: criu, ballast: filepath.Join(h.Root, "dist/bin/ballast"), dir: filepath.Join(h.Dir, "containers")}
	if err := os.Mkdir(h.runc.dir, 0o711); err != nil {
		return err
	}
	h.podman = &podman{runc: program, criu: criu, archive: filepath.Join(h.Root, "dist/images/stasis-ballast.tar"), dir: filepath.Join(h.Dir, "podman")}
	if _, err := exec.LookPath("podman"); err != nil {
		return fmt.Errorf("%w (Debian: apt-get install --no-install-recommends podman)", err)
	}
	return nil
}

// much is so much memory that contenders that take long are measured in fewer rounds.
const much = 512

// most is the most memory that all are measured with, in MiB.
const most = 4096

// rounds are one less where there is so much memory that a round takes a minute.
func (h *hold) rounds(s Shape) int {
	if s.Containers*s.MiB >= 4*much {
		return max(1, h.Rounds-1)
	}
	return h.Rounds
}

// wanted says whether a contender takes part in a round; round 0 does not count.
func (c contender) wanted(s Shape, round int) bool {
	if s.Containers*s.MiB > most && !c.large {
		return false
	}
	if len(c.only) > 0 && !slices.Contains(c.only, s) {
		return false
	}
	return !c.fewer || s.Containers*s.MiB < much || round%3 == 1
}

// shape measures all contenders, by turns.
func (h *hold) shape(ctx context.Context, s Shape) ([]*Result, error) {
	all := h.contenders()
	var results []*Result
	for _, c := range all {
		r := &Result{Contender: c.name, Key: c.key, Shape: s}
		for _, way := range c.restores {
			r.Restores = append(r.Restores, RestoreResult{Name: way.name, Key: way.key})
		}
		results = append(results, r)
	}
	for n := range h.rounds(s) + 1 {
		var now []contender
		var into []*Result
		for i, c := range all {
			if c.wanted(s, n) {
				now, into = append(now, c), append(into, results[i])
			}
		}
		h.say("round %d of %s", n, s)
		if err := round(ctx, s, into, now, h.say); err != nil {
			return nil, err
		}
		if n > 0 {
			continue
		}
		for _, r := range results { // the first round does not count
			r.forget()
		}
	}
	return results, nil
}

func (h *hold) say(format string, args ...any) {
	fmt.Fprintf(h.Out, "[%6.1fs] %s\n", time.Since(h.begun).Seconds(), fmt.Sprintf(format, args...))
}

func copyProgram(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

func unmount(path string) error { return unix.Unmount(path, unix.MNT_DETACH) }

// ParseShapes reads shapes as in "64,1024,2x512"; none are all.
func ParseShapes(text string) ([]Shape, error) {
	if text == "" {
		return Shapes, nil
	}
	var shapes []Shape
	for part := range strings.SplitSeq(text, ",") {
		s := Shape{Containers: 1}
		var err error
		count, mib, several := strings.Cut(part, "x")
		if !several {
			mib = count
		} else if s.Containers, err = strconv.Atoi(count); err != nil || s.Containers < 1 {
			return nil, fmt.Errorf("shape %q: want MiB, or CONTAINERSxMIB", part)
		}
		if s.MiB, err = strconv.Atoi(mib); err != nil || s.MiB < 1 {
			return nil, fmt.Errorf("shape %q: want MiB, or CONTAINERSxMIB", part)
		}
		shapes = append(shapes, s)
	}
	return shapes, nil
}
