package cri_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// big is a container that holds some 100 MB in a shell variable.
func big() *runtimeapi.ContainerConfig {
	return container("big", `x=$(head -c 50000000 /dev/zero | tr '\0' a); echo 1; while :; do usleep 1000; done`)
}

// frozenWhile runs fn and says for how long the Pod stood still meanwhile, at most.
func (p *pod) frozenWhile(t *testing.T, fn func()) (stood time.Duration) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		fn()
	}()
	last, began := time.Now(), time.Time{}
	for {
		now := time.Now()
		switch frozen := p.node.frozen(t, p); {
		case frozen && began.IsZero():
			began = last // it began after the look before
		case !frozen && !began.IsZero():
			stood, began = max(stood, now.Sub(began)), time.Time{}
		}
		last = now
		select {
		case <-ended:
			return stood
		case <-time.After(time.Millisecond):
		}
	}
}

// refusedUnfrozen makes a call that must be refused before anything stands still.
func (p *pod) refusedUnfrozen(t *testing.T, in *runtimeapi.CheckpointPodRequest, code codes.Code, says ...string) {
	t.Helper()
	stood := p.frozenWhile(t, func() {
		_, err := p.node.stasis.CheckpointPod(testContext(t), in)
		wantError(t, err, code, says...)
	})
	if stood != 0 {
		t.Errorf("the Pod stood still for %v", stood)
	}
	if left := p.node.entries(t, in.OutputPath); len(left) > 0 {
		t.Errorf("the directory holds %v", left)
	}
}

func wantError(t *testing.T, err error, code codes.Code, says ...string) {
	t.Helper()
	message := status.Convert(err).Message()
	if status.Code(err) != code || slices.ContainsFunc(says, func(s string) bool { return !strings.Contains(message, s) }) {
		t.Errorf("got %v: %s, want %v and a message with %q", status.Code(err), message, code, says)
	}
}

// P14.
func TestACheckpointThatIsExpectedToOutlastItsFreezeBudgetIsRefusedBeforeTheFreeze(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), big())
	p.numbers(t, "big", 1)
	in := p.checkpointRequest(t)
	in.Options = map[string]string{"freezeBudget": "1ms"} // on whatever machine
	p.refusedUnfrozen(t, in, codes.FailedPrecondition, "nothing was frozen", "MiB", "its budget is 1ms")
	in.Options["freezeBudget"] = "30s"
	_, err := theNode.stasis.CheckpointPod(testContext(t), in)
	must(t, err)
	p.goesOn(t, "a")
}

func TestAFreezeBudgetThatIsNoDurationIsRefused(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	for _, value := range []string{"", "soon", "0s", "-1s", "3"} {
		in := p.checkpointRequest(t)
		in.Options = map[string]string{"freezeBudget": value}
		p.refused(t, in, codes.InvalidArgument, "freezeBudget")
	}
}

// Scripts in place of CRIU's work: one that writes without end, and gives up when
// it cannot, as CRIU does, and one that does nothing.
const (
	slow    = `trap '' XFSZ; while echo x > /run/stasis/slow; do sleep 0.01; done; exit 1`
	hanging = `sleep 3600`
)

// replaceCRIU has a script do what CRIU does for an OCI runtime.
func (n *node) replaceCRIU(t *testing.T, work string) {
	t.Helper()
	const link, real = "/opt/stasis/bin/criu", "/opt/stasis/criu/bin/criu"
	script := fmt.Sprintf("#!/bin/sh\ncase \"$1\" in swrk) %s;; esac\nexec %s \"$@\"\n", work, real)
	var target string
	must(t, n.host.Do(func() (err error) {
		if target, err = os.Readlink(link); err != nil {
			return err
		}
		return replaceFile(link, []byte(script), 0o755)
	}))
	t.Cleanup(func() {
		must(t, n.host.Do(func() error { return errors.Join(os.Symlink(target, link+".new"), os.Rename(link+".new", link)) }))
	})
}

