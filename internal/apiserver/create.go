package apiserver

import (
	"errors"
	"fmt"
	"io"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternalversionscheme "k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/warning"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
)

const (
	// maxRequest bounds what is read of a request for a checkpoint.
	maxRequest = 256 << 10
	// auditPodCheckpoint is the annotation of an audit event that names what was created.
	auditPodCheckpoint = "subresources.checkpoint.podstasis.dev/podcheckpoint"
)

// creation answers POST of pods/checkpoint, and of podcheckpointrequests, which is
// the same with the Pod's name in the body, so that "kubectl create -f" does it.
//
// It stands before the generic handlers because those give every creation 34 s. What
// they do for a creation, it does too. It stands behind the filters: whoever comes
// here is authenticated, authorised, in the audit log, and in a queue of its own.
type creation struct {
	taker      *taker
	nodes      preflighter
	authorizer authorizer.Authorizer
	codecs     serializer.CodecFactory
}

// before returns a handler that answers creations and leaves all else to next.
func (c *creation) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := request.RequestInfoFrom(r.Context())
		if !ok || !info.IsResourceRequest || info.Verb != "create" || r.Method != http.MethodPost || info.APIGroup != subresources.GroupName ||
			info.APIVersion != subresources.SchemeGroupVersion.Version || info.Namespace == "" {
			next.ServeHTTP(w, r)
			return
		}
		switch {
		case info.Resource == "pods" && info.Subresource == "checkpoint" && info.Name != "" && len(info.Parts) == 3,
			info.Resource == resourceRequests && info.Subresource == "" && info.Name == "":
			c.answer(w, r, info)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func (c *creation) answer(w http.ResponseWriter, r *http.Request, info *request.RequestInfo) {
	answer, err := c.create(w, r, info)
	if err != nil {
		if r.Context().Err() != nil {
			return // nobody reads it
		}
		responsewriters.ErrorNegotiated(err, c.codecs, subresources.SchemeGroupVersion, w, r)
		return
	}
	responsewriters.WriteObjectNegotiated(c.codecs, negotiation.DefaultEndpointRestrictions, subresources.SchemeGroupVersion, w, r, http.StatusCreated, answer, false)
}

func (c *creation) create(w http.ResponseWriter, r *http.Request, info *request.RequestInfo) (*subresources.PodCheckpointRequest, error) {
	ctx := r.Context()
	if _, _, err := negotiation.NegotiateOutputMediaType(r, c.codecs, negotiation.DefaultEndpointRestrictions); err != nil {
		return nil, err
	}
	var options metav1.CreateOptions
	if err := metainternalversionscheme.ParameterCodec.DecodeParameters(r.URL.Query(), metav1.SchemeGroupVersion, &options); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if errs := metav1validation.ValidateCreateOptions(&options); len(errs) > 0 {
		return nil, apierrors.NewInvalid(metav1.SchemeGroupVersion.WithKind("CreateOptions").GroupKind(), "", errs)
	}
	posted, err := c.read(w, r, info, options.FieldValidation)
	if err != nil {
		return nil, err
	}
	pod, err := c.podOf(info, posted)
	if err != nil {
		return nil, err
	}
	if errs := validate(posted); len(errs) > 0 {
		return nil, apierrors.NewInvalid(subresources.SchemeGroupVersion.WithKind("PodCheckpointRequest").GroupKind(), pod, errs)
	}
	user, ok := request.UserFrom(ctx)
	if !ok {
		return nil, apierrors.NewInternalError(errors.New("a request without a user came through"))
	}
	if info.Subresource == "" {
		if err := c.authorize(r, info, pod); err != nil {
			return nil, err
		}
	}
	checkpoint, err := c.taker.take(ctx, wanted{namespace: info.Namespace, pod: pod, user: user.GetName(), spec: posted.Spec, dryRun: len(options.DryRun) > 0})
	if err != nil {
		return nil, err
	}
	audit.AddAuditAnnotation(ctx, auditPodCheckpoint, checkpoint.Namespace+"/"+checkpoint.Name)
	answer := report(posted, checkpoint)
	if len(options.DryRun) > 0 {
		answer.Status.Preflight = c.preflight(ctx, checkpoint)
	}
	return answer, nil
}

// read reads what was posted. No body is a request with nothing special.
func (c *creation) read(w http.ResponseWriter, r *http.Request, info *request.RequestInfo, strictness string) (*subresources.PodCheckpointRequest, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("a PodCheckpointRequest has at most %d bytes", maxRequest))
	}
	if err != nil {
		return nil, apierrors.NewBadRequest("the request's body could not be read: " + err.Error())
	}
	posted := &subresources.PodCheckpointRequest{}
	gvk := subresources.SchemeGroupVersion.WithKind("PodCheckpointRequest")
	if len(body) > 0 {
		info, err := negotiation.NegotiateInputSerializer(r, false, c.codecs)
		if err != nil {
			return nil, err
		}
		from := info.Serializer
		if strictness != metav1.FieldValidationIgnore {
			from = info.StrictSerializer
		}
		object, found, err := c.codecs.DecoderToVersion(from, subresources.SchemeGroupVersion).Decode(body, &gvk, posted)
		if strict, is := runtime.AsStrictDecodingError(err); is && object != nil && strictness != metav1.FieldValidationStrict {
			for _, e := range strict.Errors() {
				warning.AddWarning(r.Context(), "", e.Error())
			}
		} else if err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		var right bool
		if posted, right = object.(*subresources.PodCheckpointRequest); !right {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("a PodCheckpointRequest is expected here, and not a %s", found.Kind))
		}
	}
	posted.SetGroupVersionKind(gvk)
	audit.LogRequestObject(r.Context(), posted, subresources.SchemeGroupVersion,
		subresources.SchemeGroupVersion.WithResource(info.Resource), info.Subresource, c.codecs)
	return posted, nil
}

