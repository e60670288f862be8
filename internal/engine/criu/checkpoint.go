package criu

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/criu/cow"
	"podstasis.dev/stasis/internal/platform/thisnode"
	"podstasis.dev/stasis/internal/published"
)

// thawTimeout bounds one attempt at a thaw, and thawPatience all of them. They do
// not end with the operation's context: the thaw is what makes up for its end.
const (
	thawTimeout  = 30 * time.Second
	thawPatience = 10 * time.Minute
)

// Layout of a checkpoint directory; docs/format.md describes it.
const (
	containersDir = "containers"
	imagesDir     = "criu"
	rootfsArchive = "rootfs.tar"
	specFile      = "config.json"
	volumesDir    = "volumes"
)

// target is a container on its way into a checkpoint, with what was found out
// about it before the freeze.
type target struct {
	engine.Container
	upperDir string // of the root overlay, on the host
	dir      string // below the checkpoint directory
	workDir  string // for CRIU's log
	staged   string // where CRIU writes its images, in memory; empty: where they stay
	watched  map[watched]string
}

// pauseAttempts and pauseRetry bound how often a container that could not be frozen
// is tried again.
const (
	pauseAttempts = 5
	pauseRetry    = 20 * time.Millisecond
)

// captureAttempts bounds how often a freeze is given up because a process came
// in between that cannot be captured.
const captureAttempts = 10

