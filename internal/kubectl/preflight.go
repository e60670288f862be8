package kubectl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// errWouldFail is what a dry run ends with that found a problem.
var errWouldFail = errors.New("the checkpoint would be refused")

// tellPreflight prints what a checkpoint would meet.
func tellPreflight(out io.Writer, found *subresourcesv1alpha1.CheckpointPreflight) {
	if found.Unavailable != "" {
		fmt.Fprintf(out, "warning: %s\n", clean(found.Unavailable))
	}
	for _, problem := range found.Problems {
		fmt.Fprintf(out, "problem: %s\n", clean(problem))
	}
	for _, warning := range found.Warnings {
		fmt.Fprintf(out, "warning: %s\n", clean(warning))
	}
}

// preflightOf tries out a checkpoint of a Pod, which stores nothing.
func (o *checkOptions) preflightOf(ctx context.Context, pod string, containers []string, options map[string]string) (*subresourcesv1alpha1.PodCheckpointRequest, error) {
	atOnce := int32(0)
	asked := &subresourcesv1alpha1.PodCheckpointRequest{Spec: subresourcesv1alpha1.PodCheckpointRequestSpec{
		Containers: distinct(containers), Options: options, WaitSeconds: &atOnce,
	}}
	asked.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("PodCheckpointRequest"))
	if o.calls == nil {
		return nil, errNotServed
	}
	return o.calls.checkpoint(ctx, o.namespace, pod, asked, true)
}

// checkPod says what a checkpoint of a Pod would meet.
func (o *checkOptions) checkPod(ctx context.Context, pod string) error {
	answer, err := o.preflightOf(ctx, pod, o.containers, o.options)
	if err != nil {
		return err
	}
	found := answer.Status.Preflight
	switch {
	case found == nil:
		return fmt.Errorf("pod %s was not looked at: the Stasis of this cluster is too old for that", pod)
	case found.Unavailable != "":
		return errors.New(clean(found.Unavailable))
	}
	verdict := "can be checkpointed"
	if len(found.Problems) > 0 {
		verdict = "cannot be checkpointed as it is"
	}
	fmt.Fprintf(o.Out, "pod/%s %s\n", pod, verdict)
	budget := ""
	if found.FreezeBudget != nil {
		budget = short(found.FreezeBudget.Duration)
		if found.FreezeBudgetReason != "" {
			budget += ", safe under " + clean(found.FreezeBudgetReason)
		}
	}
	expected, estimate := "", ""
	if found.EstimatedFreezeDuration != nil {
		expected = "about " + short(found.EstimatedFreezeDuration.Duration)
	}
	if found.EstimatedSize != nil {
		estimate = "about " + size(found.EstimatedSize.LogicalBytes)
	}
	var hooks []string
	for _, hook := range found.Hooks {
		hooks = append(hooks, clean(hook))
	}
	facts(o.Out, "Node", answer.Status.NodeName, "Engine", clean(found.Engine), "Size", estimate, "Frozen", expected, "Capture", captureOf(found.Capture), "Budget", budget, "Hooks", strings.Join(hooks, "; "))
	tellPreflight(o.Out, found)
	var options [][]string
	for _, option := range found.Options {
		options = append(options, []string{clean(option.Name), clean(option.Values), clean(option.Description), "by default " + clean(option.Default)})
	}
	if err := section(o.Out, "Options of the engine (--option NAME=VALUE)", options); err != nil {
		return err
	}
	if len(found.Problems) > 0 {
		return silently(ExitFailed)
	}
	return nil
}
