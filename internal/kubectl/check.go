package kubectl

import (
	"context"
	"fmt"
	"net/http"
	"path"
	"time"

	"github.com/spf13/cobra"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// checkOptions is the command line of "kubectl checkpoint check".
type checkOptions struct {
	*environment
	installed string // the namespace that Stasis is in

	// Of a Pod.
	containers []string
	pairs      []string
	options    map[string]string
}

func newCheckCommand(env *environment) *cobra.Command {
	o := &checkOptions{environment: env}
	cmd := &cobra.Command{
		Use:   "check [POD] [-c CONTAINER]... [--option KEY=VALUE]...",
		Short: "Look whether checkpoints can be taken: here, or of a Pod",
		Long: `Without a Pod: look whether the cluster serves Stasis' APIs, which nodes have an agent,
and what you may do in the namespace. What you may not look at is said to be unknown.

With a Pod: look, on its node, at what a checkpoint of it would be refused for, what
would not come back as it was, how large it would be and for how long the Pod would
stand still. Nothing is frozen. It needs the verb "create" on "pods/checkpoint".

Exit codes:
  0    checkpoints can be taken; one of the Pod can
  1    something is missing that they need; the Pod cannot be checkpointed as it is
  2    wrong command line, nothing was sent`,
		Example: `  # In the namespace of the kubeconfig
  kubectl checkpoint check

  # Would a checkpoint of Pod web succeed, and what would it cost?
  kubectl checkpoint check web`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("one Pod can be named, got %d arguments", len(args))
			}
			if len(args) == 0 && len(o.containers)+len(o.pairs) > 0 {
				return usagef("--container and --option are of a Pod: name one")
			}
			return nil
		},
		ValidArgsFunction: env.completePods(),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			pod := ""
			if len(args) > 0 {
				if pod, err = resourceName(args[0], podTypes()); err != nil {
					return err
				}
				if o.options, err = parseOptions(o.pairs); err != nil {
					return err
				}
			}
			if err := o.connect(); err != nil {
				return err
			}
			if pod != "" {
				return o.checkPod(cmd.Context(), pod)
			}
			return o.run(cmd.Context())
		},
	}
	cmd.Flags().StringArrayVarP(&o.containers, "container", "c", nil, "Container of the Pod to look at, instead of all. May be repeated.")
	cmd.Flags().StringArrayVar(&o.pairs, "option", nil, "Option for the engine, as KEY=VALUE. May be repeated.")
	completeFlag(cmd, "container", env.completePodContainers())
	cmd.Flags().StringVar(&o.installed, "stasis-namespace", "stasis-system", "Namespace that Stasis is installed in.")
	return cmd
}

func (o *checkOptions) run(ctx context.Context) error {
	missing := false
	var rows [][]string
	for _, api := range []struct {
		version schema.GroupVersion
		what    string
		needed  bool
	}{
		{checkpointv1alpha1.GroupVersion, "PodCheckpoints", true},
		{subresourcesv1alpha1.SchemeGroupVersion, "calls: pods/checkpoint, archives, contents", false},
	} {
		state, err := o.served(ctx, api.version)
		if err != nil {
			return err
		}
		rows = append(rows, []string{api.version.String(), state, api.what})
		missing = missing || api.needed && state != "served"
	}
	if err := section(o.Out, "APIs", rows); err != nil {
		return err
	}
	if missing {
		fmt.Fprintln(o.Out, "Stasis is not installed: kubectl apply -k config/install")
		return silently(ExitFailed)
	}
	agents, err := o.agents(ctx)
	if err != nil {
		return err
	}
	if err := section(o.Out, "Nodes", agents); err != nil {
		return err
	}
	rights, able, err := o.rights(ctx)
	if err != nil {
		return err
	}
	if err := section(o.Out, "You may, in namespace "+o.namespace, rights); err != nil {
		return err
	}
	if !able {
		return silently(ExitFailed)
	}
	return nil
}

// served says how the server answers for a version of an API.
func (o *checkOptions) served(ctx context.Context, version schema.GroupVersion) (string, error) {
	at := *o.calls.base
	at.Path = path.Join("/", at.Path, "apis", version.Group, version.Version)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return "", err
	}
	resp, err := o.calls.http.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		return "served", nil
	case http.StatusNotFound:
		return "not there", nil
	}
	return "does not answer: " + resp.Status, nil
}

// agents says of each node how its agent is.
func (o *checkOptions) agents(ctx context.Context) ([][]string, error) {
	var leases coordinationv1.LeaseList
	err := o.client.List(ctx, &leases, client.InNamespace(o.installed), client.Limit(completionMost))
	if apierrors.IsForbidden(err) {
		return [][]string{{"unknown: you may not list leases in namespace " + o.installed}}, nil
	} else if err != nil {
		return nil, err
	}
	agents := map[string]string{}
	for i := range leases.Items {
		announced, err := agentapi.Read(&leases.Items[i])
		if err == nil {
			agents[announced.Node] = agentState(announced, o.now())
		}
	}
	var rows [][]string
	var nodes corev1.NodeList
	if err := o.client.List(ctx, &nodes, client.Limit(completionMost)); err == nil {
		for i := range nodes.Items {
			name := nodes.Items[i].Name
			rows = append(rows, []string{name, or(agents[name], "no agent: its Pods cannot be checkpointed")})
			delete(agents, name)
		}
	}
	for node, state := range agents {
		rows = append(rows, []string{node, state})
	}
	if len(rows) == 0 {
		rows = [][]string{{"none has an agent"}}
	}
	return rows, nil
}

func agentState(a agentapi.Announcement, now time.Time) string {
	silent := now.Sub(a.Renewed)
	switch {
	case silent > a.Duration:
		return fmt.Sprintf("agent %s has been silent for %s", clean(a.Program), silent.Round(time.Second))
	case a.Protocol < agentapi.VersionCalls:
		return fmt.Sprintf("agent %s is too old: it speaks version %d, %d is needed", clean(a.Program), a.Protocol, agentapi.VersionCalls)
	}
	return "agent " + clean(a.Program)
}

// rights says what the user may do. able: take a checkpoint, one way or the other.
func (o *checkOptions) rights(ctx context.Context) (rows [][]string, able bool, err error) {
	group, calls := checkpointv1alpha1.GroupName, subresourcesv1alpha1.GroupName
	for _, right := range []struct {
		what, verb, group, resource, sub string
		able                             bool
	}{
		{"take checkpoints", "create", calls, "pods", "checkpoint", true},
		{"create PodCheckpoints", "create", group, "podcheckpoints", "", true},
		{"read PodCheckpoints", "get", group, "podcheckpoints", "", false},
		{"restore", checkpointv1alpha1.VerbRestore, group, "podcheckpoints", "", false},
		{"see what is inside", "get", calls, "podcheckpoints", "contents", false},
		{"download", "get", calls, "podcheckpoints", "archive", false},
		{"import", "import", group, "podcheckpoints", "", false},
		{"delete", "delete", group, "podcheckpoints", "", false},
	} {
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Namespace: o.namespace, Verb: right.verb, Group: right.group, Resource: right.resource, Subresource: right.sub,
			},
		}}
		if err := o.client.Create(ctx, review); err != nil {
			return nil, false, err
		}
		answer := "no"
		if review.Status.Allowed {
			answer = "yes"
			able = able || right.able
		}
		rows = append(rows, []string{right.what, answer})
	}
	return rows, able, nil
}
