package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/agentapi/agentapitest"
	"podstasis.dev/stasis/internal/apiserver/registration"
)

// serve has a fake agent answer for a node, with what it hands to handler once the
// caller's token is good.
func serve(t *testing.T, node string, handler http.HandlerFunc) *agentapitest.Agent {
	t.Helper()
	a := agentapitest.Start(t, node, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := reviewed(r, agentapi.Audience(node)); err != nil {
			t.Error(err)
		}
		if err := reviewed(r, agentapi.Audience("another")); err == nil {
			t.Error("the token is good at another node")
		}
		handler(w, r)
	}))
	announce(t, agentOf(t, node), a.Announcement())
	return a
}

// reviewed asks the API server about a caller's token, as agents do.
func reviewed(r *http.Request, audience string) error {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	if err := shared.client.Create(r.Context(), review); err != nil {
		return err
	}
	if s := review.Status; !s.Authenticated || s.User.Username != "system:serviceaccount:stasis-system:stasis-controller" {
		return fmt.Errorf("a call that is not of stasis-controller: %+v", s)
	}
	return nil
}

// completed makes a checkpoint that is Ready on a node.
func completed(t *testing.T, ns, name, node string, agent client.Client) *checkpointv1alpha1.PodCheckpoint {
	t.Helper()
	pod := source(t, ns, node)
	c := checkpoint(t, ns, name, pod.Name)
	complete(t, agent, c, pod)
	return c
}

// fetch asks for podcheckpoints/archive or contents, with the header given.
func fetch(t *testing.T, user, method, ns, name, what string, header http.Header) (*http.Response, []byte) {
	t.Helper()
	config := rest.CopyConfig(shared.admin)
	config.Impersonate.UserName = user
	c, err := rest.HTTPClientFor(config)
	must(t, err)
	url := shared.admin.Host + "/apis/" + subresources.SchemeGroupVersion.String() + "/namespaces/" + ns + "/podcheckpoints/" + name + "/" + what
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	must(t, err)
	for k, v := range header {
		r.Header[k] = v
	}
	answer, err := c.Do(r)
	must(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(t, err)
	return answer, body
}

func TestAnArchiveComesOutByRangesForWhoeverMayHaveIt(t *testing.T) {
	ns := namespace(t)
	node, agent := node(t)
	content := make([]byte, 3<<20)
	rand.Read(content)
	sum := sha256.Sum256(content)
	digest := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
	c := completed(t, ns, "c", node, agent)
	serve(t, node, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/checkpoints/"+string(c.UID)+"/archive" || r.URL.Query().Get("container") != "a" {
			t.Errorf("the agent is asked for %s", r.URL)
		}
		w.Header().Set("ETag", `"e"`)
		w.Header().Set("Set-Cookie", "a=b")
		w.Header().Set("Content-Type", "application/x-tar")
		if r.Header.Get("Want-Repr-Digest") != "" {
			w.Header().Set("Repr-Digest", digest)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	})
	grant(t, ns, "fox", subresources.ResourceArchive, "get")

	answer, got := fetch(t, "fox", "GET", ns, "c", "archive?container=a", http.Header{"Range": {"bytes=5-1048580"}, "If-Range": {`"e"`}})
	if answer.StatusCode != http.StatusPartialContent || !bytes.Equal(got, content[5:1048581]) || answer.Header.Get("Content-Range") != fmt.Sprintf("bytes 5-1048580/%d", len(content)) {
		t.Errorf("a range: %s, %d bytes, %v", answer.Status, len(got), answer.Header)
	}
	if answer.Header.Get("Etag") != `"e"` || answer.Header.Get("Set-Cookie") != "" {
		t.Errorf("header: %v", answer.Header)
	}
	// Another archive than the one that was begun comes from its start.
	if answer, got := fetch(t, "fox", "GET", ns, "c", "archive?container=a", http.Header{"Range": {"bytes=5-"}, "If-Range": {`"old"`}}); answer.StatusCode != http.StatusOK || !bytes.Equal(got, content) {
		t.Errorf("of another: %s, %d bytes", answer.Status, len(got))
	}
	answer, _ = fetch(t, "fox", "HEAD", ns, "c", "archive?container=a", http.Header{"Want-Repr-Digest": {"sha-256=1"}})
	if answer.StatusCode != http.StatusOK || answer.ContentLength != int64(len(content)) || answer.Header.Get("Repr-Digest") != digest {
		t.Errorf("HEAD: %s, %d, %v", answer.Status, answer.ContentLength, answer.Header)
	}
	for user, what := range map[string]string{"fox": "contents", "ann": "archive?container=a"} {
		if answer, body := fetch(t, user, "GET", ns, "c", what, nil); answer.StatusCode != http.StatusForbidden {
			t.Errorf("%s reads %s: %s %.200s", user, what, answer.Status, body)
		}
	}
}

