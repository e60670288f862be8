package admission

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/podtemplate"
)

func scheme(t *testing.T) *runtime.Scheme {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, checkpointv1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// source is the Pod that was checkpointed.
func source() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p"},
		Spec: corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "a", Image: "i"}}}}
}

// ready is its checkpoint.
func ready() *checkpointv1alpha1.PodCheckpoint {
	return &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c", UID: "u"},
		Status: checkpointv1alpha1.PodCheckpointStatus{NodeName: "node-1", CheckpointedPodTemplate: podtemplate.FromPod(source()),
			Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "CheckpointCompleted"}}},
	}
}

func restoring() *corev1.Pod {
	pod := source()
	pod.Name = "r"
	pod.Spec.NodeName = ""
	pod.Annotations = map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: "c"}
	return pod
}

func ask(t *testing.T, object any) admission.Request {
	t.Helper()
	raw, ok := object.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(object); err != nil {
			t.Fatal(err)
		}
	}
	return admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{
		Namespace: "n", Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: raw},
		UserInfo: authenticationv1.UserInfo{Username: "ann", UID: "7", Groups: []string{"g", "h"}, Extra: map[string]authenticationv1.ExtraValue{"scopes": {"x", "y"}}},
	}}
}

func placerWith(t *testing.T, objects ...client.Object) *placer {
	s := scheme(t)
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).Build()
	return &placer{reader: c, decoder: admission.NewDecoder(s), whereabouts: whereabouts{leases: c, namespace: "stasis-system", clock: clock.RealClock{}}}
}

