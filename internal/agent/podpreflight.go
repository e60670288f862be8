package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hooks"
)

// examiner says what a checkpoint would meet. It is asked within the agent: the CRI
// has no such call.
type examiner interface {
	Examine(ctx context.Context, in *runtimeapi.CheckpointPodRequest) (criservice.Examined, error)
	Look(ctx context.Context, sandboxID string, containerIDs []string) (engine.Examination, error)
}

// podPreflight says what a checkpoint of a Pod would meet, and takes none.
type podPreflight struct {
	nodeName  string
	live      client.Reader
	runtime   sandboxLister
	examiner  examiner
	root      string // of the checkpoints
	apiServer string
}

// examine answers for a PodCheckpoint that is not stored. What the agent would refuse
// is among the problems.
func (p *podPreflight) examine(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (*api.CheckpointPreflight, error) {
	found := &api.CheckpointPreflight{}
	refused := func(no *refusal) (*api.CheckpointPreflight, error) {
		found.Problems = append(found.Problems, no.message)
		return found, nil
	}
	var pod *corev1.Pod
	var live corev1.Pod
	switch err := p.live.Get(ctx, types.NamespacedName{Namespace: pcp.Namespace, Name: pcp.Spec.SourcePodName}, &live); {
	case err == nil:
		pod = &live
	case !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("read the source Pod: %w", err)
	}
	src, no := checkPod(pcp, pod, p.nodeName)
	if no != nil {
		return refused(no)
	}
	sandbox, containers, err := findSandbox(ctx, p.runtime, src)
	if errors.As(err, &no) {
		return refused(no)
	} else if err != nil {
		return nil, err
	}
	limit := tightest(pod)
	options := withFreezeBudget(pcp.Spec.Options, limit)
	x, err := p.examiner.Examine(ctx, &runtimeapi.CheckpointPodRequest{PodSandboxId: sandbox, ContainerIds: containers, OutputPath: p.root, Options: options})
	if err != nil {
		return nil, fmt.Errorf("look at Pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	found.Problems = x.Problems
	found.Engine, found.Options = x.Engine, optionsOf(x.Options)
	found.Warnings = warningsOf(pod, src.containers, x.Examination, p.apiServer)
	if x.Bytes > 0 {
		found.EstimatedSize = &v1alpha1.CheckpointSize{Logical: binaryBytes(x.Bytes), LogicalBytes: x.Bytes}
		found.EstimatedFreezeDuration = &metav1.Duration{Duration: x.Freeze}
		found.Capture = capture(x.Capture)
	}
	if budget, err := engine.FreezeBudget(options); err == nil && budget > 0 {
		found.FreezeBudget = &metav1.Duration{Duration: budget}
		if limit != nil && budget == limit.budget() {
			found.FreezeBudgetReason = limit.String()
		}
	}
	found.Hooks = hookLines(pod)
	return found, nil
}

// optionsOf are an engine's options in words.
func optionsOf(known []engine.Option) (all []api.EngineOption) {
	for _, o := range known {
		values := o.Form
		if len(o.Values) > 0 {
			values = strings.Join(o.Values, "|")
		}
		all = append(all, api.EngineOption{Name: o.Name, Values: values, Default: o.Default, Description: o.Help})
	}
	return all
}

// hookLines names a Pod's hooks around checkpoints.
func hookLines(pod *corev1.Pod) (lines []string) {
	for _, when := range []struct{ annotation, words string }{
		{v1alpha1.AnnotationPreCheckpoint, "before: "}, {v1alpha1.AnnotationPostCheckpoint, "after: "},
	} {
		list, err := hooks.Of(pod.Annotations, when.annotation)
		if err != nil {
			continue // checkPod has refused it
		}
		for _, h := range list {
			lines = append(lines, when.words+h.String())
		}
	}
	return lines
}

// preflightPatience is less than the caller's.
const preflightPatience = 20 * time.Second

// preflight answers what a checkpoint would meet.
func (s *server) preflight(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeoutCause(r.Context(), preflightPatience, fmt.Errorf("the Pod could not be looked at within %s", preflightPatience))
	defer cancel()
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, agentapi.MaxPreflight))
	if err != nil {
		return decline(http.StatusBadRequest, "the request's body could not be read: %v", err)
	}
	var pcp v1alpha1.PodCheckpoint
	if err := json.Unmarshal(data, &pcp); err != nil {
		return decline(http.StatusBadRequest, "the request's body is no PodCheckpoint: %v", err)
	}
	found, err := s.pods.examine(ctx, &pcp)
	if err != nil {
		return err
	}
	answer, err := json.Marshal(found)
	if err != nil {
		return fmt.Errorf("encode what a checkpoint would meet: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(answer)
	return nil
}

// warn looks at what is about to be captured, and tells of what will not come back as
// it was. No checkpoint waits or fails for it.
func (o *operations) warn(ctx context.Context, op operation) []string {
	if o.look == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	x, err := o.look(ctx, op.sandboxID, op.containerIDs)
	if err != nil {
		o.log.Warn("a Pod could not be looked at before its checkpoint", "pod", op.source.pod.Namespace+"/"+op.source.pod.Name, "error", err)
	}
	warnings := warningsOf(op.source.pod, op.source.containers, x, kubernetesService())
	for _, w := range warnings {
		o.event(op.object, op.source.pod, corev1.EventTypeWarning, v1alpha1.EventCheckpointWarning, "%s", sentence(w))
	}
	return warnings
}