// Checkpoint implements engine.Engine.
func (e *Engine) Checkpoint(ctx context.Context, s engine.Sandbox, dir string, options map[string]string) (*checkpoint.Manifest, error) {
	if err := engine.CheckOptions(e, options); err != nil {
		return nil, err
	}
	budget, err := engine.FreezeBudget(options)
	if err != nil {
		return nil, err
	}
	if err := e.awaitMemory(ctx, s); err != nil {
		return nil, err
	}
	clock := phases{last: time.Now()}
	m, targets, volumes, err := e.prepare(ctx, s, dir)
	if err != nil {
		return nil, err
	}
	defer e.removeWork(s.ID)
	w := window{sandbox: s, runtime: m.Runtime, dir: dir, budget: budget, targets: targets, volumes: volumes}
	if w.plan, err = e.planCapture(s, options); err != nil {
		return nil, err
	}
	if w.trees, err = e.beginTrees(ctx, w); err != nil {
		return nil, err
	}
	defer closeTrees(w.trees)
	for attempt := 1; ; attempt++ {
		m.FreezeDuration = 0
		err := e.captureOnce(ctx, w, m, &clock)
		if err == nil {
			break
		}
		if m.FreezeDuration > 0 {
			m.EarlierFreezes = append(m.EarlierFreezes, checkpoint.EarlierFreeze{Duration: m.FreezeDuration, Reason: err.Error()})
		}
		if errors.Is(err, cow.ErrComplete) {
			e.wroteMemory.Store(true)
		}
		if errors.Is(err, errCOW) && !w.plan.forced {
			e.log.InfoContext(ctx, "memory is captured plainly", "sandbox", s.ID, "because", err)
			w.plan = plan{mode: CapturePlain, reason: err.Error(), memory: w.plan.memory}
			clock.done = nil
			continue
		}
		w.late = w.late || errors.Is(err, errNotAhead)
		if !passing(err) {
			return nil, err
		}
		if attempt == captureAttempts {
			return nil, fmt.Errorf("given up after %d attempts, the last one: %w", attempt, err)
		}
		if errors.Is(err, errEnding) {
			if err := lookForLeaderless(s.Containers); err != nil {
				return nil, err
			}
		}
		e.log.InfoContext(ctx, "a capture came to nothing, trying again", "sandbox", s.ID, "because", err)
		clock.done = nil
	}
	if err := e.writeTrees(ctx, w); err != nil {
		return nil, err
	}
	clock.end("archive")
	m.Phases = clock.done
	m.Capture = w.plan.told()
	err = e.host.Do(func() error {
		for _, t := range targets {
			if err := armTimers(filepath.Join(t.dir, imagesDir)); err != nil {
				return fmt.Errorf("container %s: look at its timers: %w", t.Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := e.keepReports(targets); err != nil {
		return nil, err
	}
	e.learn(w, m.FreezeDuration)
	return m, nil
}

// captureOnce is one attempt: the freeze window, and what comes before and after it.
func (e *Engine) captureOnce(ctx context.Context, w window, m *checkpoint.Manifest, clock *phases) (err error) {
	release, err := e.stageInMemory(w)
	if err != nil {
		return err
	}
	defer release()
	if err := e.layOut(w); err != nil {
		return err
	}
	if w.plan.mode == CaptureCOW {
		if w.helper, err = e.startHelper(ctx); err != nil {
			return err
		}
		defer func() {
			w.helper.leave()
			if err != nil {
				err = errors.Join(err, wrap(e.cleanCOW(), "collect what is left of a capture"))
			}
		}()
		if err := e.prepareFork(w); err != nil {
			return err
		}
	}
	if w.ahead, err = e.startAhead(ctx, w); err != nil {
		return err
	}
	defer leaveAhead(w.ahead)
	w.lists = len(w.ahead) > 0 && e.listsMappings(ctx)
	if err := awaitStrays(ctx, w.sandbox.Containers); err != nil {
		return err
	}
	clock.end("prepare")
	if err := e.capture(ctx, w, m, clock); err != nil {
		return err
	}
	if err := firstCauses(each(w.ahead, (*waiting).finish)); err != nil {
		return err
	}
	if err := e.unstage(ctx, w); err != nil {
		return err
	}
	if err := e.checkCut(ctx, w); err != nil {
		return err
	}
	if w.helper == nil {
		return nil
	}
	_, err = w.helper.finish(ctx, w.dir)
	clock.end("memory")
	return err
}

// errEnding says that a process was frozen whose first thread has ended and others have
// not, which CRIU cannot capture. Mostly it is about to end.
var errEnding = errors.New("a process was ending")

// passing says whether an error is one that another attempt may not meet.
func passing(err error) bool {
	var late *lateStrays
	var between *spawning
	return errors.As(err, &late) || errors.As(err, &between) || errors.Is(err, ErrTorn) || errors.Is(err, errCOW) || errors.Is(err, errEnding) || errors.Is(err, errMoved) || errors.Is(err, errNotAhead)
}

// checkCut looks at what has been captured: is it of one moment?
func (e *Engine) checkCut(ctx context.Context, w window) error {
	if e.checkConnections == nil {
		return nil
	}
	dirs := map[string]string{}
	for _, t := range w.targets {
		dirs[t.Name] = filepath.Join(t.dir, imagesDir)
	}
	return e.host.Do(func() error { return e.checkConnections(ctx, dirs) })
}

// window is what a freeze window is for.
type window struct {
	sandbox engine.Sandbox
	runtime checkpoint.Program // that the containers are of
	dir     string
	budget  time.Duration // 0: none
	targets []target
	volumes []volume
	trees   []*tree
	plan    plan
	helper  *helper // with CaptureCOW
	ahead   []*waiting
	late    bool // CRIU is started when the Pod stands still
	lists   bool // it is given lists of mappings
}

// prepare does everything that can be done while the Pod runs.
func (e *Engine) prepare(ctx context.Context, s engine.Sandbox, dir string) (*checkpoint.Manifest, []target, []volume, error) {
	program, err := e.Identify(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	here, err := thisnode.Platform()
	if err != nil {
		return nil, nil, nil, err
	}
	ociRuntime, err := e.identifyRuntime(ctx, s.Containers[0].Runtime)
	if err != nil {
		return nil, nil, nil, err
	}
	m := &checkpoint.Manifest{
		Engine: program, Runtime: ociRuntime, Platform: here,
		Sandbox: checkpoint.Sandbox{ID: s.ID, Namespace: s.Namespace, Name: s.Name, UID: s.UID, IPs: s.IPs},
	}
	pids, err := treesOf(s.Containers)
	if err != nil {
		return nil, nil, nil, err
	}
	var targets []target
	for i, c := range s.Containers {
		if err := inspect(c, pids[i]); err != nil {
			return nil, nil, nil, err
		}
		upper, err := overlayUpper(c.PID)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("container %s: %w", c.Name, err)
		}
		t := target{
			Container: c, upperDir: upper,
			dir:     filepath.Join(dir, containersDir, c.Name),
			workDir: filepath.Join(e.workDir, s.ID, c.Name),
		}
		if t.watched, err = findWatched(ctx, c, pids[i]); err != nil {
			return nil, nil, nil, err
		}
		targets = append(targets, t)
		described := describe(c)
		if err := e.host.Do(func() (err error) {
			described.Published, err = publishedTo(c)
			return err
		}); err != nil {
			return nil, nil, nil, fmt.Errorf("container %s: %w", c.Name, err)
		}
		m.Containers = append(m.Containers, described)
	}
	if err := inspectUnixSockets(s.Containers, pids); err != nil {
		return nil, nil, nil, err
	}
	var volumes []volume
	err = e.host.Do(func() (err error) {
		volumes, err = volumesOf(s.Containers)
		return err
	})
	if err != nil {
		return nil, nil, nil, err
	}
	for _, v := range volumes {
		m.Volumes = append(m.Volumes, checkpoint.Volume{Name: v.name, Archive: v.archive(), Mounts: v.mounts})
	}
	return m, targets, volumes, nil
}

// layOut makes the directories of a checkpoint, in place of those of an attempt
// before.
func (e *Engine) layOut(w window) error {
	err := e.host.Do(func() error {
		for _, name := range []string{filepath.Join(w.dir, containersDir), filepath.Join(w.dir, volumesDir), filepath.Join(e.workDir, w.sandbox.ID)} {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
		}
		for _, t := range w.targets {
			if err := errors.Join(os.MkdirAll(filepath.Join(t.dir, imagesDir), 0o700), os.MkdirAll(t.workDir, 0o700), os.MkdirAll(t.imageDir(), 0o700)); err != nil {
				return err
			}
			if err := errors.Join(writeSpec(filepath.Join(t.dir, specFile), t.Spec), writeWatched(t.workDir, t.watched)); err != nil {
				return err
			}
		}
		if len(w.volumes) == 0 {
			return nil
		}
		return os.Mkdir(filepath.Join(w.dir, volumesDir), 0o700)
	})
	if err != nil {
		return fmt.Errorf("lay out the checkpoint directory: %w", err)
	}
	return nil
}

// capture is the freeze window: freeze all, capture all, thaw all.
func (e *Engine) capture(ctx context.Context, w window, m *checkpoint.Manifest, clock *phases) (err error) {
	entry := frozen{SandboxID: w.sandbox.ID, Freeze: rand.Text()}
	err = e.host.Do(func() error {
		for _, t := range w.targets {
			c := frozenContainer{ID: t.ID, Runtime: t.Runtime}
			if f, ok := freezerOfContainer(t.ID, t.PID); ok {
				c.Freezer, c.Unified = filepath.Join(f.mount, f.path), f.unified
			}
			entry.Containers = append(entry.Containers, c)
			quotas, err := quotasOf(t.PID)
			if err != nil {
				return err
			}
			for _, q := range quotas {
				if !slices.Contains(entry.Quotas, q) {
					entry.Quotas = append(entry.Quotas, q)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read CPU limits: %w", err)
	}
	if err := e.journal.write(entry); err != nil {
		return err
	}
	began := time.Now()
	ctx, stop := bounded(ctx, w.budget)
	defer stop()
	var capturing <-chan error // what goes on although ctx has ended
	defer func() {
		if w.helper != nil && err != nil {
			w.helper.leave() // it may hold processes
		}
		if err != nil {
			for _, a := range w.ahead {
				a.callOff()
			}
		}
		err = errors.Join(err, e.letGo(context.WithoutCancel(ctx), entry, err != nil))
		m.FreezeDuration = time.Since(began)
		if w.helper != nil && err == nil {
			m.FreezeDuration = w.helper.ran.Sub(began)
		}
		clock.end("thaw")
		e.tell(w, engine.Stage{Name: engine.StageStoring, Frozen: m.FreezeDuration})
		if capturing != nil {
			// The Pod runs; the caller removes the files when nobody writes them.
			e.log.WarnContext(ctx, "a capture was given up", "sandbox", w.sandbox.ID, "err", <-capturing)
		}
		if errors.Is(context.Cause(ctx), errBudgetUsedUp) && err != nil {
			err = e.overrun(w, m.FreezeDuration, err)
		}
	}()

	e.tell(w, engine.Stage{Name: engine.StageFreezing})
	if err := e.freeze(ctx, entry, w.targets); err != nil {
		return err
	}
	m.CutTime = time.Now().UTC()
	clock.end("freeze")
	e.tell(w, engine.Stage{Name: engine.StageCapturing})
	standing, err := e.lookAtStanding(entry, w.sandbox.Containers)
	if err != nil {
		return err
	}
	if w.lists {
		e.listMappings(ctx, w, slices.Concat(standing...))
	}
	if capturing, err = e.captureFrozen(ctx, w); err != nil {
		// An exec that was under way when its container froze can get there during
		// the capture: then that is what CRIU stumbled on.
		var late *lateStrays
		if ctx.Err() == nil {
			if _, strays := e.lookAtStanding(entry, w.sandbox.Containers); errors.As(strays, &late) {
				return late
			}
		}
		return err
	}
	clock.end("capture")
	if w.helper != nil {
		if err := e.fork(ctx, w); err != nil {
			return err
		}
		clock.end("fork")
	}
	return nil
}

// lookAtStanding looks for processes that came to stand still where they cannot be captured.
// It returns all of each container.
func (e *Engine) lookAtStanding(entry frozen, containers []engine.Container) ([][]int, error) {
	pids, err := e.standing(entry, containers)
	if err != nil {
		return nil, err
	}
	if err := lookForLate(containers, pids); err != nil {
		return nil, err
	}
	return pids, lookForSpawning(containers, pids)
}

// tell says how far a freeze window is, to whoever wants to know.
func (e *Engine) tell(w window, stage engine.Stage) {
	if e.stage != nil {
		e.stage(w.sandbox.ID, stage)
	}
}

// letGo thaws what a freeze window froze, after it has ended what is left of a
// capture that failed. It does not give up for long: what keeps CRIU from ending,
// such as a disk that does not answer, may pass, and until then nobody else tries.
func (e *Engine) letGo(ctx context.Context, entry frozen, failed bool) error {
	ctx, cancel := context.WithTimeout(ctx, thawPatience)
	defer cancel()
	for {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, thawTimeout)
			defer cancel()
			if failed {
				if err := endCapture(ctx, entry.SandboxID); err != nil {
					return err
				}
			}
			return e.thaw(ctx, entry)
		}()
		if err == nil {
			return nil
		}
		e.log.ErrorContext(ctx, "a Pod could not be thawed, trying again", "sandbox", entry.SandboxID, "err", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}

var (
	// errBudgetUsedUp ends a freeze window whose budget is nearly used up.
	errBudgetUsedUp = errors.New("the freeze budget is used up")
	// errDeadlineNear ends one that the call's deadline would outlast by too little.
	errDeadlineNear = fmt.Errorf("there was no time left to go on: %w", context.DeadlineExceeded)
)

// thawReserve is the part of a window's time that is kept for the end of the
// capture, should CRIU have to be killed, and for the thaw; where there is little
// time in all, two fifths of it.
const thawReserve = interruptPatience + killedPatience + 200*time.Millisecond

// bounded bounds a freeze window that begins now, so that the Pod runs again when
// budget (0: none) or deadline are there.
func bounded(ctx context.Context, budget time.Duration) (context.Context, context.CancelFunc) {
	limit, cause := budget, errBudgetUsedUp
	if deadline, ok := ctx.Deadline(); ok {
		if left := time.Until(deadline); limit == 0 || left < limit {
			limit, cause = left, errDeadlineNear
		}
	}
	if limit == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, limit-min(thawReserve, limit*2/5), cause)
}

// overrun is the error of a window that was ended for its budget.
func (e *Engine) overrun(w window, stood time.Duration, err error) error {
	e.log.Warn("a freeze window was ended for its budget", "sandbox", w.sandbox.ID, "budget", w.budget, "frozen", stood, "err", err)
	return fmt.Errorf("%w: the capture was given up and the Pod thawed after it had stood still for %s, its budget is %s",
		engine.ErrFreezeBudget, stood.Round(time.Millisecond), w.budget)
}

// freeze stops every container by its own cgroup. Not by the Pod's: CRIU looks
// at the container's freezer only.
func (e *Engine) freeze(ctx context.Context, entry frozen, targets []target) error {
	err := e.host.Do(func() error {
		var errs []error
		for _, q := range entry.Quotas {
			errs = append(errs, q.lift())
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("lift CPU limits for the freeze window: %w", err)
	}
	return each(targets, func(t target) error {
		i := slices.IndexFunc(entry.Containers, func(c frozenContainer) bool { return c.ID == t.ID })
		if f, ok := entry.Containers[i].freezer(); ok {
			err := e.host.Do(func() error { return f.stop(ctx) })
			if err == nil {
				return nil
			}
			e.log.InfoContext(ctx, "a container is left to its OCI runtime to freeze", "container", t.ID, "because", err)
		}
		for attempt := 1; ; attempt++ {
			if _, err := e.runtimeCapturing(ctx, entry.SandboxID, t.Runtime, "pause", t.ID); err != nil {
				// The runtime gives up, thawed, when processes keep beginning while the v1
				// freezer stops the others, as at an exec probe: a moment later it can.
				if attempt < pauseAttempts && ctx.Err() == nil {
					time.Sleep(pauseRetry)
					continue
				}
				return fmt.Errorf("freeze container %s: %w", t.Name, err)
			}
			return nil
		}
	})
}

// captureFrozen captures all containers and volumes at the same time. When ctx
// ends it returns at once, so that nothing that is slow to end (a write to a disk
// that does not answer) keeps the Pod frozen; going tells when it has ended.
func (e *Engine) captureFrozen(ctx context.Context, w window) (going <-chan error, err error) {
	inner, cancel := context.WithCancelCause(ctx)
	var jobs []func() error
	for _, a := range w.ahead {
		jobs = append(jobs, func() error { return a.capture(inner) })
	}
	if len(w.ahead) == 0 {
		for _, t := range w.targets {
			jobs = append(jobs, func() error { return e.dump(inner, w, t) })
		}
	}
	for _, t := range w.trees {
		jobs = append(jobs, func() error { return e.takeTree(inner, t) })
	}
	done := make(chan error, 1)
	go func() {
		defer cancel(nil)
		done <- each(jobs, func(job func() error) error {
			err := job()
			if err != nil {
				cancel(errElsewhere)
			}
			return err
		})
	}()
	select {
	case err := <-done:
		return nil, firstCauses(err)
	case <-ctx.Done():
		return done, context.Cause(ctx)
	}
}

// errElsewhere ends the parts of a capture when one of them has failed.
var errElsewhere = errors.New("given up because another part failed")

func wrap(err error, doing string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// firstCauses leaves out the parts that failed only because another one had.
func firstCauses(err error) error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return err
	}
	var causes []error
	for _, part := range joined.Unwrap() {
		if !errors.Is(part, errElsewhere) {
			causes = append(causes, part)
		}
	}
	if len(causes) == 0 {
		return err
	}
	return errors.Join(causes...)
}

// dump lets CRIU write a frozen container's processes. env is added to its environment.
func (e *Engine) dump(ctx context.Context, w window, t target, env ...string) error {
	env = append(env, queuesEnv+"=1")
	if w.helper != nil {
		env = append(env, noPagesEnv+"=1")
	}
	// What runtimes have no flags for, or not all of them, is in CRIU's own configuration
	// (hack/criu.sh).
	args := []string{"checkpoint", "--leave-running", "--tcp-established", "--file-locks", "--image-path", t.imageDir(), "--work-path", t.workDir}
	if tellsOfInFlight(w.runtime) {
		args = append(args, "--tcp-skip-in-flight")
	}
	out, err := e.runtimeCapturingWith(ctx, env, w.sandbox.ID, t.Runtime, append(args, t.ID)...)
	if err == nil {
		return nil
	}
	var reason string
	e.host.Do(func() error {
		reason = lastErrors(filepath.Join(t.workDir, "dump.log"))
		return nil
	})
	if ctx.Err() != nil {
		return fmt.Errorf("capture the processes of container %s: %w", t.Name, err)
	}
	if reason == "" {
		// CRIU was not started yet; the runtime writes to the disk, too.
		reason, err = out.Stderr, fmt.Errorf("capture the processes of container %s: %w", t.Name, err)
	} else {
		// The runtime's own message quotes the same log at length.
		e.log.WarnContext(ctx, "CRIU failed", "container", t.ID, "runtime", out.Stderr)
		err = fmt.Errorf("capture the processes of container %s: CRIU failed: %s", t.Name, reason)
	}
	if disk := diskError(reason); disk != nil {
		err = fmt.Errorf("write %s: %w: %w", t.dir, disk, err)
	}
	if strings.Contains(reason, "Zombies with threads") {
		err = fmt.Errorf("%w: %w", errEnding, err)
	}
	if queueMoved(reason) {
		err = fmt.Errorf("%w: %w", errMoved, err)
	}
	return err
}

// queuesEnv makes the launcher of CRIU load a library by which each TCP connection is
// captured at one moment (queues/queues.c).
const queuesEnv = "STASIS_QUEUES"

// errMoved says that the kernel took something into a connection's queue, or out of one,
// again and again while CRIU looked at it.
var errMoved = errors.New("a TCP connection went on while it was being captured")

// queueMoved finds that in CRIU's errors: it asks how much a queue holds, looks at it and
// gives up if that is another amount (soccr/soccr.c: -5 is the receive queue, -6 the send
// queue).
func queueMoved(reason string) bool {
	return strings.Contains(reason, "libsoccr_save() failed with -5") || strings.Contains(reason, "libsoccr_save() failed with -6")
}

// diskError finds the disk's error in a program's, which has only its text and not the
// file that it was about; nil if it is none of the disk's.
func diskError(reason string) error {
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO} {
		if strings.Contains(strings.ToLower(reason), errno.Error()) {
			return errno
		}
	}
	return nil
}

// thaw undoes a freeze, as far as it was done, and closes its journal entry. An
// entry that could not be undone stays, for the next start of the agent.
func (e *Engine) thaw(ctx context.Context, entry frozen) error {
	err := each(entry.Containers, func(c frozenContainer) error {
		return e.resume(ctx, c)
	})
	quotaErr := e.host.Do(func() error {
		var errs []error
		for _, q := range entry.Quotas {
			errs = append(errs, q.putBack())
		}
		return errors.Join(errs...)
	})
	if err := errors.Join(err, quotaErr); err != nil {
		return fmt.Errorf("thaw sandbox %s: %w", entry.SandboxID, err)
	}
	return e.journal.remove(entry.SandboxID)
}

// resume lets a container run, if it is there and paused.
func (e *Engine) resume(ctx context.Context, c frozenContainer) error {
	if f, ok := c.freezer(); ok {
		if e.host.Do(f.letRun) == nil {
			return nil
		} // else its OCI runtime has more to say of it
	}
	_, err := e.runtime(ctx, c.Runtime, "resume", c.ID)
	if err == nil {
		return nil
	}
	// The runtime refuses to resume what is not paused, or not there. Both are
	// what is wanted; ask which it is rather than read its error message.
	state, stateErr := e.state(ctx, c)
	if stateErr == nil && state != "paused" || errors.Is(stateErr, errNoContainer) {
		return nil
	}
	return fmt.Errorf("resume container %s: %w", c.ID, err)
}

func (e *Engine) removeWork(sandboxID string) {
	err := e.host.Do(func() error { return os.RemoveAll(filepath.Join(e.workDir, sandboxID)) })
	if err != nil {
		e.log.Warn("cannot remove the engine's log files", "sandbox", sandboxID, "err", err)
	}
}

// overlayUpper returns the writable layer of a process' root file system.
func overlayUpper(pid int) (string, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/mountinfo")
	if err != nil {
		return "", fmt.Errorf("read its mounts: %w", err)
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return "", fmt.Errorf("read its mounts: %w", err)
	}
	var root *mountinfo.Info
	for _, m := range mounts {
		if m.Mountpoint == "/" {
			root = m // the last one is on top
		}
	}
	switch {
	case root == nil:
		return "", errors.New("it has no root mount")
	case root.FSType != "overlay":
		return "", fmt.Errorf("%w: its root file system is %s; only containerd's overlayfs snapshotter is supported", engine.ErrUnsupported, root.FSType)
	}
	for option := range strings.SplitSeq(root.VFSOptions, ",") {
		if upper, ok := strings.CutPrefix(option, "upperdir="); ok {
			return upper, nil
		}
	}
	return "", fmt.Errorf("%w: its root overlay has no writable layer", engine.ErrUnsupported)
}

// publishedTo finds the volumes of a container that the kubelet writes.
func publishedTo(c engine.Container) ([]checkpoint.Published, error) {
	var found []checkpoint.Published
	for _, m := range c.Spec.Mounts {
		if m.Type != "bind" {
			continue
		}
		directory, err := published.Directory(m.Source)
		if err != nil {
			return nil, fmt.Errorf("volume at %s: %w", m.Destination, err)
		}
		if directory != "" {
			found = append(found, checkpoint.Published{Destination: m.Destination, Directory: directory})
		}
	}
	return found, nil
}

func describe(c engine.Container) checkpoint.Container {
	d := checkpoint.Container{
		Name: c.Name, ID: c.ID, Image: c.Image, ImageID: c.ImageID,
		Rootfs: containersDir + "/" + c.Name + "/" + rootfsArchive,
	}
	if !c.Created.IsZero() {
		d.Created = &c.Created
	}
	if p := c.Spec.Process; p != nil {
		d.Process = checkpoint.Process{Args: p.Args, Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Terminal: p.Terminal}
	}
	return d
}

// each runs fn for all items at once and joins their errors.
func each[T any](items []T, fn func(T) error) error {
	errs := make([]error, len(items))
	var wg sync.WaitGroup
	for i, item := range items {
		wg.Go(func() { errs[i] = fn(item) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// phases measures one phase after the other.
type phases struct {
	last time.Time
	done []checkpoint.Phase
}

func (p *phases) end(name string) {
	now := time.Now()
	p.done = append(p.done, checkpoint.Phase{Name: name, Duration: now.Sub(p.last)})
	p.last = now
}

// lastErrors returns the last few error lines of a CRIU log, without their time
// stamps and without those that mean nothing; empty when there are none.
func lastErrors(log string) string {
	data, err := os.ReadFile(log)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(data)) {
		i := strings.Index(line, "Error (")
		if i < 0 || strings.Contains(line, "Can't setup RLIMIT_NOFILE for self") || strings.Contains(line, "Dumping FAILED") {
			continue
		}
		if text := strings.TrimSpace(line[i:]); !slices.Contains(lines, text) {
			lines = append(lines, text)
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}
