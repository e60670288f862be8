package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func TestWithTheOptInOnlyLabelledNamespacesHaveCheckpoints(t *testing.T) {
	ns, labelled := namespace(t), namespace(t)
	must(t, shared.client.Patch(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: labelled}},
		client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"checkpoint.podstasis.dev/allowed":"true"}}}`))))
	create := func(ctx context.Context, in string) error {
		return shared.client.Create(ctx, &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: in, GenerateName: "c-"},
			Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "p"}}, client.DryRunAll)
	}
	must(t, create(t.Context(), ns))

	bin, err := programs(t.TempDir())
	must(t, err)
	rendered, err := exec.CommandContext(t.Context(), bin["kubectl"], "kustomize", configRoot()+"/opt-in").Output()
	must(t, err)
	var made []client.Object
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(rendered), 4096)
	for {
		var object unstructured.Unstructured
		if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		must(t, shared.client.Create(t.Context(), &object))
		made = append(made, &object)
	}
	t.Cleanup(func() {
		for _, object := range made {
			if err := shared.client.Delete(context.Background(), object); err != nil {
				t.Error(err)
			}
		}
		// The next test begins when it counts no more.
		if err := eventually(context.Background(), func() error { return create(context.Background(), ns) }); err != nil {
			t.Error(err)
		}
	})
	must(t, eventually(t.Context(), func() error {
		if create(t.Context(), ns) == nil {
			return errors.New("checkpoints are still accepted everywhere")
		}
		return nil
	}))
	refused(t, create(t.Context(), ns), apierrors.IsForbidden, "namespace "+ns+" takes no checkpoints", "checkpoint.podstasis.dev/allowed=true")
	// Nor by a call.
	on, _ := node(t)
	_, err = ask(t, "", ns, source(t, ns, on).Name, subresources.PodCheckpointRequestSpec{})
	refused(t, err, apierrors.IsForbidden, "namespace "+ns+" takes no checkpoints")
	// What the API server's policies know of namespaces comes to them by a watch, too.
	must(t, eventually(t.Context(), func() error { return create(t.Context(), labelled) }))
}
