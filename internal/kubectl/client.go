package kubectl

import (
	"fmt"
	"strings"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// newScheme knows the types that the commands read and write.
func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, checkpointv1alpha1.AddToScheme} {
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
	mapper.Add(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"), meta.RESTScopeNamespace)
	return mapper
}

// connect makes a client from kubectl's flags and says which namespace they mean.
func connect(flags *genericclioptions.ConfigFlags) (client.WithWatch, string, error) {
	loader := flags.ToRawKubeConfigLoader()
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, "", fmt.Errorf("reading the namespace from the kubeconfig: %w", err)
	}
	config, err := flags.ToRESTConfig()
	if err != nil {
		return nil, "", fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config.WarningHandler = nil   // the server's warnings go to standard error
	log.SetLogger(logr.Discard()) // else controller-runtime complains, with a stack, when a wait gets long
	c, err := client.NewWithWatch(config, client.Options{Scheme: newScheme(), Mapper: newMapper()})
	if err != nil {
		return nil, "", fmt.Errorf("making a client for %s: %w", config.Host, err)
	}
	return c, namespace, nil
}

// explain turns the error that a cluster without the API gives into one that
// says so; others pass unchanged.
func explain(err error) error {
	// The 404 of a missing object is an answer of the API; that of a missing API
	// is not, and client-go says so in the causes.
	if apierrors.IsNotFound(err) && apierrors.HasStatusCause(err, metav1.CauseTypeUnexpectedServerResponse) {
		return fmt.Errorf("this cluster does not serve %s: install Stasis first (kubectl apply -k config/default): %w",
			checkpointv1alpha1.GroupVersion, err)
	}
	return err
}

// dryRun is the value of --dry-run.
type dryRun string

const (
	dryRunNone   dryRun = "none"
	dryRunClient dryRun = "client"
	dryRunServer dryRun = "server"
)

func parseDryRun(value string) (dryRun, error) {
	switch d := dryRun(value); d {
	case dryRunNone, dryRunClient, dryRunServer:
		return d, nil
	}
	return "", usagef(`invalid dry-run value %q: must be "none", "server" or "client"`, value)
}

// suffix is what kubectl appends to "created".
func (d dryRun) suffix() string {
	switch d {
	case dryRunClient:
		return " (dry run)"
	case dryRunServer:
		return " (server dry run)"
	}
	return ""
}

func (d dryRun) createOptions() []client.CreateOption {
	options := []client.CreateOption{client.FieldOwner("kubectl-stasis")}
	if d == dryRunServer {
		options = append(options, client.DryRunAll)
	}
	return options
}

// resourceName takes NAME, or TYPE/NAME where TYPE is one of types.
func resourceName(arg string, types ...string) (string, error) {
	kind, name, found := strings.Cut(arg, "/")
	if !found {
		kind, name = types[0], arg
	}
	if name == "" || strings.Contains(name, "/") {
		return "", usagef("%q is not a name of a %s", arg, types[0])
	}
	for _, known := range types {
		if strings.EqualFold(kind, known) {
			return name, nil
		}
	}
	return "", usagef("%q is a %s: this command takes the name of a %s", arg, kind, types[0])
}

func readyCondition(checkpoint *checkpointv1alpha1.PodCheckpoint) metav1.Condition {
	if condition := meta.FindStatusCondition(checkpoint.Status.Conditions, checkpointv1alpha1.PodCheckpointReady); condition != nil {
		return *condition
	}
	return metav1.Condition{Status: metav1.ConditionFalse, Reason: checkpointv1alpha1.ReasonPending}
}

// ended says whether a checkpoint has reached a terminal state, and the error to
// report if that is not Ready.
func ended(checkpoint *checkpointv1alpha1.PodCheckpoint) (bool, error) {
	condition := readyCondition(checkpoint)
	switch {
	case condition.Status == metav1.ConditionTrue:
		return true, nil
	case condition.Reason == checkpointv1alpha1.ReasonCheckpointFailed, condition.Reason == checkpointv1alpha1.ReasonSourcePodReplaced:
		return true, fmt.Errorf("podcheckpoint %s is not usable: %s: %s", checkpoint.Name, condition.Reason, condition.Message)
	}
	return false, nil
}