// podOf names the Pod: by the path, or by the body where the path does not.
func (c *creation) podOf(info *request.RequestInfo, posted *subresources.PodCheckpointRequest) (string, error) {
	if posted.Namespace != "" && posted.Namespace != info.Namespace {
		return "", apierrors.NewBadRequest(fmt.Sprintf("metadata.namespace is %q, and the request is for namespace %q", posted.Namespace, info.Namespace))
	}
	if posted.Name != "" && info.Name != "" && posted.Name != info.Name {
		return "", apierrors.NewBadRequest(fmt.Sprintf("metadata.name is %q, and the request is for Pod %q", posted.Name, info.Name))
	}
	name := info.Name
	if name == "" {
		name = posted.Name
	}
	if name == "" {
		return "", apierrors.NewBadRequest("metadata.name is needed: the Pod's")
	}
	if errs := validation.IsDNS1123Subdomain(name); len(errs) > 0 {
		return "", apierrors.NewBadRequest(fmt.Sprintf("%.253q is no Pod's name: %s", name, errs[0]))
	}
	posted.Namespace, posted.Name = info.Namespace, name
	return name, nil
}

// authorize asks for the one right that a checkpoint takes, where the path of the
// request did not say which Pod it is for.
func (c *creation) authorize(r *http.Request, info *request.RequestInfo, pod string) error {
	user, _ := request.UserFrom(r.Context())
	decision, why, err := c.authorizer.Authorize(r.Context(), authorizer.AttributesRecord{
		User: user, Verb: "create", Namespace: info.Namespace, APIGroup: subresources.GroupName, APIVersion: info.APIVersion,
		Resource: "pods", Subresource: "checkpoint", Name: pod, ResourceRequest: true, Path: r.URL.Path,
	})
	if decision == authorizer.DecisionAllow {
		return nil
	}
	if err != nil {
		return apierrors.NewInternalError(fmt.Errorf("ask whether %q may create %s: %w", user.GetName(), subresources.ResourceCheckpoint, err))
	}
	return apierrors.NewForbidden(subresources.SchemeGroupVersion.WithResource(subresources.ResourceCheckpoint).GroupResource(), pod,
		fmt.Errorf("user %q may not create %s of this Pod in namespace %q: %s", user.GetName(), subresources.ResourceCheckpoint, info.Namespace, why))
}

// validate checks what the PodCheckpoint's own validation would not, or not say in
// the words of this object.
func validate(posted *subresources.PodCheckpointRequest) field.ErrorList {
	var errs field.ErrorList
	spec := field.NewPath("spec")
	if name := posted.Spec.CheckpointName; name != "" {
		for _, message := range validation.IsDNS1123Subdomain(name) {
			errs = append(errs, field.Invalid(spec.Child("checkpointName"), name, message))
		}
	}
	if wait := posted.Spec.WaitSeconds; wait != nil && (*wait < 0 || *wait > subresources.MaxWaitSeconds) {
		errs = append(errs, field.Invalid(spec.Child("waitSeconds"), *wait, fmt.Sprintf("must be between 0 and %d", subresources.MaxWaitSeconds)))
	}
	return errs
}
