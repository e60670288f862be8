package kubectl

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// apiServer is as much of a Kubernetes API server, with Stasis in it, as the
// commands speak with. It has no watches: the commands then poll.
type apiServer struct {
	*httptest.Server
	t *testing.T

	mu      sync.Mutex
	objects map[objectKey]*unstructured.Unstructured
	serial  int
	// forbidden are "verb resource" pairs.
	forbidden map[string]bool
	// calls are the requests that were made, "METHOD path".
	calls []string
	// served says whether the aggregated API is there.
	served bool
	// agent is what becomes of checkpoints: "ready", "failed", "busy".
	agent    string
	archives map[string]*servedArchive // by checkpoint, or checkpoint/container
	uploads  map[string]*upload
	faults   faults
	contents map[string][]byte
	// preflights are what a dry run is told of a Pod.
	preflights map[string]*subresourcesv1alpha1.CheckpointPreflight
	// going are the verifications and collections that were asked for, by their path.
	going map[string]int
}

type objectKey struct{ resource, namespace, name string }

// kinds of the resources that are served.
func kindOf(resource string) schema.GroupVersionKind {
	return map[string]schema.GroupVersionKind{
		"pods":             {Version: "v1", Kind: "Pod"},
		"events":           {Version: "v1", Kind: "Event"},
		"nodes":            {Version: "v1", Kind: "Node"},
		"leases":           {Group: "coordination.k8s.io", Version: "v1", Kind: "Lease"},
		"podcheckpoints":   checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"),
		"checkpointstores": checkpointv1alpha1.GroupVersion.WithKind("CheckpointStore"),
	}[resource]
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{t: t, objects: map[objectKey]*unstructured.Unstructured{}, forbidden: map[string]bool{}, served: true, agent: "ready",
		archives: map[string]*servedArchive{}, uploads: map[string]*upload{}, contents: map[string][]byte{},
		preflights: map[string]*subresourcesv1alpha1.CheckpointPreflight{}, going: map[string]int{}}
	s.Server = httptest.NewServer(http.HandlerFunc(s.handle))
	return s
}

// load adds the objects of a YAML file.
func (s *apiServer) load(text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range strings.Split(text, "\n---\n") {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(one), &object.Object); err != nil {
			return err
		}
		if object.GetUID() == "" {
			object.SetUID(types.UID("uid-of-" + object.GetName()))
		}
		if created := object.GetCreationTimestamp(); created.IsZero() {
			object.SetCreationTimestamp(metav1.NewTime(time.Now().Add(-100 * 24 * time.Hour)))
		}
		s.objects[objectKey{strings.ToLower(object.GetKind()) + "s", object.GetNamespace(), object.GetName()}] = object
	}
	return nil
}

func (s *apiServer) handle(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.calls = append(s.calls, r.Method+" "+r.URL.Path)
	s.mu.Unlock()
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case parts[0] == "api":
		s.resource(w, r, parts[2:])
	case parts[1] == subresourcesv1alpha1.GroupName && !s.served:
		http.Error(w, "404 page not found", http.StatusNotFound)
	case len(parts) == 3:
		answer(w, http.StatusOK, map[string]any{"kind": "APIResourceList"})
	case parts[1] == subresourcesv1alpha1.GroupName && parts[3] != "namespaces":
		s.subresource(w, r, "", parts[3], parts[4], parts[5])
	case parts[1] == subresourcesv1alpha1.GroupName:
		s.subresource(w, r, parts[4], parts[5], parts[6], parts[7])
	case parts[3] == "selfsubjectaccessreviews":
		s.review(w, r)
	default:
		s.resource(w, r, parts[3:])
	}
}

