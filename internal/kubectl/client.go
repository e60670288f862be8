package kubectl

import (
	"fmt"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	authorizationv1 "k8s.io/api/authorization/v1"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// newScheme knows the types that the commands read and write.
func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, coordinationv1.AddToScheme, authorizationv1.AddToScheme,
		checkpointv1alpha1.AddToScheme, subresourcesv1alpha1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err) // the types are compiled in: this cannot depend on input
		}
	}
	return scheme
}

// newMapper maps those types to resources without asking the server, which
// saves a command that makes three calls another dozen.
func newMapper() meta.RESTMapper {
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{corev1.SchemeGroupVersion, checkpointv1alpha1.GroupVersion})
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Pod"), meta.RESTScopeNamespace)
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Event"), meta.RESTScopeNamespace)
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Node"), meta.RESTScopeRoot)
	mapper.Add(coordinationv1.SchemeGroupVersion.WithKind("Lease"), meta.RESTScopeNamespace)
	mapper.Add(authorizationv1.SchemeGroupVersion.WithKind("SelfSubjectAccessReview"), meta.RESTScopeRoot)
	mapper.Add(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"), meta.RESTScopeNamespace)
	mapper.Add(checkpointv1alpha1.GroupVersion.WithKind("CheckpointStore"), meta.RESTScopeRoot)
	return mapper
}

// explain turns the error that a cluster without the API gives into one that
// says so; others pass unchanged.
func explain(err error) error {
	// The 404 of a missing object is an answer of the API; that of a missing API
	// is not, and client-go says so in the causes.
	if apierrors.IsNotFound(err) && apierrors.HasStatusCause(err, metav1.CauseTypeUnexpectedServerResponse) {
		return fmt.Errorf("this cluster does not serve %s: install Stasis first (kubectl apply -k config/install): %w",
			checkpointv1alpha1.GroupVersion, err)
	}
	return err
}

func readyCondition(checkpoint *checkpointv1alpha1.PodCheckpoint) metav1.Condition {
	if condition := checkpoint.ReadyCondition(); condition != nil {
		return *condition
	}
	return metav1.Condition{Status: metav1.ConditionFalse, Reason: checkpointv1alpha1.ReasonPending}
}

// ended says whether a checkpoint has reached a terminal state, and the error to
// report if that is not Ready.
func ended(checkpoint *checkpointv1alpha1.PodCheckpoint) (bool, error) {
	return endedBy(checkpoint.Name, readyCondition(checkpoint))
}

func endedBy(name string, condition metav1.Condition) (bool, error) {
	switch {
	case condition.Status == metav1.ConditionTrue:
		return true, nil
	case condition.Reason == checkpointv1alpha1.ReasonCheckpointFailed, condition.Reason == checkpointv1alpha1.ReasonSourcePodReplaced:
		return true, fmt.Errorf("podcheckpoint %s is not usable: %s: %s", name, condition.Reason, clean(condition.Message))
	}
	return false, nil
}
