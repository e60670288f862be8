package ociruntime_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
)

// The moments at which a start is interrupted, once.
const (
	never        = "never"
	withRuntime  = "before anything is done"         // the real runtime is killed too
	aloneBefore  = "before the real runtime is done" // which goes on
	aloneAfter   = "after the real runtime is done"
	goesOnBehind = "0.3" // seconds that it takes then
)

// freezer is a hook of the real runtime that keeps which containers stand still, as
// the kernel's does, and kills who called it at a moment.
func (b *bench) freezer(moment string) {
	b.t.Helper()
	b.must(os.WriteFile(b.hook(), []byte(`
for last; do id=$last; done
at() { [ "$1" = "`+moment+`" ] && [ ! -e `+b.dir+`/interrupted ] && touch `+b.dir+`/interrupted && kill -9 $PPID; }
case "$*" in
*" resume "*)
	[ ! -e `+b.dir+`/ran-$id ] || exit 1
	! at "`+withRuntime+`" || exit 1
	! at "`+aloneBefore+`" || sleep `+goesOnBehind+`
	touch `+b.dir+`/ran-$id
	! at "`+aloneAfter+`" || sleep `+goesOnBehind+`;;
*" state "*)
	if [ -e `+b.dir+`/ended-$id ]; then s=stopped; elif [ -e `+b.dir+`/ran-$id ]; then s=running; else s=paused; fi
	echo '{"status":"'$s'"}';;
esac
`), 0o644))
}

func (b *bench) ran(id string) bool {
	_, err := os.Stat(filepath.Join(b.dir, "ran-"+id))
	return err == nil
}

func (b *bench) stage(container string) nodeapi.ReportStage {
	b.t.Helper()
	p, err := nodeapi.ReadProgress(b.work(container))
	b.must(err)
	return p.Stage
}

// together makes a sandbox whose containers go together, and restores them.
func (b *bench) together(containers map[string]string) {
	b.t.Helper()
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore}
	for _, name := range containers {
		b.answer.Together = append(b.answer.Together, name)
	}
	slices.Sort(b.answer.Together)
	b.must(b.run("create", "--bundle", b.bundle, "s1"))
	b.restored(containers)
}

func TestWhatWasLetGoIsKeptThoughNoAgentHearsOfIt(t *testing.T) {
	// Each start writes to the disk, which may be busy: one of some that is quick shows that
	// it is not the agent that is waited for.
	const tries = 5
	for try := 1; ; try++ {
		b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
		b.freezer(never)
		b.together(map[string]string{"c1": "web", "c2": "log"})
		b.must(os.Remove(b.dir + "/s"))
		b.must(b.run("start", "c1"))
		if s := b.stage("web"); s != nodeapi.StageCreated {
			t.Errorf("container web, which waits, is %q", s)
		}
		began := time.Now()
		b.must(b.run("start", "c2"))
		took := time.Since(began)
		for _, name := range []string{"web", "log"} {
			if s := b.stage(name); s != nodeapi.StageStarted {
				t.Errorf("container %s is %q", name, s)
			}
		}
		if took < time.Second {
			return
		}
		if try == tries {
			t.Fatalf("each of %d starts waited for an agent that is away, the last for %v", tries, took)
		}
	}
}

// A container's start is interrupted at any moment; whoever comes next finds out
// whether it has run.
func TestWhetherAContainerHasRunWhoseStartWasInterruptedIsFoundOut(t *testing.T) {
	for how, next := range map[string][]string{
		"the agent looks": {nodeapi.LookCommand, "c1"},
		"it is killed":    {"kill", "c1", "9"},
		"it is deleted":   {"delete", "--force", "c1"},
	} {
		for moment, want := range map[string]nodeapi.ReportStage{
			withRuntime: nodeapi.StageCreated, aloneBefore: nodeapi.StageStarted, aloneAfter: nodeapi.StageStarted,
		} {
			t.Run(how+", interrupted "+moment, func(t *testing.T) {
				b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
				b.freezer(moment)
				b.together(map[string]string{"c1": "web"})
				if b.run("start", "c1") == nil {
					t.Fatal("the start was not interrupted")
				}
				if s := b.stage("web"); s != nodeapi.StageStarting {
					t.Errorf("before anybody looks it is %q", s)
				}
				b.must(b.run(next...))
				if s := b.stage("web"); s != want || b.ran("c1") != (want == nodeapi.StageStarted) {
					t.Errorf("it is %q, want %q; it has run: %v", s, want, b.ran("c1"))
				}
			})
		}
	}
}

