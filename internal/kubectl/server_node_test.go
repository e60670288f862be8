package kubectl

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// act does what nodes do with a new object, a moment later. The lock is held.
func (s *apiServer) act(key objectKey, object *unstructured.Unstructured) {
	var steps []map[string]any
	switch key.resource {
	case "podcheckpoints":
		if _, imports, _ := unstructured.NestedMap(object.Object, "spec", "import"); imports {
			_ = unstructured.SetNestedField(object.Object, "node-2", "spec", "nodeName")
			return
		}
		object.SetFinalizers([]string{"checkpoint.podstasis.dev/data"})
		steps = checkpointSteps(s.agent)
	case "pods":
		steps = podSteps(s.agent)
	}
	go func() {
		for i, step := range steps {
			time.Sleep(time.Duration(100+900*i) * time.Millisecond)
			s.mu.Lock()
			if now := s.objects[key]; now != nil {
				now.Object["status"] = step
			}
			s.mu.Unlock()
		}
	}()
}

func ready(status, reason, message string) []any {
	return []any{map[string]any{"type": "Ready", "status": status, "reason": reason, "message": message, "lastTransitionTime": metav1.Now().UTC().Format(time.RFC3339)}}
}

func checkpointSteps(agent string) []map[string]any {
	busy := map[string]any{"nodeName": "node-1", "conditions": ready("False", "CheckpointInProgress", "capturing main")}
	switch agent {
	case "busy":
		return []map[string]any{busy}
	case "failed":
		return []map[string]any{busy, {"nodeName": "node-1", "conditions": ready("False", "CheckpointFailed", "io_uring is in use by pid 7")}}
	}
	return []map[string]any{busy, {
		"nodeName": "node-1", "freezeDuration": "143ms", "earlierFreezes": []any{map[string]any{"duration": "58ms", "reason": "a process was ending"}}, "size": map[string]any{"logical": "12Mi", "logicalBytes": 12 << 20},
		"checkpointLocation":     map[string]any{"type": "NodeLocal", "nodeLocal": map[string]any{"path": "there"}},
		"checkpointedContainers": []any{map[string]any{"name": "main", "image": "i"}},
		"phases":                 []any{map[string]any{"name": "freeze", "duration": "12ms"}, map[string]any{"name": "capture", "duration": "120ms"}},
		"conditions":             ready("True", "CheckpointCompleted", "done"),
	}}
}