// P14: the probe that the budget stands for does not trip.
func TestAFreezeWindowThatOutlastsItsBudgetIsEndedBefore(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	theNode.replaceCRIU(t, slow)
	in := p.checkpointRequest(t)
	in.Options = map[string]string{"freezeBudget": "1500ms"}
	stood := p.frozenWhile(t, func() {
		_, err := theNode.stasis.CheckpointPod(testContext(t), in)
		wantError(t, err, codes.FailedPrecondition, "stood still for ", "its budget is 1.5s")
	})
	if stood == 0 || stood > 1500*time.Millisecond {
		t.Errorf("it stood still for %v, its budget was 1.5s", stood)
	}
	if left := theNode.entries(t, in.OutputPath); len(left) > 0 {
		t.Errorf("the directory holds %v", left)
	}
	p.goesOn(t, "a")
}

// P17.
func TestAnEngineThatHangsIsKilledAtTheDeadlineAndThePodGoesOn(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	theNode.replaceCRIU(t, hanging)
	in := p.checkpointRequest(t)
	stood := p.frozenWhile(t, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := theNode.stasis.CheckpointPod(ctx, in)
		wantError(t, err, codes.DeadlineExceeded)
		eventually(t, "the Pod is thawed", func() bool { return !theNode.frozen(t, p) })
	})
	if stood == 0 || stood > 5*time.Second {
		t.Errorf("it stood still for %v of a call of 5s", stood)
	}
	eventually(t, "the directory is empty", func() bool { return len(theNode.entries(t, in.OutputPath)) == 0 })
	p.goesOn(t, "a")
}

// execute runs a command in a container until it ends.
func (p *pod) execute(container string, command ...string) (int32, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	answer, err := p.node.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.containers[container], Cmd: command, Timeout: 50})
	return answer.GetExitCode(), err
}

// P16.
func TestAnExecSessionThatLastsIsRefusedBeforeTheFreezeAndNamed(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), container("b", counting))
	p.numbers(t, "b", 5)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.execute("b", "sleep", "987")
	}()
	eventually(t, "the session is there", func() bool { return strings.Contains(p.exec(t, "b", "ps"), "sleep 987") })
	p.refusedUnfrozen(t, p.checkpointRequest(t), codes.FailedPrecondition, "container b, process ", "(sleep 987)")
	p.goesOn(t, "a")
	p.exec(t, "b", "killall sleep")
	<-ended
	p.checkpoint(t)
}

func TestAnExecThatEndsSoonIsWaitedFor(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	type outcome struct {
		code int32
		err  error
	}
	ended := make(chan outcome, 1)
	go func() {
		code, err := p.execute("a", "sh", "-c", "sleep 2; exit 5")
		ended <- outcome{code, err}
	}()
	eventually(t, "the exec is there", func() bool { return strings.Contains(p.exec(t, "a", "ps"), "sleep 2") })
	p.checkpoint(t)
	if got := <-ended; got.err != nil || got.code != 5 {
		t.Errorf("it ended with %d, %v", got.code, got.err)
	}
}

// Exec probes begin when they like, also between the last look and the freeze.
func TestExecProbesDoNotBreakCheckpoints(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	var probing sync.WaitGroup
	defer probing.Wait()
	stop := make(chan struct{})
	defer close(stop)
	probing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				p.execute("a", "true") // of a frozen container it is refused
			}
		}
	})
	told := 0
	for range 12 {
		dir, m := p.checkpoint(t)
		must(t, theNode.host.Do(func() error { return os.RemoveAll(dir) }))
		told += len(m.EarlierFreezes)
		for _, f := range m.EarlierFreezes {
			if f.Duration <= 0 || f.Duration == m.FreezeDuration || f.Reason == "" {
				t.Errorf("a freeze for nothing is told as %+v", f)
			}
		}
	}
	p.goesOn(t, "a")
	retried := len(p.logged(t, "trying again"))
	t.Logf("%d attempts came to nothing, of which %d had frozen the Pod", retried, told)
	if told > retried || told == 0 && retried > 0 {
		t.Errorf("of %d attempts that came to nothing the checkpoints tell %d", retried, told)
	}
}

// smallDisk mounts a tmpfs on the node and makes a directory in it.
func (n *node) smallDisk(t *testing.T, bytes int64) (mount, dir string) {
	t.Helper()
	mount = n.directory(t)
	dir = filepath.Join(mount, "checkpoint")
	must(t, n.host.Do(func() error {
		if err := unix.Mount("small", mount, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
			return err
		}
		return os.Mkdir(dir, 0o700)
	}))
	t.Cleanup(func() {
		must(t, n.host.Do(func() error { return unix.Unmount(mount, unix.MNT_DETACH) }))
	})
	return mount, dir
}

