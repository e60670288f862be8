package control

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// posted posts an object of a kind to a subresource as a user, and decodes the answer if
// it is one. Else it returns what was said.
func posted(t *testing.T, as *rest.Config, path, kind string, into any) (int, string) {
	t.Helper()
	set, err := kubernetes.NewForConfig(as)
	must(t, err)
	path, query, _ := strings.Cut(path, "?")
	request := set.Discovery().RESTClient().Post().AbsPath("/apis/subresources.checkpoint.podstasis.dev/v1alpha1/"+path).SetHeader("Content-Type", "application/json").
		Body([]byte(`{"apiVersion":"subresources.checkpoint.podstasis.dev/v1alpha1","kind":"` + kind + `"}`))
	if name, value, found := strings.Cut(query, "="); found {
		request = request.Param(name, value)
	}
	var code int
	answer, err := request.Do(t.Context()).StatusCode(&code).Raw()
	if err != nil {
		return code, string(answer) + err.Error()
	}
	must(t, json.Unmarshal(answer, into))
	return code, ""
}

func TestStoresAreVerifiedAndCollectedByCallsForThoseWhoMay(t *testing.T) {
	ns := namespace(t)
	on, agent := node(t)
	pod := source(t, ns, on)
	s := checkpointStore(t, nil)
	c := toStore(t, ns, "c", pod.Name, s.Name)
	completeInStore(t, agent, c, pod)
	local := checkpoint(t, ns, "local", pod.Name)
	complete(t, agent, local, pod)

	impersonate := func(name string) *rest.Config {
		config := rest.CopyConfig(shared.admin)
		config.Impersonate = rest.ImpersonationConfig{UserName: name}
		return config
	}
	user(t, ns, "verifies-editor", "stasis-editor")
	user(t, ns, "verifies-viewer", "stasis-viewer")
	bind(t, "", "ClusterRole", "stasis-store-admin", rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "verifies-admin"})
	editor, viewer, admin := impersonate("verifies-editor"), impersonate("verifies-viewer"), impersonate("verifies-admin")
	ofCheckpoint, ofStore, collect := "namespaces/"+ns+"/podcheckpoints/c/verify", "checkpointstores/"+s.Name+"/verify", "checkpointstores/"+s.Name+"/collect"

	var v subresources.StoreVerification
	if code, said := posted(t, admin, ofStore, "StoreVerification", &v); code != http.StatusCreated {
		t.Fatalf("%d: %s", code, said)
	}
	if v.Status.CompletionTime == nil || v.Status.Checkpoints != 1 || v.Status.VerifiedBytes == 0 || v.Status.ProblemCount != 0 || v.Status.StoreID != s.Status.StoreID {
		t.Errorf("verified: %+v", v.Status)
	}
	v = subresources.StoreVerification{}
	if code, said := posted(t, editor, ofCheckpoint, "StoreVerification", &v); code != http.StatusCreated || v.Status.Checkpoints != 1 || v.Status.StoreName != s.Name {
		t.Errorf("%d: %s %+v", code, said, v.Status)
	}
	for _, refused := range []struct {
		as   *rest.Config
		path string
		kind string
		code int
	}{
		{viewer, ofCheckpoint, "StoreVerification", http.StatusForbidden},
		{editor, ofStore, "StoreVerification", http.StatusForbidden},
		{editor, collect, "StoreCollection", http.StatusForbidden},
		{admin, ofCheckpoint, "StoreVerification", http.StatusForbidden},
		{admin, "checkpointstores/none/verify", "StoreVerification", http.StatusNotFound},
		{admin, ofStore + "?dryRun=All", "StoreVerification", http.StatusBadRequest},
		{editor, "namespaces/" + ns + "/podcheckpoints/local/verify", "StoreVerification", http.StatusConflict},
	} {
		if code, said := posted(t, refused.as, refused.path, refused.kind, &v); code != refused.code {
			t.Errorf("%s: %d, want %d: %s", refused.path, code, refused.code, said)
		}
	}

	var found subresources.StoreCollection
	if code, said := posted(t, admin, collect+"?dryRun=All", "StoreCollection", &found); code != http.StatusCreated || !found.Status.DryRun || found.Status.Checkpoints != 1 || found.Status.Bytes == 0 {
		t.Errorf("%d: %s %+v", code, said, found.Status)
	}
	found = subresources.StoreCollection{}
	if code, said := posted(t, admin, collect, "StoreCollection", &found); code != http.StatusCreated || found.Status.DryRun || found.Status.RemovedBytes != 0 {
		t.Errorf("%d: %s %+v", code, said, found.Status)
	}

	packs, err := filepath.Glob(filepath.Join(s.Spec.Directory.Path, "packs", "*"))
	must(t, err)
	for _, pack := range packs {
		must(t, os.Truncate(pack, 10))
	}
	v = subresources.StoreVerification{}
	if code, said := posted(t, editor, ofCheckpoint, "StoreVerification", &v); code != http.StatusCreated || v.Status.ProblemCount == 0 || v.Status.Problems[0].PodCheckpoint != ns+"/c" || !strings.Contains(v.Status.Problems[0].Message, "packs/") {
		t.Errorf("%d: %s %+v", code, said, v.Status)
	}
	barred(t, s)
	if code, said := posted(t, admin, collect, "StoreCollection", &found); code != http.StatusServiceUnavailable || !strings.Contains(said, checkpointv1alpha1.ReasonStoreUnreachable) {
		t.Errorf("%d: %s", code, said)
	}
}
