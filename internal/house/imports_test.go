// Package house tests rules about the source itself.
package house

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "podstasis.dev/stasis/"

// Each rule says what a room of the house may not reach, directly or through
// others. CONTRIBUTING.md says what lives in which room.
var rules = []struct {
	room  string   // package, or with /... all below it
	never []string // prefixes of import paths
	why   string
}{
	{"api/...", []string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime", module + "internal"},
		"whoever imports the API types gets apimachinery and core/v1 and nothing else"},
	{"internal/checkpoint", []string{".", module},
		"the vocabulary is the standard library's, and a hash"},
	{"internal/archive", []string{"k8s.io", "sigs.k8s.io", module + "internal/engine", module + "internal/agent", module + "internal/layer"},
		"users read archives on any machine"},
	{"internal/contents/...", append([]string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime", module + "internal/layer"}, nodeSide...),
		"users read checkpoints on any machine"},
	{"internal/store/...", append([]string{"k8s.io", "sigs.k8s.io", module + "api", module + "internal/checkpoint"}, nodeSide...),
		"a store knows files and blocks, not what they are of"},
	{"internal/nodeapi", []string{".", module},
		"stasis-restore starts several times for each container that is restored"},
	{"cmd/stasis-restore", []string{"k8s.io", "sigs.k8s.io", "google.golang.org"},
		"it starts several times for each container that is restored"},
	{"internal/engine/...", []string{"k8s.io", "sigs.k8s.io", module + "api", module + "internal/agent"},
		"an engine knows sandboxes, not Pods"},
	{"internal/criservice", []string{"k8s.io/client-go", "k8s.io/api/", "sigs.k8s.io/controller-runtime", module + "api", module + "internal/agent"},
		"the CRI layer works without Kubernetes"},
	{"test/cri/conformance", []string{module},
		"it tests any container runtime, by the CRI alone"},
	{"internal/restoring", []string{"k8s.io", "sigs.k8s.io", module + "api", module + "internal/agent"},
		"the CRI layer works without Kubernetes"},
	{"internal/store/backend/...", append([]string{"k8s.io", "sigs.k8s.io", module + "api"}, nodeSide...),
		"a backend keeps objects under names and knows nothing of what is in them"},
	{"internal/controller", nodeSide, "the API layer knows Pods and objects, never a process or a file"},
	{"internal/admission", nodeSide, "the API layer knows Pods and objects, never a process or a file"},
	{"internal/agentapi", nodeSide, "it is what both sides say to each other"},
	{"internal/apiserver/...", nodeSide, "the API layer knows Pods and objects, never a process or a file"},
	{"internal/kubectl", nodeSide, "a user's program has no business on a node"},
}

// besides are what a room may reach although its rule says never.
var besides = map[string][]string{
	"internal/checkpoint": {"github.com/zeebo/blake3", "github.com/klauspost/cpuid/v2"},
}

var nodeSide = []string{
	module + "internal/agent", module + "internal/engine", module + "internal/criservice",
	module + "internal/restoring", module + "internal/ociruntime", module + "internal/hostns",
	"k8s.io/cri-api",
}

func TestNoRoomImportsWhatItMustNotKnow(t *testing.T) {
	for _, rule := range rules {
		for _, pkg := range list(t, "{{.ImportPath}}", "./../../"+rule.room) {
			for _, dep := range list(t, `{{range .Deps}}{{println .}}{{end}}`, pkg) {
				if slices.ContainsFunc(besides[rule.room], func(module string) bool { return dep == module || strings.HasPrefix(dep, module+"/") }) {
					continue
				}
				if slices.ContainsFunc(rule.never, func(prefix string) bool { return forbidden(dep, prefix) }) {
					t.Errorf("%s imports %s, directly or not: %s", strings.TrimPrefix(pkg, module), dep, rule.why)
				}
			}
		}
	}
}

func TestNothingImportsCmd(t *testing.T) {
	for _, pkg := range list(t, "{{.ImportPath}}", "./../../...") {
		for _, dep := range list(t, `{{range .Imports}}{{println .}}{{end}}`, pkg) {
			if strings.HasPrefix(dep, module+"cmd/") {
				t.Errorf("%s imports %s", pkg, dep)
			}
		}
	}
}

// forbidden says whether a package falls under a prefix. The prefix "." means
// everything that is not of the standard library.
func forbidden(pkg, prefix string) bool {
	if prefix == "." {
		first, _, _ := strings.Cut(strings.TrimPrefix(pkg, "vendor/"), "/")
		return strings.Contains(first, ".") && !strings.HasPrefix(pkg, "vendor/")
	}
	if strings.HasPrefix(prefix, module) && !strings.HasSuffix(prefix, "/") {
		return pkg == prefix || strings.HasPrefix(pkg, prefix+"/") // internal/agent is not internal/agentapi
	}
	return strings.HasPrefix(pkg, prefix)
}

func list(t *testing.T, format string, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-f", format}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	return strings.Fields(string(out))
}
