// Package hooks reads the commands that a Pod asks to have run around its
// checkpoints and after its restore, from its annotations. Admission and the agent
// read them with the same code: what one admits the other does not refuse.
package hooks

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Bounds of what an annotation may hold.
const (
	// MaxBytes of one annotation's value.
	MaxBytes = 16 << 10
	// MaxHooks in one annotation.
	MaxHooks = 16
	// maxCommand is how many words a command has at most.
	maxCommand = 64

	// DefaultTimeoutSeconds bounds a hook that says nothing of its own, and
	// MaxTimeoutSeconds what one may say.
	DefaultTimeoutSeconds = 10
	MaxTimeoutSeconds     = 120
)

// FailurePolicy says what a hook's failure means.
type FailurePolicy string

// The failure policies.
const (
	// Fail ends what the hook belongs to: the checkpoint fails; the restored container
	// is stopped.
	Fail FailurePolicy = "Fail"
	// Ignore goes on; an event tells of the failure.
	Ignore FailurePolicy = "Ignore"
)

// Hook is one command or request.
type Hook struct {
	// Container that it runs in, or whose server it asks.
	Container string `json:"container"`
	// Exec or HTTPGet: one of them is set.
	Exec    *Exec    `json:"exec,omitempty"`
	HTTPGet *HTTPGet `json:"httpGet,omitempty"`
	// TimeoutSeconds is 1 to MaxTimeoutSeconds.
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
	// FailurePolicy is Fail or Ignore. A hook after a checkpoint has none: there is
	// nothing left to fail.
	FailurePolicy FailurePolicy `json:"failurePolicy,omitempty"`
}

// Exec is a command, without a shell. It succeeds when it ends with 0.
type Exec struct {
	Command []string `json:"command"`
}

// HTTPGet is a request to the Pod itself. It succeeds with 200 to 299.
type HTTPGet struct {
	Port int32 `json:"port"`
	// Path, with a query if need be; "/" by default.
	Path string `json:"path,omitempty"`
}

// String names the hook for people.
func (h Hook) String() string {
	if h.Exec != nil {
		return fmt.Sprintf("%q in container %s", shorten(strings.Join(h.Exec.Command, " ")), h.Container)
	}
	return fmt.Sprintf("GET %s of port %d of container %s", shorten(h.HTTPGet.Path), h.HTTPGet.Port, h.Container)
}

func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// Annotations are those that hold hooks.
var Annotations = []string{
	checkpointv1alpha1.AnnotationPreCheckpoint,
	checkpointv1alpha1.AnnotationPostCheckpoint,
	checkpointv1alpha1.AnnotationPostRestore,
}

// Of reads the hooks of one annotation, in the order in which they run; none if
// the annotation is not there.
func Of(annotations map[string]string, name string) ([]Hook, error) {
	value, there := annotations[name]
	if !there {
		return nil, nil
	}
	hooks, err := parse(value)
	if err == nil {
		err = complete(hooks, name)
	}
	if err != nil {
		return nil, fmt.Errorf("annotation %s: %w", name, err)
	}
	return hooks, nil
}

// Check says what is wrong with the hooks among a Pod's annotations. containers are
// those that hooks can run in: the Pod's, without init containers that end.
func Check(annotations map[string]string, containers []string) error {
	var errs []error
	for name := range annotations {
		// One that is nearly spelt right would be passed over for good.
		short, own := strings.CutPrefix(name, checkpointv1alpha1.GroupName+"/")
		if own && (strings.HasPrefix(short, "pre-") || strings.HasPrefix(short, "post-")) && !slices.Contains(Annotations, name) {
			errs = append(errs, fmt.Errorf("annotation %s is none that Stasis knows: hooks are %s", name, strings.Join(Annotations, ", ")))
		}
	}
	for _, name := range Annotations {
		hooks, err := Of(annotations, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for i, h := range hooks {
			if !slices.Contains(containers, h.Container) {
				errs = append(errs, fmt.Errorf("annotation %s: hook %d: the Pod has no container %q that a hook can run in; it has %s",
					name, i+1, h.Container, strings.Join(containers, ", ")))
			}
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// parse reads one hook, or a list of them, as JSON or YAML.
func parse(value string) ([]Hook, error) {
	if len(value) > MaxBytes {
		return nil, fmt.Errorf("it has %d bytes, %d are allowed", len(value), MaxBytes)
	}
	data, err := yaml.YAMLToJSONStrict([]byte(value))
	if err != nil {
		return nil, fmt.Errorf("neither JSON nor YAML: %w", err)
	}
	data = bytes.TrimSpace(data)
	var hooks []Hook
	var into any = &hooks
	if !bytes.HasPrefix(data, []byte("[")) {
		hooks = make([]Hook, 1)
		into = &hooks[0]
	}
	if bytes.Equal(data, []byte("null")) {
		return nil, errors.New("it is empty")
	}
	strict, err := strictjson.UnmarshalStrict(data, into)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, fmt.Errorf("not a hook: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return hooks, nil
}

// complete checks hooks and fills in what they leave out.
func complete(hooks []Hook, annotation string) error {
	if len(hooks) == 0 || len(hooks) > MaxHooks {
		return fmt.Errorf("it has %d hooks, 1 to %d are allowed", len(hooks), MaxHooks)
	}
	for i := range hooks {
		if err := hooks[i].complete(annotation); err != nil {
			return fmt.Errorf("hook %d: %w", i+1, err)
		}
	}
	return nil
}

func (h *Hook) complete(annotation string) error {
	if h.Container == "" {
		return errors.New("container is needed")
	}
	switch {
	case (h.Exec == nil) == (h.HTTPGet == nil):
		return errors.New("one of exec and httpGet is needed")
	case h.Exec != nil:
		if n := len(h.Exec.Command); n == 0 || n > maxCommand || h.Exec.Command[0] == "" {
			return fmt.Errorf("exec.command is needed: 1 to %d words, of which the first is a program", maxCommand)
		}
	default:
		if err := h.HTTPGet.complete(); err != nil {
			return err
		}
	}
	if h.TimeoutSeconds < 0 || h.TimeoutSeconds > MaxTimeoutSeconds {
		return fmt.Errorf("timeoutSeconds is %d, 1 to %d are allowed", h.TimeoutSeconds, MaxTimeoutSeconds)
	}
	if h.TimeoutSeconds == 0 {
		h.TimeoutSeconds = DefaultTimeoutSeconds
	}
	if annotation == checkpointv1alpha1.AnnotationPostCheckpoint {
		if h.FailurePolicy != "" {
			return errors.New("failurePolicy is not for this hook: when it runs there is nothing left that it could fail")
		}
		h.FailurePolicy = Ignore
		return nil
	}
	switch h.FailurePolicy {
	case "":
		h.FailurePolicy = Fail
	case Fail, Ignore:
	default:
		return fmt.Errorf("failurePolicy is %q: choose %s or %s", h.FailurePolicy, Fail, Ignore)
	}
	return nil
}

func (g *HTTPGet) complete() error {
	if g.Port < 1 || g.Port > 65535 {
		return fmt.Errorf("httpGet.port is %d, 1 to 65535 are allowed", g.Port)
	}
	if g.Path == "" {
		g.Path = "/"
	}
	at, err := url.Parse(g.Path)
	if err != nil || !strings.HasPrefix(g.Path, "/") || strings.HasPrefix(g.Path, "//") || at.Host != "" || at.Fragment != "" {
		return fmt.Errorf("httpGet.path %q is no path that begins with /", shorten(g.Path))
	}
	return nil
}
