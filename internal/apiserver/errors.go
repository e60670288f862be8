package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

var podCheckpoints = checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource()

// passed turns an error of the API server into the answer: what it said, if it
// said something, else that something is wrong here. The context's end stays what
// it is.
func passed(err error, doing string, args ...any) error {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return &apierrors.StatusError{ErrStatus: status.Status()}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return apierrors.NewInternalError(fmt.Errorf(doing+": %w", append(args, err)...))
}

// answerOf turns an error of a call to an agent into the answer (A3).
func answerOf(err error, resource schema.GroupResource, name string) error {
	var unreachable *agentapi.Unreachable
	if errors.As(err, &unreachable) {
		if unreachable.Reason == agentapi.NodeGone {
			return gone(unreachable.Error())
		}
		return reasoned(apierrors.NewServiceUnavailable(unreachable.Error()), string(unreachable.Reason))
	}
	var refusal *agentapi.Refusal
	if errors.As(err, &refusal) {
		return refused(refusal, resource, name)
	}
	return passed(err, "ask the agent about %s %q", resource, name)
}

// gone says that something is not there any more and never will be: 410 Gone.
func gone(message string) *apierrors.StatusError {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusGone, Reason: metav1.StatusReasonGone, Message: message}}
}

// reasoned adds a word for programs, where the status' own reasons say too little.
func reasoned(err *apierrors.StatusError, reason string) error {
	err.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseType(reason), Message: err.ErrStatus.Message}}}
	return err
}

// refused turns an agent's refusal into the answer. Those that are about the caller
// keep their meaning; those that are about us do not become the caller's.
func refused(r *agentapi.Refusal, resource schema.GroupResource, name string) error {
	status := metav1.Status{Status: metav1.StatusFailure, Message: r.Error(), Code: int32(r.Status),
		Details: &metav1.StatusDetails{Group: resource.Group, Kind: resource.Resource, Name: name}}
	switch r.Status {
	case http.StatusNotFound:
		status.Reason = metav1.StatusReasonNotFound
	case http.StatusConflict:
		status.Reason = metav1.StatusReasonConflict
	case http.StatusGone:
		status.Reason = metav1.StatusReasonGone
	case http.StatusBadRequest:
		status.Reason = metav1.StatusReasonBadRequest
	case http.StatusUnprocessableEntity:
		status.Reason = metav1.StatusReasonInvalid
	case http.StatusRequestEntityTooLarge:
		status.Reason = metav1.StatusReasonRequestEntityTooLarge
	case http.StatusLengthRequired, http.StatusInsufficientStorage:
		status.Reason = metav1.StatusReasonUnknown
	case http.StatusTooManyRequests:
		status.Reason = metav1.StatusReasonTooManyRequests
		status.Details.RetryAfterSeconds = 1
	case http.StatusServiceUnavailable:
		status.Reason = metav1.StatusReasonServiceUnavailable
		status.Details.RetryAfterSeconds = 1
	default:
		return apierrors.NewInternalError(r)
	}
	return &apierrors.StatusError{ErrStatus: status}
}

// notReady refuses what needs a complete checkpoint.
func notReady(c *checkpointv1alpha1.PodCheckpoint) error {
	why := "nobody has taken it up yet"
	if ready := c.ReadyCondition(); ready != nil {
		why = ready.Reason + ": " + ready.Message
	}
	return apierrors.NewConflict(podCheckpoints, c.Name, fmt.Errorf("it is not Ready: %s", why))
}