// apply returns the Pod that the API server makes of an answer.
func apply(t *testing.T, raw []byte, response admission.Response) []byte {
	t.Helper()
	if !response.Allowed {
		t.Fatalf("refused: %+v", response.Result)
	}
	if len(response.Patches) == 0 {
		return raw
	}
	b, err := json.Marshal(response.Patches)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := jsonpatch.DecodePatch(b)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply(raw)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPlacingAPodAgainChangesNothing(t *testing.T) {
	for name, objects := range map[string][]client.Object{"Ready": {ready()}, "not there": nil} {
		t.Run(name, func(t *testing.T) {
			p := placerWith(t, objects...)
			raw := ask(t, restoring()).Object.Raw
			placed := apply(t, raw, p.Handle(t.Context(), ask(t, raw)))
			if string(placed) == string(raw) {
				t.Fatal("nothing was placed")
			}
			if again := p.Handle(t.Context(), ask(t, placed)); len(again.Patches) > 0 {
				t.Errorf("patched again: %v", again.Patches)
			}
		})
	}
}

func TestFieldsOfANewerAPIServerSurvive(t *testing.T) {
	raw := []byte(`{"metadata":{"name":"r","annotations":{"checkpoint.podstasis.dev/restore-from":"c"}},"spec":{"invented":{"a":[1]},"containers":[{"name":"a","image":"i","invented":true}]}}`)
	placed := apply(t, raw, placerWith(t, ready()).Handle(t.Context(), ask(t, raw)))
	for _, want := range []string{`"invented":{"a":[1]}`, `"invented":true`, `"runtimeClassName":"stasis"`} {
		if !strings.Contains(string(placed), want) {
			t.Errorf("%s is missing from %s", want, placed)
		}
	}
}

func TestAPodWithoutTheAnnotationIsLeftAlone(t *testing.T) {
	pod := restoring()
	pod.Annotations = nil
	if r := placerWith(t, ready()).Handle(t.Context(), ask(t, pod)); !r.Allowed || len(r.Patches) > 0 {
		t.Errorf("%+v", r)
	}
	a := authorizerWith(t, func(*authorizationv1.SubjectAccessReview) error { t.Error("reviewed"); return nil })
	if r := a.Handle(t.Context(), ask(t, pod)); !r.Allowed {
		t.Errorf("%+v", r)
	}
}

func TestTheSourcesRuntimeClassIsReplacedWithItsOverhead(t *testing.T) {
	class := "heavy"
	c := ready()
	c.Status.CheckpointedPodTemplate.Spec.RuntimeClassName = &class
	pod := restoring()
	pod.Spec.RuntimeClassName = &class
	pod.Spec.Overhead = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m")}
	var placed corev1.Pod
	raw := ask(t, pod).Object.Raw
	if err := json.Unmarshal(apply(t, raw, placerWith(t, c).Handle(t.Context(), ask(t, raw))), &placed); err != nil {
		t.Fatal(err)
	}
	if *placed.Spec.RuntimeClassName != "stasis" || placed.Spec.Overhead != nil {
		t.Errorf("class %s, overhead %v", *placed.Spec.RuntimeClassName, placed.Spec.Overhead)
	}
}

// P21: the manifest of a source that was itself restored names the class that it ran with
// at first.
func TestTheClassOfARestoredSourcesManifestIsReplacedToo(t *testing.T) {
	place := func(class string, source *corev1.PodTemplateSpec) *corev1.Pod {
		c := ready()
		c.Status.CheckpointedPodTemplate = source
		pod := restoring()
		pod.Spec.RuntimeClassName = &class
		var placed corev1.Pod
		raw := ask(t, pod).Object.Raw
		if err := json.Unmarshal(apply(t, raw, placerWith(t, c).Handle(t.Context(), ask(t, raw))), &placed); err != nil {
			t.Fatal(err)
		}
		return &placed
	}
	source := ready().Status.CheckpointedPodTemplate
	source.Spec.RuntimeClassName = new("own")
	for range 2 { // the second is restored from a checkpoint of the first
		placed := place("own", source)
		if class := placed.Spec.RuntimeClassName; class == nil || *class != "stasis" {
			t.Fatalf("class %v", class)
		}
		source = ready().Status.CheckpointedPodTemplate
		source.Annotations, source.Spec.RuntimeClassName = placed.Annotations, placed.Spec.RuntimeClassName
	}
	if class := place("another", source).Spec.RuntimeClassName; *class != "another" {
		t.Errorf("a class that no manifest of the source named was replaced by %s", *class)
	}
}

func TestAPodFromACheckpointOfGVisorGetsItsClass(t *testing.T) {
	class := "runsc"
	c := ready()
	c.Status.Engine = &checkpointv1alpha1.EngineStatus{Name: "gvisor", Version: "1"}
	c.Status.CheckpointedPodTemplate.Spec.RuntimeClassName = &class
	pod := restoring()
	pod.Spec.RuntimeClassName = &class
	var placed corev1.Pod
	raw := ask(t, pod).Object.Raw
	if err := json.Unmarshal(apply(t, raw, placerWith(t, c).Handle(t.Context(), ask(t, raw))), &placed); err != nil {
		t.Fatal(err)
	}
	if *placed.Spec.RuntimeClassName != "stasis-gvisor" {
		t.Errorf("class %s", *placed.Spec.RuntimeClassName)
	}
	other := checkpointv1alpha1.RuntimeClassStasis
	pod.Spec.RuntimeClassName = &other
	authorizer := authorizerWith(t, func(r *authorizationv1.SubjectAccessReview) error { r.Status.Allowed = true; return nil }, c)
	if r := authorizer.Handle(t.Context(), ask(t, pod)); r.Allowed || !strings.Contains(r.Result.Message, `is restored by "stasis-gvisor"`) {
		t.Errorf("by CRIU's class: %+v", r)
	}
}

// authorizerWith reviews by a function.
func authorizerWith(t *testing.T, review func(*authorizationv1.SubjectAccessReview) error, objects ...client.Object) *authorizer {
	s := scheme(t)
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithInterceptorFuncs(interceptor.Funcs{
		Create: func(_ context.Context, _ client.WithWatch, o client.Object, _ ...client.CreateOption) error {
			return review(o.(*authorizationv1.SubjectAccessReview))
		},
	}).Build()
	return &authorizer{reader: c, reviews: c, decoder: admission.NewDecoder(s), log: slog.New(slog.DiscardHandler),
		whereabouts: whereabouts{leases: c, namespace: "stasis-system", clock: clock.RealClock{}}}
}

func TestTheReviewIsOfTheRequestersWholeIdentity(t *testing.T) {
	var got authorizationv1.SubjectAccessReviewSpec
	a := authorizerWith(t, func(r *authorizationv1.SubjectAccessReview) error { got = r.Spec; return nil }, ready())
	pod := restoring()
	pod.Namespace = "forged" // the request's namespace counts
	if r := a.Handle(t.Context(), ask(t, pod)); r.Allowed || r.Result.Reason != metav1.StatusReasonForbidden {
		t.Errorf("an answer that allows nothing was taken for a yes: %+v", r)
	}
	want := authorizationv1.SubjectAccessReviewSpec{
		User: "ann", UID: "7", Groups: []string{"g", "h"}, Extra: map[string]authorizationv1.ExtraValue{"scopes": {"x", "y"}},
		ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: "n", Verb: "restore", Group: "checkpoint.podstasis.dev", Version: "v1alpha1", Resource: "podcheckpoints", Name: "c"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("review (-want +got):\n%s", diff)
	}
}

func allow(r *authorizationv1.SubjectAccessReview) error { r.Status.Allowed = true; return nil }

func TestAReviewThatFailsAllowsNothing(t *testing.T) {
	for name, review := range map[string]func(*authorizationv1.SubjectAccessReview) error{
		"no answer": func(*authorizationv1.SubjectAccessReview) error { return errors.New("away") },
		"allowed, then denied": func(r *authorizationv1.SubjectAccessReview) error {
			r.Status.Allowed, r.Status.Denied = true, true
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			if r := authorizerWith(t, review, ready()).Handle(t.Context(), ask(t, restoring())); r.Allowed {
				t.Error("allowed")
			}
		})
	}
}

