package hooks_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
)

func TestHooksAreReadAsOneOrManyInJSONOrYAML(t *testing.T) {
	one := []hooks.Hook{{Container: "db", Exec: &hooks.Exec{Command: []string{"sync", "-f"}}, TimeoutSeconds: 5, FailurePolicy: hooks.Ignore}}
	two := []hooks.Hook{
		{Container: "db", Exec: &hooks.Exec{Command: []string{"true"}}, TimeoutSeconds: hooks.DefaultTimeoutSeconds, FailurePolicy: hooks.Fail},
		{Container: "web", HTTPGet: &hooks.HTTPGet{Port: 8080, Path: "/quiesce?now=1"}, TimeoutSeconds: 120, FailurePolicy: hooks.Fail},
	}
	for value, want := range map[string][]hooks.Hook{
		`{"container":"db","exec":{"command":["sync","-f"]},"timeoutSeconds":5,"failurePolicy":"Ignore"}`:                                              one,
		"container: db\nexec: {command: [sync, -f]}\ntimeoutSeconds: 5\nfailurePolicy: Ignore\n":                                                       one,
		`[{"container":"db","exec":{"command":["true"]}},{"container":"web","httpGet":{"port":8080,"path":"/quiesce?now=1"},"timeoutSeconds":120}]`:    two,
		"- container: db\n  exec: {command: [\"true\"]}\n- container: web\n  httpGet: {port: 8080, path: \"/quiesce?now=1\"}\n  timeoutSeconds: 120\n": two,
	} {
		got, err := hooks.Of(map[string]string{v1alpha1.AnnotationPreCheckpoint: value}, v1alpha1.AnnotationPreCheckpoint)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", value, err, diff)
		}
	}
	if none, err := hooks.Of(nil, v1alpha1.AnnotationPostRestore); none != nil || err != nil {
		t.Errorf("without an annotation: %v, %v", none, err)
	}
}

func TestHooksThatAreNotAsTheyHaveToBeAreRefusedWithWhatIsWrong(t *testing.T) {
	many := strings.Repeat(`{"container":"a","exec":{"command":["b"]}},`, hooks.MaxHooks+1)
	for _, c := range []struct{ annotation, value, says string }{
		{v1alpha1.AnnotationPreCheckpoint, ``, "it is empty"},
		{v1alpha1.AnnotationPreCheckpoint, `[]`, "it has 0 hooks"},
		{v1alpha1.AnnotationPreCheckpoint, `[` + strings.TrimSuffix(many, ",") + `]`, "it has 17 hooks, 1 to 16 are allowed"},
		{v1alpha1.AnnotationPreCheckpoint, `"run sync"`, "not a hook"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container": "a"`, "neither JSON nor YAML"},
		{v1alpha1.AnnotationPreCheckpoint, `{"exec":{"command":["b"]}}`, "container is needed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a"}`, "one of exec and httpGet is needed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":["b"]},"httpGet":{"port":1}}`, "one of exec and httpGet is needed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":[]}}`, "exec.command is needed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":[""]}}`, "exec.command is needed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":"b"}}`, "cannot unmarshal string"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","httpGet":{"port":0}}`, "httpGet.port is 0"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","httpGet":{"port":65536}}`, "httpGet.port is 65536"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","httpGet":{"port":80,"path":"quiesce"}}`, "no path that begins with /"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","httpGet":{"port":80,"path":"//other.example/x"}}`, "no path that begins with /"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","httpGet":{"port":80,"host":"10.0.0.1"}}`, `unknown field "httpGet.host"`},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":["b"]},"timeout":3}`, `unknown field "timeout"`},
		{v1alpha1.AnnotationPreCheckpoint, `{"Container":"a","exec":{"command":["b"]}}`, `unknown field "Container"`},
		{v1alpha1.AnnotationPreCheckpoint, "container: a\ncontainer: b\nexec: {command: [c]}", "already set"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":["b"]},"timeoutSeconds":121}`, "timeoutSeconds is 121, 1 to 120 are allowed"},
		{v1alpha1.AnnotationPreCheckpoint, `{"container":"a","exec":{"command":["b"]},"timeoutSeconds":-1}`, "timeoutSeconds is -1"},
		{v1alpha1.AnnotationPostRestore, `{"container":"a","exec":{"command":["b"]},"failurePolicy":"ignore"}`, `failurePolicy is "ignore"`},
		{v1alpha1.AnnotationPostCheckpoint, `{"container":"a","exec":{"command":["b"]},"failurePolicy":"Ignore"}`, "failurePolicy is not for this hook"},
		{v1alpha1.AnnotationPostRestore, strings.Repeat(" ", hooks.MaxBytes+1), "it has 16385 bytes, 16384 are allowed"},
		{v1alpha1.AnnotationPostRestore, `{"container":"setup","exec":{"command":["b"]}}`, `hook 1: the Pod has no container "setup" that a hook can run in; it has a, b`},
		{v1alpha1.GroupName + "/pre-checkpiont", `{}`, "is none that Stasis knows: hooks are checkpoint.podstasis.dev/pre-checkpoint, "},
		{v1alpha1.GroupName + "/post-start", `{}`, "is none that Stasis knows"},
	} {
		err := hooks.Check(map[string]string{c.annotation: c.value}, []string{"a", "b"})
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "annotation "+c.annotation) {
			t.Errorf("%.80s: %v, want %q", c.value, err, c.says)
		}
	}
	good := map[string]string{
		v1alpha1.AnnotationPreCheckpoint: `{"container":"a","exec":{"command":["b"]}}`, v1alpha1.AnnotationRestoreFrom: "x",
		"example.com/pre-checkpiont": "somebody else's",
	}
	if err := hooks.Check(good, []string{"a"}); err != nil {
		t.Errorf("a hook that is right: %v", err)
	}
}

func FuzzHooks(f *testing.F) {
	f.Add(`{"container":"a","exec":{"command":["b"]}}`)
	f.Add("- container: a\n  httpGet: {port: 1}\n")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, value string) {
		list, err := hooks.Of(map[string]string{v1alpha1.AnnotationPreCheckpoint: value}, v1alpha1.AnnotationPreCheckpoint)
		if err != nil {
			return
		}
		for _, h := range list {
			if h.Container == "" || (h.Exec == nil) == (h.HTTPGet == nil) || h.TimeoutSeconds < 1 || h.TimeoutSeconds > hooks.MaxTimeoutSeconds {
				t.Errorf("%q was read as %+v", value, h)
			}
		}
	})
}