// P32.
func TestACheckpointThatDoesNotFitIsRefusedBeforeTheFreeze(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), big())
	p.numbers(t, "big", 1)
	in := p.checkpointRequest(t)
	_, in.OutputPath = theNode.smallDisk(t, 32<<20)
	p.refusedUnfrozen(t, in, codes.ResourceExhausted, "not enough room on the disk in "+in.OutputPath, "needs about", "32Mi", "--min-free-disk")
	p.goesOn(t, "a")
}

// P17.
func TestADiskThatFillsUpFailsTheCheckpointAndNothingElse(t *testing.T) {
	t.Run("after the thaw", diskFillsUp)
	t.Run("while the Pod stands still", func(t *testing.T) {
		theNode.withoutStaging(t)
		diskFillsUp(t)
	})
}

// withoutStaging has the engine write to the disk while a Pod stands still.
func (n *node) withoutStaging(t *testing.T) {
	t.Helper()
	must(t, n.stopAgent(syscall.SIGTERM))
	must(t, n.startAgent("--max-staging-mib=0"))
	t.Cleanup(func() { must(t, errors.Join(n.stopAgent(syscall.SIGTERM), n.startAgent())) })
}

func diskFillsUp(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), big())
	p.numbers(t, "big", 1)
	var dir string
	var err error
	for range 5 { // one may be over before anybody has looked
		if dir, err = p.checkpointWhileTheDiskFillsUp(t); err != nil {
			break
		}
	}
	if err == nil {
		t.Fatal("it succeeded: the disk was not full in time")
	}
	t.Log(err)
	wantError(t, err, codes.ResourceExhausted, "no space left on device", dir)
	if left := theNode.entries(t, dir); len(left) > 0 {
		t.Errorf("the directory holds %v", left)
	}
	p.goesOn(t, "a")
	if s := p.state(t, "big"); s != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container big is %v", s)
	}
	p.checkpoint(t)
}

// checkpointWhileTheDiskFillsUp returns what becomes of a checkpoint on a disk that has no
// more room than is taken, once the Pod stands still.
func (p *pod) checkpointWhileTheDiskFillsUp(t *testing.T) (dir string, err error) {
	t.Helper()
	in := p.checkpointRequest(t)
	mount, dir := theNode.smallDisk(t, 1<<30)
	in.OutputPath = dir
	ended, filled := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(filled)
		begun := func() bool {
			images, _ := os.ReadDir(theNode.host.Path(dir + "/containers/big/criu"))
			return len(images) > 0 || theNode.frozen(t, p)
		}
		for ; !begun(); time.Sleep(time.Millisecond) {
			select {
			case <-ended:
				return
			default:
			}
		}
		theNode.host.Do(func() error {
			for end := time.Now().Add(patience); time.Now().Before(end); { // while others write, too
				var st unix.Statfs_t
				if err := unix.Statfs(mount, &st); err != nil {
					return err
				}
				taken := int64(st.Blocks-st.Bavail) * st.Bsize
				if unix.Mount("", mount, "", unix.MS_REMOUNT, fmt.Sprintf("size=%d", taken+64<<10)) == nil {
					break
				}
			}
			return nil
		})
	}()
	_, err = theNode.stasis.CheckpointPod(testContext(t), in)
	close(ended)
	<-filled
	return dir, err
}