func TestWhatAnotherWebhookUndidIsRefused(t *testing.T) {
	placed := func() *corev1.Pod {
		var pod corev1.Pod
		raw := ask(t, restoring()).Object.Raw
		if err := json.Unmarshal(apply(t, raw, placerWith(t, ready()).Handle(t.Context(), ask(t, raw))), &pod); err != nil {
			t.Fatal(err)
		}
		return &pod
	}
	tests := map[string]struct {
		undo    func(*corev1.Pod)
		allowed bool
	}{
		"nothing":             {func(*corev1.Pod) {}, true},
		"the pin":             {func(p *corev1.Pod) { delete(p.Annotations, checkpointv1alpha1.AnnotationRestoreFromUID) }, false},
		"another pin":         {func(p *corev1.Pod) { p.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = "x" }, false},
		"the affinity":        {func(p *corev1.Pod) { p.Spec.Affinity = nil }, false},
		"the runtime class":   {func(p *corev1.Pod) { p.Spec.RuntimeClassName = nil }, false},
		"a mirror annotation": {func(p *corev1.Pod) { p.Annotations[corev1.MirrorPodAnnotationKey] = "x" }, false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			pod := placed()
			tc.undo(pod)
			if r := authorizerWith(t, allow, ready()).Handle(t.Context(), ask(t, pod)); r.Allowed != tc.allowed {
				t.Errorf("allowed = %v: %+v", r.Allowed, r.Result)
			}
		})
	}
	t.Run("the gate of one that waits", func(t *testing.T) {
		pod := placed()
		if r := authorizerWith(t, allow).Handle(t.Context(), ask(t, pod)); r.Allowed {
			t.Error("allowed")
		}
	})
}

func TestHowMemoryIsBroughtIsOneOfThreeWays(t *testing.T) {
	for mode, allowed := range map[string]bool{"lazy": true, "eager": true, "auto": true, "": false, "Lazy": false, "later": false} {
		var pod corev1.Pod
		raw := ask(t, restoring()).Object.Raw
		if err := json.Unmarshal(apply(t, raw, placerWith(t, ready()).Handle(t.Context(), ask(t, raw))), &pod); err != nil {
			t.Fatal(err)
		}
		pod.Annotations[checkpointv1alpha1.AnnotationRestoreMemory] = mode
		r := authorizerWith(t, allow, ready()).Handle(t.Context(), ask(t, &pod))
		if r.Allowed != allowed || !allowed && !strings.Contains(r.Result.Message, "restore-memory") {
			t.Errorf("%q: %+v", mode, r)
		}
	}
}

func TestAPodThatWaitsIsAdmittedWithAWarning(t *testing.T) {
	raw := ask(t, restoring()).Object.Raw
	held := apply(t, raw, placerWith(t).Handle(t.Context(), ask(t, raw)))
	r := authorizerWith(t, allow).Handle(t.Context(), ask(t, held))
	if !r.Allowed || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], `PodCheckpoint "c" does not exist`) {
		t.Errorf("%+v", r)
	}
}
