package control

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// aggregated returns a client of the aggregated API; of admin where no user is named.
func aggregated(t *testing.T, user string) *rest.RESTClient {
	t.Helper()
	config := rest.CopyConfig(shared.admin)
	config.Impersonate.UserName = user
	config.APIPath, config.GroupVersion = "/apis", &subresources.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c, err := rest.RESTClientFor(config)
	must(t, err)
	return c
}

// ask posts to pods/checkpoint.
func ask(t *testing.T, user, namespace, pod string, spec subresources.PodCheckpointRequestSpec, params ...string) (*subresources.PodCheckpointRequest, error) {
	t.Helper()
	call := aggregated(t, user).Post().Namespace(namespace).Resource("pods").Name(pod).SubResource("checkpoint").
		Body(&subresources.PodCheckpointRequest{Spec: spec})
	for i := 0; i < len(params); i += 2 {
		call.Param(params[i], params[i+1])
	}
	answer := &subresources.PodCheckpointRequest{}
	return answer, call.Do(t.Context()).Into(answer)
}

// grant lets a user do one thing in a namespace.
func grant(t *testing.T, namespace, user, resource, verb string) {
	t.Helper()
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: "role-"},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{subresources.GroupName}, Resources: []string{resource}, Verbs: []string{verb}}}}
	must(t, shared.client.Create(t.Context(), role))
	bind(t, namespace, "Role", role.Name, rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user})
}

func TestAUserWhoMayOnlyCheckpointDoesSoInOneNamespace(t *testing.T) {
	ns, elsewhere := namespace(t), namespace(t)
	node, agent := node(t)
	pod := source(t, ns, node)
	source(t, elsewhere, node)
	grant(t, ns, "ann", subresources.ResourceCheckpoint, "create")

	// The agent is at work while ann waits.
	done := make(chan struct{})
	go func() {
		defer close(done)
		complete(t, agent, &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "mine"}}, pod)
	}()
	got, err := ask(t, "ann", ns, pod.Name, subresources.PodCheckpointRequestSpec{CheckpointName: "mine"})
	must(t, err)
	<-done
	if s := got.Status; s.CheckpointName != "mine" || s.NodeName != node || s.Ready == nil || s.Ready.Status != metav1.ConditionTrue ||
		s.Size == nil || s.FreezeDuration == nil || s.CheckpointLocation == nil {
		t.Errorf("answer: %+v", s)
	}
	var c checkpointv1alpha1.PodCheckpoint
	must(t, shared.client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "mine"}, &c))
	if by := c.Annotations[checkpointv1alpha1.AnnotationRequestedBy]; by != "ann" || c.UID != got.Status.CheckpointUID || c.Spec.NodeName != node {
		t.Errorf("PodCheckpoint requested by %q, UID %s, node %s", by, c.UID, c.Spec.NodeName)
	}

	if _, err := ask(t, "ann", elsewhere, pod.Name, subresources.PodCheckpointRequestSpec{}); !apierrors.IsForbidden(err) {
		t.Errorf("in another namespace: %v", err)
	}
	for _, what := range []string{"archive", "contents"} {
		if err := aggregated(t, "ann").Get().Namespace(ns).Resource("podcheckpoints").Name("mine").SubResource(what).Do(t.Context()).Error(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := as(t, "ann").Get(t.Context(), client.ObjectKeyFromObject(&c), &c); !apierrors.IsForbidden(err) {
		t.Errorf("PodCheckpoint: %v", err)
	}
	// The other door needs the same right.
	grant(t, elsewhere, "ann", "podcheckpointrequests", "create")
	must(t, eventually(t.Context(), func() error {
		err := as(t, "ann").Create(t.Context(), &subresources.PodCheckpointRequest{ObjectMeta: metav1.ObjectMeta{Namespace: elsewhere, Name: pod.Name}})
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "may not create pods/checkpoint of this Pod") {
			return fmt.Errorf("by the other door: %v", err)
		}
		return nil
	}))
	must(t, eventually(t.Context(), func() error { return audited(ns, "mine", "ann") }))
}

// audited finds the record of a checkpoint that was asked for.
func audited(namespace, name, user string) error {
	log, err := os.ReadFile(shared.audit)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, `"subresources.checkpoint.podstasis.dev/podcheckpoint":"`+namespace+"/"+name+`"`) && strings.Contains(line, `"username":"`+user+`"`) &&
			strings.Contains(line, `"verb":"create"`) && strings.Contains(line, `"checkpointName":"`+name+`"`) {
			return nil
		}
	}
	return fmt.Errorf("no record of %s/%s by %s in the audit log:\n%.4000s", namespace, name, user, log)
}

func TestExplainTellsWhatTheTypesSay(t *testing.T) {
	must(t, once())
	for field, want := range map[string]string{
		"podcheckpointrequest":                 "PodCheckpointRequest is what is posted to pods/checkpoint",
		"podcheckpointrequest.spec.containers": "forensics and cannot be restored as a Pod",
	} {
		// The API server gathers OpenAPI now and then.
		must(t, patiently(t.Context(), func() error {
			out, err := kubectl(t, "explain", "--api-version="+subresources.SchemeGroupVersion.String(), field).CombinedOutput()
			if err != nil || !strings.Contains(strings.Join(strings.Fields(string(out)), " "), want) {
				return fmt.Errorf("explain %s: %v\n%s", field, err, out)
			}
			return nil
		}))
	}
	// What other groups call so is found there first.
	for name, want := range map[string]string{"pods": "KIND:       Pod\nVERSION:    v1\n", "podcheckpoints": "GROUP:      checkpoint.podstasis.dev\n"} {
		must(t, patiently(t.Context(), func() error {
			out, err := kubectl(t, "explain", name).CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), want) {
				return fmt.Errorf("explain %s: %v\n%.500s", name, err, out)
			}
			return nil
		}))
	}
}

// kubectl as admin.
func kubectl(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return exec.CommandContext(t.Context(), shared.kubectl, append([]string{"--server", shared.admin.Host, "--token", shared.admin.BearerToken,
		"--certificate-authority", shared.admin.CAFile, "--cache-dir", filepath.Join(t.TempDir(), "cache")}, args...)...)
}
