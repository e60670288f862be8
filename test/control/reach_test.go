package control

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// reach says which requests, by every verb on every resource and subresource that
// Stasis is about, get past roles and policies. Rights tells what roles grant; this
// is what comes of it, for the agents of two nodes apart. The objects are of node
// A: a Pod that runs there, and a PodCheckpoint of it that is in progress. What is
// written is what each would have to write: finalizers, a condition.
//
// A letter is a request that was made, as a dry run, and served; a dot is one that
// was refused, or that the API does not have. The users may besides do anything
// with Pods (but for what only a kubelet can answer), as in requests. The verb
// restore is no request: see there.
const reach = `
resource                     viewer   editor   restorer admin    agent-A  agent-B  agent-unbound controller anonymous cluster-admin

podcheckpoints               glw..... glwcupdD glw..... glwcupdD glw.up.. glw..... glw.....      glwc.p..   ........  glwcupdD
podcheckpoints @*            ........ ........ ........ ........ .lw..... .lw..... .lw.....      .lw.....   ........  .lw.....
podcheckpoints/status        g....... g....... ........ g....... ....up.. ........ ........      ....up..   ........  g.......
podcheckpoints/finalizers    ........ ........ ........ ........ ........ ........ ........      ........   ........  ........
podcheckpoints/scale         ........ ........ ........ ........ ........ ........ ........      ........   ........  ........
podcheckpoints/archive       ........ ........ ........ ........ ........ ........ ........      ........   ........  ........
pods                         glwcupdD glwcupdD glwcupdD glwcupdD g....... g....... g.......      glw.....   ........  glwcupdD
pods @*                      ........ ........ ........ ........ ........ ........ ........      .lw.....   ........  .lw.....
pods/status                  g...up.. g...up.. g...up.. g...up.. ....up.. ........ ........      ........   ........  g...up..
pods/binding                 ...c.... ...c.... ...c.... ...c.... ........ ........ ........      ........   ........  ...c....
pods/ephemeralcontainers     g...up.. g...up.. g...up.. g...up.. ........ ........ ........      ........   ........  g...up..
pods/resize                  g...up.. g...up.. g...up.. g...up.. ........ ........ ........      ........   ........  g...up..
pods/eviction                ........ ........ ........ ........ ........ ........ ........      ........   ........  ...c....
pods/log                     ........ ........ ........ ........ ........ ........ ........      ........   ........  ?.......
pods/exec                    ........ ........ ........ ........ ........ ........ ........      ........   ........  ?..?....
pods/attach                  ........ ........ ........ ........ ........ ........ ........      ........   ........  ?..?....
pods/portforward             ........ ........ ........ ........ ........ ........ ........      ........   ........  ?..?....
pods/proxy                   ........ ........ ........ ........ ........ ........ ........      ........   ........  ?..????.
`

// target is an object that requests are about.
type target struct {
	resource, sub string
	everywhere    bool // all namespaces
	object        client.Object
}

func TestEveryRequestOfEverySubjectComesAsFarAsTheTableOfReachSays(t *testing.T) {
	ns := namespace(t)
	subjects, on := reaching(t, ns)
	pod := source(t, ns, on)
	held := checkpoint(t, ns, "held", pod.Name)
	for _, change := range []string{"", "/status"} {
		code, answer := send(t, subjects["agent-A"], http.MethodPatch, "/apis/checkpoint.podstasis.dev/v1alpha1/namespaces/"+ns+"/podcheckpoints/held"+change,
			`{"metadata":{"finalizers":["`+checkpointv1alpha1.FinalizerData+`"]},"status":{"conditions":[`+inProgress+`]}}`)
		if code != http.StatusOK {
			t.Fatalf("%d: %s", code, answer)
		}
	}
	objects := map[string]client.Object{"pods": pod, "podcheckpoints": held}

	lines := strings.Split(strings.TrimSpace(reach), "\n")
	for i, column := range strings.Fields(lines[0])[1:] {
		t.Run(column, func(t *testing.T) {
			t.Parallel()
			for _, line := range lines[2:] {
				what, cells := readTarget(t, line, objects)
				if got, answers := what.reachedBy(t, subjects[column]); got != cells[i] {
					t.Errorf("%s: %s, the table says %s\n%s", strings.Fields(line)[0], got, cells[i], answers)
				}
			}
		})
	}
}

// readTarget reads a line of reach.
func readTarget(t *testing.T, line string, objects map[string]client.Object) (what target, cells []string) {
	t.Helper()
	fields := strings.Fields(line)
	what.resource, what.sub, _ = strings.Cut(fields[0], "/")
	cells = fields[1:]
	if what.everywhere = cells[0] == "@*"; what.everywhere {
		cells = cells[1:]
	}
	if what.object = objects[what.resource]; what.object == nil || len(cells) != 10 {
		t.Fatalf("the line is not understood: %s", line)
	}
	return what, cells
}

// reaching makes the table's subjects, and returns node A.
func reaching(t *testing.T, ns string) (subjects map[string]*rest.Config, on string) {
	t.Helper()
	on, a := nodeAndToken(t)
	_, b := nodeAndToken(t)
	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	unbound := func(name string) string {
		token, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), name, tokenRequest(), metav1.CreateOptions{})
		must(t, err)
		return token.Status.Token
	}
	subjects = map[string]*rest.Config{"cluster-admin": shared.admin, "anonymous": rest.AnonymousClientConfig(shared.admin)}
	for name, token := range map[string]string{"agent-A": a, "agent-B": b, "agent-unbound": unbound("stasis-agent"), "controller": unbound("stasis-controller")} {
		subjects[name] = rest.CopyConfig(shared.admin)
		subjects[name].BearerToken = token
	}
	for _, role := range []string{"viewer", "editor", "restorer", "admin"} {
		user(t, ns, "reaching-"+role, "stasis-"+role)
		subjects[role] = rest.CopyConfig(shared.admin)
		subjects[role].Impersonate = rest.ImpersonationConfig{UserName: "reaching-" + role}
	}
	return subjects, on
}

