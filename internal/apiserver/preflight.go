package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"k8s.io/apiserver/pkg/warning"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// maxPreflightAnswer bounds what an agent says of a Pod.
const maxPreflightAnswer = 1 << 20

// preflighter asks the agent of a node what a checkpoint would meet.
type preflighter interface {
	Preflight(ctx context.Context, node string, podCheckpoint []byte) (*http.Response, error)
}

// preflight is what a checkpoint would meet that is not taken. The dry run is good
// without it.
func (c *creation) preflight(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) *subresources.CheckpointPreflight {
	node := checkpoint.Spec.NodeName
	if node == "" {
		return &subresources.CheckpointPreflight{Unavailable: "there is no such Pod on a node"}
	}
	found, err := c.askNode(ctx, node, checkpoint)
	if err != nil {
		var refusal *agentapi.Refusal
		if errors.As(err, &refusal) && refusal.Status == http.StatusNotFound {
			err = fmt.Errorf("the stasis-agent of node %q is too old to be asked for that: update it", node)
		}
		why := fmt.Sprintf("the Pod was not looked at on its node: %v", err)
		warning.AddWarning(ctx, "", why)
		return &subresources.CheckpointPreflight{Unavailable: why}
	}
	return found
}

func (c *creation) askNode(ctx context.Context, node string, checkpoint *checkpointv1alpha1.PodCheckpoint) (*subresources.CheckpointPreflight, error) {
	asked, err := json.Marshal(&checkpointv1alpha1.PodCheckpoint{ObjectMeta: checkpoint.ObjectMeta, Spec: checkpoint.Spec})
	if err != nil {
		return nil, err
	}
	answer, err := c.nodes.Preflight(ctx, node, asked)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxPreflightAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("read the answer of the stasis-agent of node %q: %w", node, err)
	}
	if len(text) > maxPreflightAnswer {
		return nil, fmt.Errorf("the stasis-agent of node %q answers with more than %d bytes", node, maxPreflightAnswer)
	}
	var found subresources.CheckpointPreflight
	if err := json.Unmarshal(text, &found); err != nil {
		return nil, fmt.Errorf("read the answer of the stasis-agent of node %q: %w", node, err)
	}
	return &found, nil
}
