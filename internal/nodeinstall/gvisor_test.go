package nodeinstall

import (
	"errors"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// withGVisor is a node whose containerd has a handler for gVisor.
func withGVisor(t *testing.T) *node {
	t.Helper()
	n := newNode(t, "v2.4.2", "")
	n.write("usr/bin/runsc", "#!runsc")
	n.write("etc/containerd/runsc.toml", "root = \"/run/sandboxes\"\n[runsc_config]\n  platform = \"kvm\"\n")
	n.write("etc/containerd/config.toml", `version = 3
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc]
  runtime_type = "io.containerd.runsc.v1"
  pod_annotations = ["dev.gvisor.*"]
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc.options]
    TypeUrl = "io.containerd.runsc.v1.options"
    ConfigPath = "`+n.path("etc/containerd/runsc.toml")+`"
`)
	n.start()
	return n
}

func TestANodeWithGVisorGetsAHandlerThatRestoresWithIt(t *testing.T) {
	n := withGVisor(t)
	before := n.etc()
	n.install()
	ours, ok := handlersOf(n.running)[GVisorHandlerName].(map[string]any)
	if !ok {
		t.Fatal("the containerd that runs does not know the handler")
	}
	options, _ := ours["options"].(map[string]any)
	if ours["runtime_type"] != runscShim || options["ConfigPath"] != runscSettings {
		t.Errorf("the handler is %v", ours)
	}
	if passed, _ := ours["pod_annotations"].([]any); len(passed) != 1 || passed[0] != podAnnotations {
		t.Errorf("it passes on %v", passed)
	}
	var settings struct {
		BinaryName  string            `toml:"binary_name"`
		Root        string            `toml:"root"`
		RunscConfig map[string]string `toml:"runsc_config"`
	}
	if err := toml.Unmarshal([]byte(n.read("opt/stasis/etc/runsc.toml")), &settings); err != nil {
		t.Fatal(err)
	}
	if settings.BinaryName != "/opt/stasis/bin/stasis-runsc" || settings.Root != "/run/sandboxes" || settings.RunscConfig["platform"] != "kvm" {
		t.Errorf("the shim's settings are %+v", settings)
	}
	if got := n.read("opt/stasis/etc/runsc.json"); !strings.Contains(got, n.path("usr/bin/runsc")) {
		t.Errorf("runsc is %s", got)
	}
	starts := n.starts
	n.install()
	if n.starts != starts {
		t.Error("installing again restarted containerd")
	}
	n.sandbox = []*runtimeapi.PodSandbox{{RuntimeHandler: GVisorHandlerName, Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: "restored"}}}
	if err := n.installer().Uninstall(t.Context(), n.removal()); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "ns/restored") {
		t.Errorf("uninstalling under a restored Pod: %v", err)
	}
	n.sandbox = nil
	if err := n.installer().Uninstall(t.Context(), n.removal()); err != nil {
		t.Fatal(err)
	}
	if after := n.etc(); after != before {
		t.Errorf("it leaves:\n%s\nwant:\n%s", after, before)
	}
}

func TestANodeThatHasLostGVisorLosesTheHandler(t *testing.T) {
	n := withGVisor(t)
	n.install()
	main := n.read("etc/containerd/config.toml")
	n.write("etc/containerd/config.toml", main[:strings.Index(main, "version = 3")]+"version = 3\n")
	n.start()
	n.install()
	if _, has := handlersOf(n.running)[GVisorHandlerName]; has {
		t.Error("containerd still knows it")
	}
	if got := n.read("opt/stasis/etc/runsc.json"); got != "(none)" {
		t.Errorf("runsc.json is %s", got)
	}
}
