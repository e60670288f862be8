// Package driver is the demo: it does the main job with the commands that a user
// would type, shows each with its time, and checks the outcome.
package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
)

// Demo says how to run. All paths are relative to Root, the checkout.
type Demo struct {
	Root  string
	State string // devcluster's state directory
	Nodes int
	Keep  bool // leave the cluster and tell how to go on
	Out   io.Writer

	start time.Time
}

const (
	namespace  = "demo"
	source     = "counters"
	checkpoint = "counters-1"
)

var (
	copies   = []string{"counters-2", "counters-3"}
	programs = []string{"a", "b"}
	images   = []string{"stasis-agent", "stasis-controller", "stasis-demo"}
)

// outcome is what the last line tells.
type outcome struct {
	cut, first map[string]uint64 // by program
	frozen     time.Duration
	restore    time.Duration
}

// Run does everything, takes the cluster down again and ends with the line that
// tells the outcome.
func (d *Demo) Run(ctx context.Context) error {
	d.start = time.Now()
	result, err := d.onCluster(ctx)
	if d.Keep {
		d.explain()
	} else {
		d.say("Take the cluster down")
		// Also after an interrupt: nothing is left running.
		if _, downErr := d.run(context.WithoutCancel(ctx), "bin/devcluster", "--state", d.State, "down"); downErr != nil {
			err = errors.Join(err, downErr)
		}
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(d.Out, result.line())
	return err
}

func (d *Demo) onCluster(ctx context.Context) (*outcome, error) {
	d.say("Start a Kubernetes cluster of %d node(s) on this machine", d.Nodes)
	if _, err := d.run(ctx, "bin/devcluster", "--state", d.State, "up", "--nodes", fmt.Sprint(d.Nodes)); err != nil {
		return nil, err
	}
	err := d.install(ctx)
	var result *outcome
	if err == nil {
		result, err = d.mainJob(ctx)
	}
	if err != nil {
		d.diagnose(context.WithoutCancel(ctx))
	}
	return result, err
}

func (o outcome) line() string {
	return fmt.Sprintf("demo: ok a=%d→%d b=%d→%d frozen=%d restore=%d", o.cut["a"], o.first["a"], o.cut["b"], o.first["b"],
		o.frozen.Round(time.Millisecond).Milliseconds(), o.restore.Round(time.Millisecond).Milliseconds())
}

func (d *Demo) install(ctx context.Context) error {
	d.say("Load the images on the nodes")
	for _, image := range images {
		if _, err := d.run(ctx, "bin/devcluster", "--state", d.State, "load", filepath.Join("dist/images", image+".tar")); err != nil {
			return err
		}
	}
	d.say("Install Stasis")
	for _, args := range [][]string{
		{"apply", "-k", "config/install"},
		{"-n", "stasis-system", "rollout", "status", "deployment", "--timeout=120s"},
		{"-n", "stasis-system", "rollout", "status", "daemonset", "--timeout=120s"},
	} {
		if _, err := d.kubectl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// mainJob is what Stasis is for.
func (d *Demo) mainJob(ctx context.Context) (*outcome, error) {
	d.say("Run a Pod of two programs that count together")
	for _, args := range [][]string{
		{"create", "namespace", namespace},
		{"-n", namespace, "apply", "-f", "demo/pod.yaml"},
		{"-n", namespace, "wait", "--for=condition=Ready", "pod/" + source, "--timeout=60s"},
	} {
		if _, err := d.kubectl(ctx, args...); err != nil {
			return nil, err
		}
	}
	if err := d.countsTo(ctx, source, 150); err != nil {
		return nil, err
	}

	d.say("Take a checkpoint of it")
	if _, err := d.run(ctx, "bin/kubectl-checkpoint", d.flags(source, "--name", checkpoint)...); err != nil {
		return nil, err
	}
	var taken checkpointv1alpha1.PodCheckpoint
	if err := d.get(ctx, &taken, "podcheckpoint", checkpoint); err != nil {
		return nil, err
	}
	status := taken.Status
	if status.FreezeDuration == nil {
		return nil, fmt.Errorf("podcheckpoint %s does not say how long the Pod was frozen", checkpoint)
	}
	window, err := counters.WindowOf(status)
	if err != nil {
		return nil, fmt.Errorf("podcheckpoint %s: %w", checkpoint, err)
	}

	d.say("The source runs on")
	sourceLogs, err := d.runsOn(ctx)
	if err != nil {
		return nil, err
	}

	d.say("Delete the source, and restore it twice")
	if _, err := d.kubectl(ctx, "-n", namespace, "delete", "pod", source, "--timeout=60s"); err != nil {
		return nil, err
	}
	result := &outcome{cut: map[string]uint64{}, first: map[string]uint64{}, frozen: status.FreezeDuration.Duration}
	for i, name := range copies {
		out, err := d.run(ctx, "bin/kubectl-restore", d.flags(checkpoint, "--as", name)...)
		if err != nil {
			return nil, err
		}
		took, err := restoredIn(out)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			result.restore = took
		}
	}

	d.say("Both continue where the source was cut")
	for i, name := range copies {
		if err := d.check(ctx, name, sourceLogs, window, result, i > 0); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// runsOn checks that the source was not harmed, and returns its programs' logs.
func (d *Demo) runsOn(ctx context.Context) (map[string][]counters.Line, error) {
	lines, err := d.logs(ctx, source, "b")
	if err != nil {
		return nil, err
	}
	if err := d.countsTo(ctx, source, lines[len(lines)-1].Count+50); err != nil {
		return nil, err
	}
	if err := d.notRestarted(ctx, source); err != nil {
		return nil, err
	}
	logs := map[string][]counters.Line{}
	for _, program := range programs {
		if logs[program], err = d.logs(ctx, source, program); err != nil {
			return nil, err
		}
	}
	return logs, nil
}

// check judges one restored Pod. Pods of one checkpoint must all begin with the
// same counts, which are known after the first.
func (d *Demo) check(ctx context.Context, pod string, sourceLogs map[string][]counters.Line, window counters.Window, result *outcome, known bool) error {
	// Long enough for a disagreement to show.
	lines, err := d.logs(ctx, pod, "b")
	if err != nil {
		return err
	}
	if err := d.countsTo(ctx, pod, lines[len(lines)-1].Count+50); err != nil {
		return err
	}
	if err := d.notRestarted(ctx, pod); err != nil {
		return err
	}
	for _, program := range programs {
		lines, err := d.logs(ctx, pod, program)
		if err != nil {
			return err
		}
		cut, first, err := counters.Continues(sourceLogs[program], lines, window)
		if err != nil {
			return fmt.Errorf("pod %s, program %s: %w", pod, program, err)
		}
		if known && first != result.first[program] {
			return fmt.Errorf("pod %s, program %s: begins with count %d, the other Pod of the same checkpoint with %d", pod, program, first, result.first[program])
		}
		result.cut[program], result.first[program] = cut, first
		last := lines[len(lines)-1]
		d.note("%s %s: cut at %d, first count after restore %d, now %d; nonce %s as before; %d cross-checks, none failed; 0 restarts",
			pod, program, cut, first, last.Count, last.Nonce, last.Checks)
	}
	return nil
}

// countsTo waits until program b of pod has logged count.
func (d *Demo) countsTo(ctx context.Context, pod string, count uint64) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		lines, err := d.logs(ctx, pod, "b")
		if err != nil {
			return err
		}
		if last := lines[len(lines)-1]; last.Count >= count {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("pod %s has not counted to %d within 30 s", pod, count)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (d *Demo) logs(ctx context.Context, pod, program string) ([]counters.Line, error) {
	for tries := 0; ; tries++ {
		var out bytes.Buffer
		cmd := d.command(ctx, "bin/kubectl", d.flags("logs", pod, "-c", program)...)
		var complaint bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &complaint
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("kubectl logs %s -c %s: %w: %s", pod, program, err, strings.TrimSpace(complaint.String()))
		}
		lines, err := counters.Parse(out.String())
		if err != nil {
			return nil, fmt.Errorf("pod %s: %w", pod, err)
		}
		if len(lines) > 0 {
			return lines, nil
		}
		if tries == 50 {
			return nil, fmt.Errorf("program %s of pod %s logs nothing", program, pod)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (d *Demo) notRestarted(ctx context.Context, name string) error {
	var pod corev1.Pod
	if err := d.get(ctx, &pod, "pod", name); err != nil {
		return err
	}
	if len(pod.Status.ContainerStatuses) != len(programs) {
		return fmt.Errorf("pod %s has %d containers, want %d", name, len(pod.Status.ContainerStatuses), len(programs))
	}
	for _, container := range pod.Status.ContainerStatuses {
		if container.RestartCount != 0 || container.State.Running == nil {
			return fmt.Errorf("pod %s: container %s was restarted %d times, running: %t", name, container.Name, container.RestartCount, container.State.Running != nil)
		}
	}
	return nil
}

var restoredLine = regexp.MustCompile(`(?m)^\s*Restored in:\s+([0-9.]+m?s)$`)

// restoredIn takes from kubectl-restore's output how long the restore took.
func restoredIn(out string) (time.Duration, error) {
	match := restoredLine.FindStringSubmatch(out)
	if match == nil {
		return 0, fmt.Errorf("kubectl restore does not say how long it took: %q", out)
	}
	return time.ParseDuration(match[1])
}

func (d *Demo) kubeconfig() string { return filepath.Join(d.State, "kubeconfig") }

// flags are args with what tells the cluster and the namespace.
func (d *Demo) flags(args ...string) []string {
	return append(args, "-n", namespace, "--kubeconfig", d.kubeconfig())
}

func (d *Demo) get(ctx context.Context, into any, kind, name string) error {
	var out, complaint bytes.Buffer
	cmd := d.command(ctx, "bin/kubectl", d.flags("get", kind, name, "-o", "json")...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("kubectl get %s %s: %w: %s", kind, name, err, strings.TrimSpace(complaint.String()))
	}
	if err := json.Unmarshal(out.Bytes(), into); err != nil {
		return fmt.Errorf("kubectl get %s %s: %w", kind, name, err)
	}
	return nil
}

func (d *Demo) kubectl(ctx context.Context, args ...string) (string, error) {
	return d.run(ctx, "bin/kubectl", append(args, "--kubeconfig", d.kubeconfig())...)
}

// run shows a command and what it prints, and returns what it printed.
func (d *Demo) run(ctx context.Context, program string, args ...string) (string, error) {
	d.note("$ %s %s", program, strings.Join(args, " "))
	var out bytes.Buffer
	cmd := d.command(ctx, program, args...)
	show := &indenter{out: d.Out}
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, show), show
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w", program, strings.Join(args, " "), err)
	}
	return out.String(), nil
}

func (d *Demo) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(d.Root, program), args...)
	cmd.Dir = d.Root
	return cmd
}

func (d *Demo) say(format string, args ...any) {
	fmt.Fprintf(d.Out, "[%6.1fs] %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

func (d *Demo) note(format string, args ...any) {
	fmt.Fprintf(d.Out, "           %s\n", fmt.Sprintf(format, args...))
}

// diagnose shows what a person would look at first.
func (d *Demo) diagnose(ctx context.Context) {
	d.say("That failed. What the cluster says:")
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, args := range [][]string{
		{"-n", namespace, "get", "pods,podcheckpoints", "-o", "wide"},
		{"-n", namespace, "get", "events", "--sort-by=.lastTimestamp"},
		{"-n", "stasis-system", "get", "pods", "-o", "wide"},
		{"-n", "stasis-system", "logs", "daemonset/stasis-agent", "--tail=30"},
	} {
		_, _ = d.kubectl(ctx, args...) // what it has to say is shown
	}
}

func (d *Demo) explain() {
	d.say("The cluster is left for you")
	for _, line := range []string{
		"export KUBECONFIG=" + d.kubeconfig() + " PATH=$PWD/bin:$PATH",
		"kubectl -n " + namespace + " get pods,podcheckpoints",
		"kubectl -n " + namespace + " exec " + copies[0] + " -c a -- counter-a status",
		"kubectl checkpoint " + copies[0] + " -n " + namespace,
		"kubectl restore " + checkpoint + " --as counters-4 -n " + namespace,
		"devcluster --state " + d.State + " down        # when you are done",
	} {
		d.note("%s", line)
	}
}

// indenter sets off what a command prints.
type indenter struct {
	out  io.Writer
	open bool // in the middle of a line
}

func (i *indenter) Write(p []byte) (int, error) {
	for _, line := range bytes.SplitAfter(p, []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		if !i.open {
			if _, err := io.WriteString(i.out, "             "); err != nil {
				return 0, err
			}
		}
		if _, err := i.out.Write(line); err != nil {
			return 0, err
		}
		i.open = line[len(line)-1] != '\n'
	}
	return len(p), nil
}
