package cri_test

import (
	"log/slog"
	"strconv"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/engine/enginetest"
	"podstasis.dev/stasis/internal/engine/gvisor"
)

// The engines beside the agent, in what all of them have to hold.

func TestTheCRIUEnginePassesTheSuite(t *testing.T) {
	theNode.conforms(t, "", criu.New(criu.Config{Host: theNode.host, RunDir: suiteRunDir, Log: slog.New(slog.DiscardHandler)}), map[string]func(*checkpoint.Manifest){
		"one with other cgroups": func(m *checkpoint.Manifest) {
			m.Platform.Cgroups = map[string]string{"v1": "v2", "v2": "v1"}[m.Platform.Cgroups]
		},
	})
}

func TestTheGVisorEnginePassesTheSuite(t *testing.T) {
	theNode.conforms(t, gvisorHandler, gvisor.New(gvisor.Config{
		Host: theNode.host, RunDir: suiteRunDir, Runsc: "/opt/stasis/bin/stasis-runsc", Log: slog.New(slog.DiscardHandler),
	}), nil)
}

// suiteRunDir is not the agent's: its guard knows nothing of what is frozen here.
const suiteRunDir = "/run/stasis-suite"

func (n *node) conforms(t *testing.T, handler string, e engine.Engine, foreign map[string]func(*checkpoint.Manifest)) {
	service := criservice.New(criservice.Config{Runtime: n.runtime, Engines: engine.Engines{e}})
	subject := func(t *testing.T, p *pod) enginetest.Subject {
		t.Helper()
		p.numbers(t, "main", 1)
		sandbox, by, err := service.Captured(testContext(t), p.sandbox, p.ids())
		must(t, err)
		if by != e {
			t.Fatalf("it is captured by %s", by.Name())
		}
		return enginetest.Subject{Sandbox: sandbox, Count: func(t *testing.T) int {
			lines := p.lines(t, "main")
			count, err := strconv.Atoi(lines[len(lines)-1])
			must(t, err)
			return count
		}}
	}
	main := container("main", counting)
	enginetest.Run(t, enginetest.Config{
		Engine: e, Foreign: foreign,
		Start: func(t *testing.T) enginetest.Subject { return subject(t, n.run(t, handler, main)) },
		Restore: func(t *testing.T, dir string, _ *checkpoint.Manifest) enginetest.Subject {
			return subject(t, n.restoreByEngine(t, dir, []*runtimeapi.ContainerConfig{main}...))
		},
		Directory: func(t *testing.T) (string, string) {
			dir := n.directory(t)
			return dir, n.host.Path(dir)
		},
	})
}