func TestContentsAreOfTheCheckpointThatIsAskedFor(t *testing.T) {
	ns := namespace(t)
	node, agent := node(t)
	c := completed(t, ns, "c", node, agent)
	serve(t, node, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"metadata":{"name":"forged","namespace":"kube-system"},"engine":{"name":"criu","version":"4.2"},"containers":[{"name":"a","imageBytes":7}]}`)
	})
	grant(t, ns, "vera", subresources.ResourceContents, "get")
	got := &subresources.CheckpointContents{}
	must(t, aggregated(t, "vera").Get().Namespace(ns).Resource("podcheckpoints").Name("c").SubResource("contents").Do(t.Context()).Into(got))
	if got.Name != "c" || got.Namespace != ns || got.UID != c.UID || got.Engine.Name != "criu" || len(got.Containers) != 1 || got.Containers[0].ImageBytes != 7 {
		t.Errorf("%+v", got)
	}
}

func TestWhyThereIsNoArchiveIsSaidAndNobodyWaitsForIt(t *testing.T) {
	ns := namespace(t)
	node, agent := node(t)
	completed(t, ns, "c", node, agent)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing: a partition
	must(t, err)
	defer silent.Close()
	alive := agentapi.Announcement{Node: node, Address: silent.Addr().String(), Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Program: "v0", Renewed: unattended()}
	say := func(change func(*agentapi.Announcement)) func() {
		return func() {
			said := alive
			change(&said)
			announce(t, agentOf(t, node), said)
		}
	}
	for _, tc := range []struct {
		name    string
		before  func()
		code    int
		message string
	}{
		{"an agent that is cut off", say(func(*agentapi.Announcement) {}), 503, "does not answer at " + silent.Addr().String()},
		{"an agent that nobody finds", say(func(a *agentapi.Announcement) { a.Address = "127.0.0.1:1" }), 503, "connection refused"},
		{"an old agent", say(func(a *agentapi.Announcement) { a.Protocol = 0 }), 503, "is too old for this"},
		{"no agent", func() {
			must(t, shared.client.Delete(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: agentapi.LeaseName(node)}}))
		}, 503, "no stasis-agent runs on node"},
		{"no node", func() {
			must(t, shared.client.Delete(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}))
		}, 410, "no longer exists"},
	} {
		tc.before()
		for _, what := range []string{"archive", "contents"} {
			began := time.Now()
			answer, body := fetch(t, "", "GET", ns, "c", what, nil)
			// agentapi's own limit is shorter by far; whoever waited for the agent would wait on.
			if took := time.Since(began); took > 30*time.Second {
				t.Errorf("%s, %s: said after %s", tc.name, what, took)
			}
			if answer.StatusCode != tc.code || !strings.Contains(string(body), tc.message) || !strings.Contains(string(body), `"kind":"Status"`) {
				t.Errorf("%s, %s: %s %s", tc.name, what, answer.Status, body)
			}
		}
	}
	if answer, body := fetch(t, "", "GET", ns, "nothing", "archive", nil); answer.StatusCode != 404 {
		t.Errorf("no such checkpoint: %s %s", answer.Status, body)
	}
}

func TestACheckpointIsRefusedAtOnceWhereNoAgentLives(t *testing.T) {
	ns := namespace(t)
	node, _ := node(t)
	pod := source(t, ns, node)
	must(t, shared.client.Delete(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: agentapi.LeaseName(node)}}))
	const why = "no stasis-agent runs on node"
	if _, err := ask(t, "", ns, pod.Name, subresources.PodCheckpointRequestSpec{}); !apierrors.IsServiceUnavailable(err) || !strings.Contains(err.Error(), why) {
		t.Errorf("by a call: %v", err)
	}
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c"}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}
	if err := shared.client.Create(t.Context(), c); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("by an object: %v", err)
	}
	// An agent that restarts is missed by nobody.
	announce(t, agentOf(t, node), agentapi.Announcement{Node: node, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Renewed: time.Now().Add(-45 * time.Second)})
	must(t, shared.client.Create(t.Context(), c))
	var all checkpointv1alpha1.PodCheckpointList
	must(t, shared.client.List(t.Context(), &all, client.InNamespace(ns)))
	if len(all.Items) != 1 {
		t.Errorf("%d PodCheckpoints, want 1", len(all.Items))
	}
}

func TestARequestIsAnsweredWithWhatThereIsAndFoundAgainByItsName(t *testing.T) {
	ns := namespace(t)
	node, agent := node(t)
	pod := source(t, ns, node)
	now := int32(0)
	spec := subresources.PodCheckpointRequestSpec{CheckpointName: "c", Containers: []string{"a", "b"}, WaitSeconds: &now}

	dry, err := ask(t, "", ns, pod.Name, spec, "dryRun", "All")
	must(t, err)
	if err := shared.client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "c"}, &checkpointv1alpha1.PodCheckpoint{}); !apierrors.IsNotFound(err) || dry.Status.NodeName != node {
		t.Errorf("a dry run: %v, %+v", err, dry.Status)
	}
	first, err := ask(t, "", ns, pod.Name, spec)
	must(t, err)
	if first.Status.Ready != nil && first.Status.Ready.Status == metav1.ConditionTrue || first.Status.NodeName != node {
		t.Errorf("%+v", first.Status)
	}
	// The client goes away; the checkpoint goes on.
	gone, leave := context.WithTimeout(t.Context(), time.Second)
	defer leave()
	spec.WaitSeconds = nil
	err = aggregated(t, "").Post().Namespace(ns).Resource("pods").Name(pod.Name).SubResource("checkpoint").
		Body(&subresources.PodCheckpointRequest{Spec: spec}).Do(gone).Error()
	if err == nil {
		t.Error("a call that nobody answered came to an end")
	}
	complete(t, agent, &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c"}}, pod)
	spec.Containers = []string{"b", "a"}
	again, err := ask(t, "", ns, pod.Name, spec)
	must(t, err)
	if again.Status.CheckpointUID != first.Status.CheckpointUID || again.Status.Ready == nil || again.Status.Ready.Status != metav1.ConditionTrue {
		t.Errorf("asked again: %+v", again.Status)
	}
	spec.Containers = nil
	if _, err := ask(t, "", ns, pod.Name, spec); !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "choose another checkpointName") {
		t.Errorf("another of the same name: %v", err)
	}
	if _, err := ask(t, "", ns, "nobody", subresources.PodCheckpointRequestSpec{}); !apierrors.IsNotFound(err) {
		t.Errorf("no Pod: %v", err)
	}
	tooLong := int32(51)
	if _, err := ask(t, "", ns, pod.Name, subresources.PodCheckpointRequestSpec{WaitSeconds: &tooLong}); !apierrors.IsInvalid(err) {
		t.Errorf("too long: %v", err)
	}
	unnamed, err := ask(t, "", ns, pod.Name, subresources.PodCheckpointRequestSpec{WaitSeconds: &now})
	must(t, err)
	if !strings.HasPrefix(unnamed.Status.CheckpointName, pod.Name+"-") {
		t.Errorf("without a name: %+v", unnamed.Status)
	}
}

func TestImportsTakeARightAndGoToAnAgent(t *testing.T) {
	ns := namespace(t)
	node, _ := node(t)
	part := []byte("the archive")
	serve(t, node, func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		if err != nil || !bytes.Equal(got, part) || !strings.HasPrefix(r.URL.Path, "/v1/imports/") || r.Header.Get("Content-Range") != "bytes 0-10/2048" {
			t.Errorf("%s %s: %q, %v, %v", r.Method, r.URL, got, r.Header, err)
		}
		w.Header().Set(agentapi.HeaderUploadOffset, "11")
		w.WriteHeader(http.StatusAccepted)
	})
	brought := func(name, to string) *checkpointv1alpha1.PodCheckpoint {
		return &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: checkpointv1alpha1.PodCheckpointSpec{
			SourcePodName: "elsewhere", NodeName: to, Import: &checkpointv1alpha1.CheckpointImport{Digest: "sha256:" + strings.Repeat("0", 64), SizeBytes: 2048}}}
	}
	if err := user(t, ns, "ed", "stasis-editor").Create(t.Context(), brought("c", node)); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "verb import") {
		t.Errorf("an editor imports: %v", err)
	}
	ida := user(t, ns, "ida", "stasis-importer")
	c := brought("c", node)
	must(t, ida.Create(t.Context(), c))
	if c.Spec.NodeName != node {
		t.Errorf("it goes to %q", c.Spec.NodeName)
	}
	anywhere := brought("anywhere", "")
	must(t, ida.Create(t.Context(), anywhere))
	if anywhere.Spec.NodeName == "" {
		t.Error("no node was chosen")
	}
	if err := ida.Create(t.Context(), brought("d", "nowhere")); err == nil || !strings.Contains(err.Error(), `node "nowhere" no longer exists`) {
		t.Errorf("to a node that is not: %v", err)
	}

	put := func(user, name string) (string, error) {
		result := aggregated(t, user).Put().Namespace(ns).Resource("podcheckpoints").Name(name).SubResource("archive").
			SetHeader("Content-Range", "bytes 0-10/2048").SetHeader("Content-Type", "application/x-tar").Body(part).Do(t.Context())
		return "", result.Error()
	}
	if _, err := put("ida", "c"); err != nil {
		t.Errorf("a part: %v", err)
	}
	if _, err := put("ed", "c"); !apierrors.IsForbidden(err) {
		t.Errorf("a part of another's: %v", err)
	}
	completed(t, ns, "taken", node, agentOf(t, node))
	if _, err := put("ida", "taken"); !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "only one that has spec.import") {
		t.Errorf("over one that was taken: %v", err)
	}
}

func TestAnAgentWritesTheLeaseOfItsNodeAndNobodyElseDoes(t *testing.T) {
	must(t, once())
	a, agentA := node(t)
	b, _ := node(t)
	lease := func(name string) *coordinationv1.Lease {
		var l coordinationv1.Lease
		must(t, client.IgnoreNotFound(shared.client.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: name}, &l)))
		l.Namespace, l.Name = systemNamespace, name
		l.Annotations = map[string]string{agentapi.AnnotationAddress: "127.0.0.1:2"}
		return &l
	}
	must(t, agentA.Update(t.Context(), lease(agentapi.LeaseName(a))))
	for name, err := range map[string]error{
		"an agent writes another's":                 agentA.Update(t.Context(), lease(agentapi.LeaseName(b))),
		"an agent writes that of no node":           agentA.Create(t.Context(), lease("agent-nowhere")),
		"an agent writes the controller's":          agentA.Update(t.Context(), lease("stasis-controller")),
		"a cluster administrator writes an agent's": shared.client.Update(t.Context(), lease(agentapi.LeaseName(b))),
	} {
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Leases of others are none of the policy's business.
	must(t, shared.client.Create(t.Context(), lease("something-else")))
}

func TestForWhomACheckpointWasTakenNobodyCanForge(t *testing.T) {
	ns := namespace(t)
	node, _ := node(t)
	pod := source(t, ns, node)
	forged := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "c",
		Annotations: map[string]string{checkpointv1alpha1.AnnotationRequestedBy: "ann"}}, Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}
	if err := user(t, ns, "eve", "stasis-editor").Create(t.Context(), forged.DeepCopy()); !apierrors.IsForbidden(err) {
		t.Errorf("forged: %v", err)
	}
	now := int32(0)
	_, err := ask(t, "", ns, pod.Name, subresources.PodCheckpointRequestSpec{CheckpointName: "c", WaitSeconds: &now})
	must(t, err)
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(forged), forged))
	forged.Annotations[checkpointv1alpha1.AnnotationRequestedBy] = "ann"
	if err := as(t, "eve").Update(t.Context(), forged); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "requested-by") {
		t.Errorf("changed: %v", err)
	}
}

// The last of this file: it makes another entry of the one that the tests use.
func TestTheAPIServiceIsMadeAgainAndTakenAwayOnlyWhenNobodyServesIt(t *testing.T) {
	must(t, once())
	_, agent := node(t)
	entry := func() *unstructured.Unstructured {
		e := &unstructured.Unstructured{}
		e.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService"})
		e.SetName(registration.Name)
		return e
	}
	available := func(want string) error {
		e := entry()
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(e), e); err != nil {
			return err
		}
		conditions, _, _ := unstructured.NestedSlice(e.Object, "status", "conditions")
		for _, c := range conditions {
			if c.(map[string]any)["type"] == "Available" && c.(map[string]any)["status"] == want {
				return nil
			}
		}
		return fmt.Errorf("conditions of the APIService: %v", conditions)
	}
	must(t, eventually(t.Context(), func() error { return available("True") }))
	if err := agent.Delete(t.Context(), entry()); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "only while nobody serves it") {
		t.Errorf("an agent deletes it while it is served: %v", err)
	}
	redirected := entry()
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(redirected), redirected))
	must(t, unstructured.SetNestedField(redirected.Object, int64(1), "spec", "service", "port"))
	must(t, shared.client.Update(t.Context(), redirected))
	must(t, patiently(t.Context(), func() error { return available("False") }))
	must(t, agent.Delete(t.Context(), entry()))

	// stasis-controller makes it again, as it is installed.
	must(t, patiently(t.Context(), func() error {
		e := entry()
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(e), e); err != nil {
			return err
		}
		if bundle, _, _ := unstructured.NestedString(e.Object, "spec", "caBundle"); bundle == "" {
			return errors.New("it trusts nobody")
		}
		must(t, unstructured.SetNestedField(e.Object, int64(shared.aggregated), "spec", "service", "port"))
		return shared.client.Update(t.Context(), e)
	}))
	must(t, eventually(t.Context(), func() error { return available("True") }))
	// Requests are passed on by what the API server knows of the entry a moment later.
	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	must(t, eventually(t.Context(), func() error {
		_, err := set.Discovery().ServerResourcesForGroupVersion(subresources.SchemeGroupVersion.String())
		return err
	}))
}
