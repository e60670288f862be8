// Package enginetest is what every engine has to hold, as tests: an engine that passes can
// be put beside the others.
package enginetest

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
)

// Subject is a sandbox that runs, with one container, whose process counts without end.
type Subject struct {
	engine.Sandbox
	// Count is how far it has counted, as it has told.
	Count func(t *testing.T) int
}

// Config is an engine and what it is tried on.
type Config struct {
	Engine engine.Engine
	// Start starts a new subject from 0. The test removes it.
	Start func(t *testing.T) Subject
	// Restore makes a subject of a checkpoint, in a sandbox of its own.
	Restore func(t *testing.T, dir string, m *checkpoint.Manifest) Subject
	// Directory makes an empty directory where the engine writes. path is where this process
	// finds it.
	Directory func(t *testing.T) (dir, path string)
	// Foreign makes a checkpoint one of another kind that this engine cannot restore here,
	// beyond what no engine can; by what it is then.
	Foreign map[string]func(m *checkpoint.Manifest)
}

// patience bounds every wait.
const patience = time.Minute

// Run tries an engine.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, c Config)
	}{
		{"it names itself, with a version", namesItself},
		{"it captures sandboxes of its runtimes and of no others", captures},
		{"it lists its options, and refuses others", options},
		{"it looks at a sandbox that runs on", examines},
		{"a sandbox runs on after its checkpoint, and from it in another", checkpoints},
		{"a sandbox runs on when its checkpoint is refused or given up", givesUp},
		{"it says what it can restore", compares},
		{"there is nothing to thaw where nothing is frozen", thaws},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// countsOn waits until a subject has counted on.
func countsOn(t *testing.T, s Subject) int {
	t.Helper()
	first := s.Count(t)
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if now := s.Count(t); now > first {
			return now
		}
		if time.Now().After(end) {
			t.Fatalf("it stands still at %d", first)
		}
	}
}

func namesItself(t *testing.T, c Config) {
	program, err := c.Engine.Identify(within(t))
	if err != nil || program.Name != c.Engine.Name() || program.Name == "" || program.Version == "" {
		t.Errorf("it is %q and says that it is %+v, %v", c.Engine.Name(), program, err)
	}
}

func captures(t *testing.T, c Config) {
	if r := c.Start(t).Containers[0].Runtime; !c.Engine.Captures(r) {
		t.Errorf("not of its own, %+v", r)
	}
	if nobodys := (engine.Runtime{Type: "io.example.nobodys.v1", Binary: "nobodys"}); c.Engine.Captures(nobodys) {
		t.Error("of any")
	}
}