// resource serves ordinary objects: [namespaces NS] RESOURCE [NAME].
func (s *apiServer) resource(w http.ResponseWriter, r *http.Request, parts []string) {
	key := objectKey{}
	if parts[0] == "namespaces" && len(parts) > 2 {
		key.namespace, parts = parts[1], parts[2:]
	}
	key.resource = parts[0]
	if len(parts) > 1 {
		key.name = parts[1]
	}
	verb := map[string]string{"GET": "get", "POST": "create", "DELETE": "delete"}[r.Method]
	if r.URL.Query().Get("watch") != "" {
		fail(w, apierrors.NewForbidden(group(key), key.name, fmt.Errorf("no watches here")))
		return
	}
	if verb == "get" && key.name == "" {
		verb = "list"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.forbidden[verb+" "+key.resource] {
		fail(w, apierrors.NewForbidden(group(key), key.name, fmt.Errorf("user %q cannot %s resource %q", "jane", verb, key.resource)))
		return
	}
	switch verb {
	case "list":
		s.list(w, r, key)
	case "get":
		if object := s.find(w, key); object != nil {
			answer(w, http.StatusOK, object.Object)
		}
	case "create":
		object := &unstructured.Unstructured{}
		if err := json.NewDecoder(r.Body).Decode(&object.Object); err != nil {
			fail(w, apierrors.NewBadRequest(err.Error()))
			return
		}
		s.create(w, key, object, r.URL.Query().Get("dryRun") != "")
	case "delete":
		if object := s.find(w, key); object != nil {
			var options metav1.DeleteOptions
			_ = json.NewDecoder(r.Body).Decode(&options)
			if len(options.DryRun) == 0 {
				s.remove(key, object)
			}
			answer(w, http.StatusOK, object.Object)
		}
	}
}

func group(key objectKey) schema.GroupResource {
	return schema.GroupResource{Group: kindOf(key.resource).Group, Resource: key.resource}
}

func (s *apiServer) find(w http.ResponseWriter, key objectKey) *unstructured.Unstructured {
	object := s.objects[key]
	if object == nil {
		fail(w, apierrors.NewNotFound(group(key), key.name))
	}
	return object
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request, key objectKey) {
	byField, err := fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
	if err != nil {
		fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	byLabel, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	items := []any{}
	for k, object := range s.objects {
		if k.resource != key.resource || key.namespace != "" && k.namespace != key.namespace || !byLabel.Matches(labels.Set(object.GetLabels())) {
			continue
		}
		uid, _, _ := unstructured.NestedString(object.Object, "involvedObject", "uid")
		pod, _, _ := unstructured.NestedString(object.Object, "spec", "sourcePodName")
		if byField.Matches(fields.Set{"metadata.name": k.name, "involvedObject.uid": uid, "spec.sourcePodName": pod}) {
			items = append(items, object.Object)
		}
	}
	slices.SortFunc(items, func(a, b any) int {
		name := func(o any) string {
			u := unstructured.Unstructured{Object: o.(map[string]any)}
			return u.GetNamespace() + "/" + u.GetName()
		}
		return strings.Compare(name(a), name(b))
	})
	kind := kindOf(key.resource)
	answer(w, http.StatusOK, map[string]any{"apiVersion": kind.GroupVersion().String(), "kind": kind.Kind + "List", "metadata": map[string]any{}, "items": items})
}

func (s *apiServer) create(w http.ResponseWriter, key objectKey, object *unstructured.Unstructured, try bool) {
	s.serial++
	if object.GetName() == "" {
		object.SetName(fmt.Sprintf("%s%05d", object.GetGenerateName(), s.serial))
	}
	key.name = object.GetName()
	if s.objects[key] != nil {
		fail(w, apierrors.NewAlreadyExists(group(key), key.name))
		return
	}
	object.SetUID(types.UID(fmt.Sprintf("uid-%d", s.serial)))
	object.SetCreationTimestamp(metav1.Now())
	if !try {
		s.objects[key] = object
		s.act(key, object)
	}
	answer(w, http.StatusCreated, object.Object)
}

// remove deletes an object; its finalizers hold it for a moment, as a node does.
func (s *apiServer) remove(key objectKey, object *unstructured.Unstructured) {
	if len(object.GetFinalizers()) == 0 {
		delete(s.objects, key)
		return
	}
	now := metav1.Now()
	object.SetDeletionTimestamp(&now)
	if s.agent == "busy" {
		return
	}
	time.AfterFunc(700*time.Millisecond, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.objects, key)
	})
}

// review answers what the user may do: everything that is not forbidden.
func (s *apiServer) review(w http.ResponseWriter, r *http.Request) {
	var review map[string]any
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	attribute := func(name string) string {
		value, _, _ := unstructured.NestedString(review, "spec", "resourceAttributes", name)
		return value
	}
	resource := attribute("resource")
	if sub := attribute("subresource"); sub != "" {
		resource += "/" + sub
	}
	s.mu.Lock()
	review["status"] = map[string]any{"allowed": !s.forbidden[attribute("verb")+" "+resource]}
	s.mu.Unlock()
	answer(w, http.StatusCreated, review)
}

func answer(w http.ResponseWriter, code int, object any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object) // who is gone need not be told
}

func fail(w http.ResponseWriter, err *apierrors.StatusError) {
	err.ErrStatus.Kind, err.ErrStatus.APIVersion = "Status", "v1"
	answer(w, int(err.ErrStatus.Code), err.ErrStatus)
}