func TestAContainerThatRanAndEndedAfterItsStartWasInterruptedHasBeenLetGo(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.freezer(aloneAfter)
	b.together(map[string]string{"c1": "web"})
	if b.run("start", "c1") == nil {
		t.Fatal("the start was not interrupted")
	}
	b.must(os.WriteFile(b.dir+"/ended-c1", nil, 0o644))
	b.must(b.run("delete", "c1"))
	if s := b.stage("web"); s != nodeapi.StageStarted {
		t.Errorf("it is %q", s)
	}
}

// The start of the last of them is interrupted when the first was let go already: its
// successor lets go what is left, and tells of both.
func TestContainersThatGoTogetherGoAtTheNextStartWhenOneWasInterrupted(t *testing.T) {
	for _, moment := range []string{withRuntime, aloneBefore, aloneAfter} {
		t.Run("interrupted "+moment, func(t *testing.T) {
			b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
			b.freezer(moment)
			b.together(map[string]string{"c1": "log", "c2": "web"})
			b.must(b.run("start", "c1"))
			if b.run("start", "c2") == nil {
				t.Fatal("the start was not interrupted")
			}
			b.restored(map[string]string{"c3": "web"}) // in the place of c2
			b.must(b.run("start", "c3"))
			if !b.ran("c1") || !b.ran("c3") || b.ran("c2") {
				t.Errorf("run do c1: %v, c2: %v, c3: %v", b.ran("c1"), b.ran("c2"), b.ran("c3"))
			}
			if got := b.started(); !slices.Equal(got, []string{"log", "web"}) {
				t.Errorf("the agent heard of %q", got)
			}
			if l, w := b.stage("log"), b.stage("web"); l != nodeapi.StageStarted || w != nodeapi.StageStarted {
				t.Errorf("kept are %q and %q", l, w)
			}
		})
	}
}

func TestAContainerThatCannotBeResumedHasNotBeenLetGo(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.together(map[string]string{"c1": "web"})
	b.must(os.WriteFile(b.failing, nil, 0o644))
	if b.run("start", "c1") == nil {
		t.Error("no error")
	}
	if s := b.stage("web"); s != nodeapi.StageCreated || len(b.started()) != 0 {
		t.Errorf("it is %q, the agent heard of %v", s, b.started())
	}
}

// An agent that is stopped takes what is said to it and does not answer.
func TestAnAgentThatHangsHoldsNoContainerBack(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.freezer(never)
	b.together(map[string]string{"c1": "web", "c2": "log"})
	b.must(os.Remove(b.dir + "/s"))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.dir + "/s"})
	b.must(err)
	defer l.Close()
	b.must(b.run("start", "c1"))
	done := make(chan error, 1)
	go func() { done <- b.run("start", "c2") }()
	b.must(l.SetDeadline(time.Now().Add(time.Minute)))
	said, err := l.Accept()
	if err != nil {
		t.Fatalf("the agent does not hear of them: %v", err)
	}
	defer said.Close()
	began := time.Now()
	if !b.ran("c1") || !b.ran("c2") {
		t.Errorf("when the agent hears of them run do c1: %v, c2: %v", b.ran("c1"), b.ran("c2"))
	}
	b.must(<-done)
	if took := time.Since(began); took > 30*time.Second { // it is waited for 2 s for each; without a bound it would be minutes
		t.Errorf("the start took %v", took)
	}
}

func TestContainersOfASandboxAreMadeOneAfterTheOther(t *testing.T) {
	b := newBench(t, sandboxOf("container", restoreFrom, "c"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionOrdinary}
	other, err := os.Open(b.root + "/s1")
	b.must(err)
	b.must(syscall.Flock(int(other.Fd()), syscall.LOCK_EX))
	done := make(chan error, 1)
	go func() { done <- b.create() }()
	time.Sleep(100 * time.Millisecond)
	if asked := b.asked(); len(asked) != 0 {
		t.Errorf("while another is being made the agent was asked %+v", asked)
	}
	b.must(other.Close())
	b.must(<-done)
}