func options(t *testing.T, c Config) {
	known := c.Engine.Options()
	if !slices.ContainsFunc(known, func(o engine.Option) bool { return o.Name == engine.OptionFreezeBudget }) {
		t.Errorf("it does not list %s", engine.OptionFreezeBudget)
	}
	err := engine.CheckOptions(c.Engine, map[string]string{"noSuchOption": "1"})
	for _, o := range known {
		if o.Name == "" || o.Default == "" || o.Help == "" || len(o.Values) == 0 && o.Form == "" {
			t.Errorf("of an option it says only %+v", o)
		}
		for _, value := range o.Values {
			if err := engine.CheckOptions(c.Engine, map[string]string{o.Name: value}); err != nil {
				t.Errorf("it lists %s=%s: %v", o.Name, value, err)
			}
		}
		if err := engine.CheckOptions(c.Engine, map[string]string{o.Name: "no such value"}); !errors.Is(err, engine.ErrOption) {
			t.Errorf("%s takes what it does not list: %v", o.Name, err)
		}
		if err == nil || !strings.Contains(err.Error(), o.Name) {
			t.Errorf("whoever names an option that there is not is told %v, and nothing of %s", err, o.Name)
		}
	}
	for _, good := range []map[string]string{nil, {}, {engine.OptionFreezeBudget: "800ms"}} {
		if err := engine.CheckOptions(c.Engine, good); err != nil {
			t.Errorf("%v: %v", good, err)
		}
	}
	for _, bad := range []map[string]string{{"noSuchOption": "1"}, {engine.OptionFreezeBudget: "fast"}, {engine.OptionFreezeBudget: "-1s"}, {engine.OptionFreezeBudget: "1s", "noSuchOption": ""}} {
		if err := engine.CheckOptions(c.Engine, bad); !errors.Is(err, engine.ErrOption) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func examines(t *testing.T, c Config) {
	s := c.Start(t)
	countsOn(t, s)
	if x, err := c.Engine.Examine(within(t), s.Sandbox); err != nil || len(x.Problems) > 0 {
		t.Errorf("problems %q, %v", x.Problems, err)
	}
	if e, err := c.Engine.Estimate(within(t), s.Sandbox, nil); err != nil || e.Bytes <= 0 || e.Freeze <= 0 {
		t.Errorf("the estimate is %+v, %v", e, err)
	}
	countsOn(t, s)
}

func checkpoints(t *testing.T, c Config) {
	s := c.Start(t)
	before := countsOn(t, s)
	dir, path := c.Directory(t)
	began := time.Now()
	m, err := c.Engine.Checkpoint(within(t), s.Sandbox, dir, nil)
	took := time.Since(began)
	if err != nil {
		t.Fatal(err)
	}
	after := countsOn(t, s)
	if m.Engine.Name != c.Engine.Name() || m.Engine.Version == "" || m.Platform.OS == "" || m.Platform.Architecture == "" {
		t.Errorf("it is of %+v on %+v", m.Engine, m.Platform)
	}
	if m.Sandbox.ID != s.ID || m.Sandbox.UID != s.UID || m.Sandbox.Name != s.Name || m.Sandbox.Namespace != s.Namespace {
		t.Errorf("it is of %+v, not of %+v", m.Sandbox, s.Sandbox)
	}
	if len(m.Containers) != 1 || m.Containers[0].Name != s.Containers[0].Name || m.Containers[0].ID != s.Containers[0].ID {
		t.Errorf("it has the containers %+v", m.Containers)
	}
	if m.FreezeDuration <= 0 || m.FreezeDuration > took {
		t.Errorf("frozen for %v of %v", m.FreezeDuration, took)
	}
	if m.CutTime.Before(began.Add(-time.Millisecond)) || m.CutTime.After(began.Add(took)) {
		t.Errorf("the cut was at %v, the call began at %v and took %v", m.CutTime, began, took)
	}
	if _, err := checkpoint.Seal(t.Context(), path, m); err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.Verify(t.Context(), path, ""); err != nil {
		t.Error(err)
	}
	restored := c.Restore(t, dir, m)
	if first := countsOn(t, restored); first < before {
		t.Errorf("restored, it is at %d; the source had told %d before the cut and %d after", first, before, after)
	}
	countsOn(t, s)
}

func givesUp(t *testing.T, c Config) {
	s := c.Start(t)
	countsOn(t, s)
	ended, end := context.WithCancel(t.Context())
	end()
	for _, way := range []struct {
		name    string
		ctx     context.Context
		options map[string]string
		is      error
	}{
		{"an unknown option", within(t), map[string]string{"noSuchOption": "1"}, engine.ErrOption},
		{"a budget that is too small", within(t), map[string]string{engine.OptionFreezeBudget: "1ns"}, engine.ErrFreezeBudget},
		{"a call that has ended", ended, nil, context.Canceled},
	} {
		dir, path := c.Directory(t)
		if m, err := c.Engine.Checkpoint(way.ctx, s.Sandbox, dir, way.options); !errors.Is(err, way.is) || m != nil {
			t.Errorf("%s: %v, %v", way.name, m, err)
		}
		if _, err := os.Stat(path + "/" + checkpoint.ManifestName); err == nil {
			t.Errorf("%s: it left a manifest", way.name)
		}
		countsOn(t, s)
	}
}

func compares(t *testing.T, c Config) {
	s := c.Start(t)
	countsOn(t, s)
	dir, _ := c.Directory(t)
	m, err := c.Engine.Checkpoint(within(t), s.Sandbox, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	m.FormatVersion = checkpoint.FormatVersion
	if err := c.Engine.CheckRestore(within(t), m); err != nil {
		t.Errorf("its own: %v", err)
	}
	foreign := map[string]func(*checkpoint.Manifest){
		"another engine's":       func(m *checkpoint.Manifest) { m.Engine.Name = "nobodys" },
		"a later version's":      func(m *checkpoint.Manifest) { m.Engine.Version = "999.0" },
		"another architecture's": func(m *checkpoint.Manifest) { m.Platform.Architecture = "pdp11" },
	}
	maps.Copy(foreign, c.Foreign)
	for what, spoil := range foreign {
		other := *m
		spoil(&other)
		if err := c.Engine.CheckRestore(within(t), &other); !errors.Is(err, engine.ErrIncompatible) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func thaws(t *testing.T, c Config) {
	s := c.Start(t)
	if err := c.Engine.ThawLeftovers(within(t)); err != nil {
		t.Error(err)
	}
	countsOn(t, s)
}