func podSteps(agent string) []map[string]any {
	if agent == "busy" {
		return nil
	}
	return []map[string]any{{"phase": "Running", "podIP": "10.0.0.7", "conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}}
}

// subresource serves the aggregated API.
func (s *apiServer) subresource(w http.ResponseWriter, r *http.Request, namespace, resource, name, sub string) {
	verb := map[string]string{"GET": "get", "POST": "create", "PUT": "update"}[r.Method]
	s.mu.Lock()
	forbidden := s.forbidden[verb+" "+resource+"/"+sub]
	s.mu.Unlock()
	if forbidden {
		fail(w, apierrors.NewForbidden(subresourcesv1alpha1.SchemeGroupVersion.WithResource(resource+"/"+sub).GroupResource(), name,
			fmt.Errorf("user %q cannot %s resource %q", "jane", verb, resource+"/"+sub)))
		return
	}
	switch sub {
	case "checkpoint":
		s.request(w, r, namespace, name)
	case "verify", "collect":
		s.store(w, r, name, sub)
	case "contents":
		s.inside(w, name)
	case "archive":
		if r.Method == http.MethodPut {
			s.putArchive(w, r, namespace, name)
		} else {
			s.getArchive(w, r, name)
		}
	}
}

// store answers verifications and collections: the first time that they go on, of the
// store "slow" always. What is called "broken" is.
func (s *apiServer) store(w http.ResponseWriter, r *http.Request, name, sub string) {
	s.mu.Lock()
	s.going[r.URL.Path]++
	goesOn := s.going[r.URL.Path]%2 == 1 || name == "slow"
	s.mu.Unlock()
	now := metav1.Now()
	end := &now
	if goesOn {
		end = nil
	}
	switch {
	case name == "away":
		fail(w, apierrors.NewServiceUnavailable(`CheckpointStore "away": /mnt does not exist`))
	case sub == "collect":
		answer(w, http.StatusCreated, subresourcesv1alpha1.StoreCollection{Status: subresourcesv1alpha1.StoreCollectionStatus{StartTime: &now, CompletionTime: end,
			DryRun: r.URL.Query().Get("dryRun") == "All", Checkpoints: 3, Bytes: 30 << 20, UnusedBytes: 2 << 20, RemovedBytes: 1 << 20}})
	case name == "broken" && !goesOn:
		answer(w, http.StatusCreated, subresourcesv1alpha1.StoreVerification{Status: subresourcesv1alpha1.StoreVerificationStatus{StartTime: &now, CompletionTime: end,
			Checkpoints: 2, ProblemCount: 2, Problems: []subresourcesv1alpha1.StoreProblem{{CheckpointID: "0123", PodCheckpoint: "team-a/one", Message: "packs/ab: frame 3 is not what was written"}}}})
	default:
		answer(w, http.StatusCreated, subresourcesv1alpha1.StoreVerification{Status: subresourcesv1alpha1.StoreVerificationStatus{StartTime: &now, CompletionTime: end,
			Checkpoints: 2, VerifiedBytes: 12 << 20}})
	}
}

func (s *apiServer) inside(w http.ResponseWriter, name string) {
	s.mu.Lock()
	contents := s.contents[name]
	s.mu.Unlock()
	if contents == nil {
		fail(w, apierrors.NewServiceUnavailable("node node-1 has no agent"))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(contents)
}

// request answers pods/checkpoint.
func (s *apiServer) request(w http.ResponseWriter, r *http.Request, namespace, pod string) {
	var asked subresourcesv1alpha1.PodCheckpointRequest
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		fail(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	key := objectKey{"podcheckpoints", namespace, asked.Spec.CheckpointName}
	s.mu.Lock()
	if s.objects[objectKey{"pods", namespace, pod}] == nil {
		s.mu.Unlock()
		fail(w, apierrors.NewNotFound(group(objectKey{resource: "pods"}), pod))
		return
	}
	object := s.objects[key]
	if object == nil {
		s.serial++
		object = &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "checkpoint.podstasis.dev/v1alpha1", "kind": "PodCheckpoint",
			"metadata": map[string]any{"namespace": namespace, "name": key.name, "uid": fmt.Sprintf("uid-%d", s.serial)},
			"spec":     map[string]any{"sourcePodName": pod, "nodeName": "node-1"},
		}}
		if asked.Spec.StoreName != "" {
			_ = unstructured.SetNestedField(object.Object, asked.Spec.StoreName, "spec", "storeName")
		}
		if key.name == "" {
			key.name = fmt.Sprintf("%s-%05d", pod, s.serial)
		}
		if r.URL.Query().Get("dryRun") == "" {
			s.objects[key] = object
			s.act(key, object)
		}
	}
	s.mu.Unlock()
	deadline := time.Now().Add(time.Duration(*asked.Spec.WaitSeconds) * time.Second)
	for {
		s.mu.Lock()
		text, _ := json.Marshal(object.Object)
		s.mu.Unlock()
		var checkpoint struct {
			Metadata metav1.ObjectMeta                               `json:"metadata"`
			Status   subresourcesv1alpha1.PodCheckpointRequestStatus `json:"status"`
		}
		var conditions struct {
			Status struct {
				Conditions []metav1.Condition `json:"conditions"`
			} `json:"status"`
		}
		_ = json.Unmarshal(text, &checkpoint)
		_ = json.Unmarshal(text, &conditions)
		asked.Status = checkpoint.Status
		if r.URL.Query().Get("dryRun") != "" {
			s.mu.Lock()
			asked.Status.Preflight, asked.Status.NodeName = s.preflights[pod], "node-1"
			s.mu.Unlock()
		}
		asked.Status.CheckpointName, asked.Status.CheckpointUID = key.name, checkpoint.Metadata.UID
		if len(conditions.Status.Conditions) > 0 {
			asked.Status.Ready = &conditions.Status.Conditions[0]
		}
		over := asked.Status.Ready != nil && (asked.Status.Ready.Status == metav1.ConditionTrue || asked.Status.Ready.Reason == "CheckpointFailed")
		if over || !time.Now().Before(deadline) {
			answer(w, http.StatusCreated, asked)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}