func TestAReadOnlyDiskIsRefusedBeforeTheFreeze(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	in := p.checkpointRequest(t)
	mount, dir := theNode.smallDisk(t, 32<<20)
	in.OutputPath = dir
	must(t, theNode.host.Do(func() error { return unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") }))
	p.refusedUnfrozen(t, in, codes.ResourceExhausted, dir, "read-only")
	p.goesOn(t, "a")
}

// loopDisk mounts a file system that lies in a sparse file below place, and makes a
// directory in it.
func (n *node) loopDisk(t *testing.T, place string) (mount, dir string) {
	t.Helper()
	mount = n.directory(t)
	dir = filepath.Join(mount, "checkpoint")
	file := filepath.Join(place, filepath.Base(mount)+".img")
	must(t, n.host.Do(func() error {
		for _, command := range []string{
			"truncate -s 256M " + file, "mkfs.ext4 -q " + file, "mount -o loop " + file + " " + mount, "mkdir -m 700 " + dir,
		} {
			if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", command, err, out)
			}
		}
		return nil
	}))
	t.Cleanup(func() {
		must(t, n.host.Do(func() error { return errors.Join(unix.Unmount(mount, unix.MNT_DETACH), os.Remove(file)) }))
	})
	return mount, dir
}

// P17: a disk that says that it has written what it then cannot write.
func TestADiskThatFailsOnlyWhenItIsSyncedFailsTheCheckpoint(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), big())
	p.numbers(t, "big", 1)
	under, _ := theNode.smallDisk(t, 48<<20) // below what the disk in it says to have
	_, dir := theNode.loopDisk(t, under)
	in := p.checkpointRequest(t)
	in.OutputPath = dir
	_, err := theNode.stasis.CheckpointPod(testContext(t), in)
	t.Log(err)
	// What the loop device makes of its file's disk being full; or what the file system in
	// it does, when it was its own journal that could not be written, at once or later.
	if text := fmt.Sprint(err); strings.Contains(text, unix.EIO.Error()) || strings.Contains(text, unix.EROFS.Error()) {
		wantError(t, err, codes.Internal, "sync", dir)
	} else {
		wantError(t, err, codes.ResourceExhausted, "sync", dir, unix.ENOSPC.Error())
	}
	p.goesOn(t, "a")
	if s := p.state(t, "big"); s != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container big is %v", s)
	}
	p.checkpoint(t)
}

// P13, P17: a disk that does not answer keeps no Pod frozen.
func TestADiskThatHangsDoesNotKeepThePodFrozen(t *testing.T) {
	theNode.withoutStaging(t)
	wantError(t, checkpointedWhileTheDiskHangs(t), codes.FailedPrecondition, "its budget is 5s")
}

// Nothing goes to the disk while a Pod stands still for which there is room in memory.
func TestADiskThatHangsOnlyDelaysACheckpointThatFitsIntoMemory(t *testing.T) {
	must(t, checkpointedWhileTheDiskHangs(t))
}

// checkpointedWhileTheDiskHangs returns what becomes of a checkpoint on a disk that does
// not answer from the freeze on, until the Pod has been seen to run again.
func checkpointedWhileTheDiskHangs(t *testing.T) error {
	t.Helper()
	p := theNode.run(t, "", container("a", counting))
	p.numbers(t, "a", 5)
	under, _ := theNode.smallDisk(t, 512<<20) // to make it hang takes a flush, which must not wait for this machine's disk
	mount, dir := theNode.loopDisk(t, under)
	onMount := func(request uint) error {
		return theNode.host.Do(func() error {
			f, err := os.Open(mount)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.IoctlSetInt(int(f.Fd()), request, 0)
		})
	}
	const hang, goOn = 0xC0045877, 0xC0045878 // FIFREEZE, FITHAW
	t.Cleanup(func() { onMount(goOn) })       // if it still hangs
	in := p.checkpointRequest(t)
	in.OutputPath = dir
	in.Options = map[string]string{"freezeBudget": "5s"}
	// The disk hangs before CRIU is at work: one that hangs in a system call while it
	// is attached to the processes holds them until the disk answers.
	theNode.replaceCRIU(t, "sleep 1")
	hangs := make(chan error, 1)
	go func() {
		for end := time.Now().Add(patience); !theNode.frozen(t, p) && time.Now().Before(end); time.Sleep(time.Millisecond) {
		}
		hangs <- onMount(hang)
	}()
	answered := make(chan error, 1)
	stood := p.frozenWhile(t, func() {
		go func() {
			_, err := theNode.stasis.CheckpointPod(testContext(t), in)
			answered <- err
		}()
		must(t, <-hangs)
		select {
		case err := <-answered:
			answered <- err
		case <-time.After(7 * time.Second):
		}
	})
	if stood == 0 || stood > 5*time.Second {
		t.Errorf("it stood still for %v, its budget was 5s", stood)
	}
	p.goesOn(t, "a") // while the disk still hangs
	must(t, onMount(goOn))
	err := <-answered
	if left := theNode.entries(t, dir); err != nil && len(left) > 0 && !slices.Equal(left, []string{"lost+found"}) {
		t.Errorf("the directory holds %v", left)
	}
	return err
}
