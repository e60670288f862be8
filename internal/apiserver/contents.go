package apiserver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
)

const (
	// maxContents bounds an answer of an agent that is read whole; agents bound what
	// they write well below.
	maxContents = 8 << 20
	// maxReaders is how many of them are in memory at one time.
	maxReaders = 4
)

// contents tells what is inside a checkpoint.
type contents struct {
	parentless
	objects client.Reader
	agents  agents
	readers chan struct{}
}

func newContents(objects client.Reader, agents agents) *contents {
	return &contents{objects: objects, agents: agents, readers: make(chan struct{}, maxReaders)}
}

var _ rest.Getter = &contents{}

func (c *contents) New() runtime.Object { return &subresources.CheckpointContents{} }

func (c *contents) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	namespace := request.NamespaceValue(ctx)
	checkpoint, err := readyOne(ctx, c.objects, namespace, name)
	if err != nil {
		return nil, err
	}
	select {
	case c.readers <- struct{}{}:
		defer func() { <-c.readers }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	answer, err := c.agents.Contents(ctx, checkpoint.Status.NodeName, string(checkpoint.UID))
	if err != nil {
		return nil, answerOf(err, podCheckpoints, name)
	}
	defer answer.Body.Close()
	bounded := &io.LimitedReader{R: answer.Body, N: maxContents + 1}
	var found subresources.CheckpointContents
	err = json.NewDecoder(bounded).Decode(&found)
	if bounded.N == 0 {
		return nil, apierrors.NewInternalError(fmt.Errorf("the stasis-agent of node %q sends more than %d bytes of contents", checkpoint.Status.NodeName, maxContents))
	}
	if err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("read the contents of PodCheckpoint %s/%s from the stasis-agent of node %q: %w", namespace, name, checkpoint.Status.NodeName, err))
	}
	// Which checkpoint it is and where it is kept, the API says, and not a node.
	found.SetGroupVersionKind(subresources.SchemeGroupVersion.WithKind("CheckpointContents"))
	found.ObjectMeta = metav1.ObjectMeta{Namespace: namespace, Name: name, UID: checkpoint.UID, CreationTimestamp: checkpoint.CreationTimestamp}
	found.Store = checkpoint.Status.Store
	return &found, nil
}