const inProgress = `{"type":"Ready","status":"False","reason":"CheckpointInProgress","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}`

// patches is what subjects write of a resource.
var patches = map[string]string{
	"podcheckpoints":           `{"metadata":{"finalizers":null}}`,
	"podcheckpoints/status":    `{"status":{"conditions":[` + strings.Replace(inProgress, `"message":""`, `"message":"half"`, 1) + `]}}`,
	"pods":                     `{"metadata":{"labels":{"a":"b"}}}`,
	"pods/status":              `{"status":{"message":"half"}}`,
	"pods/ephemeralcontainers": `{"spec":{"ephemeralContainers":null}}`,
	"pods/resize":              `{}`,
}

// requestsOf are a verb's method and query, by letter.
var requestsOf = []struct {
	letter        byte
	method, query string
	ofAll         bool
}{
	{'g', http.MethodGet, "", false}, {'l', http.MethodGet, "?limit=1", true}, {'w', http.MethodGet, "?watch=true", true},
	{'c', http.MethodPost, "?dryRun=All", true}, {'u', http.MethodPut, "?dryRun=All", false}, {'p', http.MethodPatch, "?dryRun=All", false},
	{'d', http.MethodDelete, "?dryRun=All", false}, {'D', http.MethodDelete, "?dryRun=All", true},
}

// reachedBy makes every request about a target and writes a cell of them; a
// request that the API server passed on to nobody is a question mark.
func (what target) reachedBy(t *testing.T, subject *rest.Config) (cell, answers string) {
	t.Helper()
	for _, r := range requestsOf {
		path, possible := what.path(r.letter, r.ofAll)
		if !possible {
			cell += "."
			continue
		}
		code, answer := send(t, subject, r.method, path+r.query, what.body(t, r.letter))
		switch {
		case code < 300, code == http.StatusConflict: // a Pod that is bound already
			cell += string(r.letter)
		case code == http.StatusForbidden, code == http.StatusUnauthorized, code == http.StatusMethodNotAllowed, code == http.StatusNotFound:
			cell += "."
		default:
			cell += "?"
			answers += fmt.Sprintf("%s %s: %d: %s\n", r.method, path, code, answer)
		}
	}
	return cell, answers
}

// path is where a request goes, if there is such a one: subresources are not
// listed, and of all namespaces there are lists alone.
func (what target) path(letter byte, ofAll bool) (path string, possible bool) {
	path = map[string]string{"pods": "/api/v1", "podcheckpoints": "/apis/checkpoint.podstasis.dev/v1alpha1"}[what.resource]
	switch {
	case what.everywhere:
		return path + "/" + what.resource, letter == 'l' || letter == 'w'
	case what.sub != "":
		ofAll, possible = false, !ofAll || letter == 'c'
	default:
		possible = true
	}
	path += "/namespaces/" + what.object.GetNamespace() + "/" + what.resource
	if !ofAll {
		path += "/" + what.object.GetName()
	}
	if what.sub != "" {
		path += "/" + what.sub
	}
	return path, possible
}

// body is what is sent: the patch, the object as it is, or something new.
func (what target) body(t *testing.T, letter byte) string {
	t.Helper()
	of := what.resource
	if what.sub != "" {
		of += "/" + what.sub
	}
	switch letter {
	case 'p':
		return patches[of]
	case 'u':
		current := &unstructured.Unstructured{}
		gvk, err := shared.client.GroupVersionKindFor(what.object)
		must(t, err)
		current.SetGroupVersionKind(gvk)
		must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(what.object), current))
		content, err := current.MarshalJSON()
		must(t, err)
		return string(content)
	case 'c':
		switch of {
		case "pods/binding":
			return `{"apiVersion":"v1","kind":"Binding","metadata":{"name":"` + what.object.GetName() + `"},"target":{"kind":"Node","name":"` + what.object.(*corev1.Pod).Spec.NodeName + `"}}`
		case "pods/eviction":
			return `{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"` + what.object.GetName() + `"}}`
		case "pods":
			return `{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"new-"},"spec":{"containers":[{"name":"c","image":"i"}]}}`
		case "podcheckpoints":
			return `{"apiVersion":"checkpoint.podstasis.dev/v1alpha1","kind":"PodCheckpoint","metadata":{"generateName":"new-"},"spec":{"sourcePodName":"counter"}}`
		}
	}
	return ""
}

// send makes a request and returns how it was answered; a watch is not followed.
func send(t *testing.T, as *rest.Config, method, path, body string) (code int, answer string) {
	t.Helper()
	transport, err := rest.HTTPClientFor(as)
	must(t, err)
	request, err := http.NewRequestWithContext(t.Context(), method, as.Host+path, strings.NewReader(body))
	must(t, err)
	request.Header.Set("Content-Type", map[bool]string{true: "application/merge-patch+json", false: "application/json"}[method == http.MethodPatch])
	response, err := transport.Do(request)
	must(t, err)
	defer response.Body.Close()
	if response.StatusCode < 300 {
		return response.StatusCode, ""
	}
	content, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	must(t, err)
	return response.StatusCode, string(content)
}
