package control

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// verbs are the letters of the table below, in the order in which they stand there.
var verbs = []struct {
	letter byte
	verb   string
}{
	{'g', "get"}, {'l', "list"}, {'w', "watch"}, {'c', "create"}, {'u', "update"},
	{'p', "patch"}, {'d', "delete"}, {'D', "deletecollection"}, {'R', "restore"}, {'I', "import"},
}

// rights says what roles grant, by resource: every verb of every subject is
// either in its cell, or refused. The columns of viewer to admin are of users who
// have that one role in the namespace, store-adm has it in the cluster; an agent has the same rights on each node,
// which the admission policies then narrow to its own: see requests.
//
// "name @place" is a resource in another place than the users' namespace: a
// namespace, or * for all of them or the cluster. "=name" is one object.
const rights = `
resource                                                    viewer     editor     restorer   forensics  importer   admin      store-adm  agent      controller edit-only  anonymous

podcheckpoints.checkpoint.podstasis.dev                     glw....... glwcupdD.. glw.....R. glw....... glwc.....I glwcupdDRI .......... glw.up.... glwc.pd... .......... ..........
podcheckpoints.checkpoint.podstasis.dev @*                  .......... .......... .......... .......... .......... .......... .......... glw.up.... glwc.pd... .......... ..........
podcheckpoints.checkpoint.podstasis.dev @default            .......... .......... .......... .......... .......... .......... .......... glw.up.... glwc.pd... .......... ..........
podcheckpoints/status.checkpoint.podstasis.dev              glw....... g......... .......... .......... .......... g......... .......... ....up.... ....up.... .......... ..........
podcheckpoints/finalizers.checkpoint.podstasis.dev          .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
podcheckpoints/archive.checkpoint.podstasis.dev             .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/checkpoint.subresources.checkpoint.podstasis.dev       .......... ...c...... .......... .......... .......... ...c...... .......... .......... .......... .......... ..........
podcheckpoints.subresources.checkpoint.podstasis.dev        .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
podcheckpoints/contents.subresources.checkpoint.podstasis.dev g......... g......... .......... g......... .......... g......... .......... .......... .......... .......... ..........
podcheckpoints/archive.subresources.checkpoint.podstasis.dev .......... .......... .......... g......... ....u..... g...u..... .......... .......... .......... .......... ..........
podcheckpoints/verify.subresources.checkpoint.podstasis.dev .......... ...c...... .......... .......... .......... ...c...... .......... .......... .......... .......... ..........
podcheckpointrequests.subresources.checkpoint.podstasis.dev .......... ...c...... .......... .......... .......... ...c...... .......... .......... .......... .......... ..........

checkpointstores.checkpoint.podstasis.dev @*                .......... .......... .......... .......... .......... .......... glwcupdD.. g......... glw....... .......... ..........
checkpointstores/status.checkpoint.podstasis.dev @*         .......... .......... .......... .......... .......... .......... g......... .......... ....up.... .......... ..........
checkpointstores/verify.subresources.checkpoint.podstasis.dev @* .......... .......... .......... .......... .......... .......... ...c...... .......... .......... .......... ..........
checkpointstores/collect.subresources.checkpoint.podstasis.dev @* .......... .......... .......... .......... .......... .......... ...c...... .......... .......... .......... ..........

pods                                                        .......... .......... .......... .......... .......... .......... .......... g......... glw..p.... glwcupdD.. ..........
pods @*                                                     .......... .......... .......... .......... .......... .......... .......... g......... glw..p.... .......... ..........
pods/status                                                 .......... .......... .......... .......... .......... .......... .......... ....up.... .......... .......... ..........
pods/binding                                                .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/eviction                                               .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/ephemeralcontainers                                    .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/resize                                                 .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/exec                                                   .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/attach                                                 .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/portforward                                            .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/proxy                                                  .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/log                                                    .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
pods/checkpoint                                             .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
persistentvolumeclaims                                      .......... .......... .......... .......... .......... .......... .......... g......... .......... .......... ..........
persistentvolumeclaims @*                                   .......... .......... .......... .......... .......... .......... .......... g......... .......... .......... ..........

secrets                                                     .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
secrets @*                                                  .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
secrets @stasis-system                                      .......... .......... .......... .......... .......... .......... .......... g......... g..c...... .......... ..........
secrets=stasis-webhook-cert @stasis-system                  .......... .......... .......... .......... .......... .......... .......... g......... g..cu..... .......... ..........
configmaps                                                  .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
configmaps=extension-apiserver-authentication @kube-system  .......... .......... .......... .......... .......... .......... .......... .......... glw....... .......... ..........
serviceaccounts                                             .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
serviceaccounts/token                                       .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
serviceaccounts/token @stasis-system                        .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
serviceaccounts/token=stasis-agent @stasis-system           .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
serviceaccounts/token=stasis-controller @stasis-system      .......... .......... .......... .......... .......... .......... .......... .......... ...c...... .......... ..........
events                                                      .......... .......... .......... .......... .......... .......... .......... ...c.p.... ...c.p.... .......... ..........
events.events.k8s.io                                        .......... .......... .......... .......... .......... .......... .......... ...c.p.... ...c.p.... .......... ..........
leases.coordination.k8s.io                                  .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
leases.coordination.k8s.io @stasis-system                   .......... .......... .......... .......... .......... .......... .......... g..cu..... gl.c...... .......... ..........
leases=stasis-controller.coordination.k8s.io @stasis-system .......... .......... .......... .......... .......... .......... .......... g..cu..... gl.cu..... .......... ..........

nodes @*                                                    .......... .......... .......... .......... .......... .......... .......... .......... glw..p.... .......... ..........
nodes/status @*                                             .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
nodes/proxy @*                                              .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
nodes/pods @*                                               .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
nodes/checkpoint @*                                         .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........

subjectaccessreviews.authorization.k8s.io @*                .......... .......... .......... .......... .......... .......... .......... .......... ...c...... .......... ..........
tokenreviews.authentication.k8s.io @*                       .......... .......... .......... .......... .......... .......... .......... ...c...... ...c...... .......... ..........
namespaces @*                                               .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
namespaces=stasis-system @*                                 .......... .......... .......... .......... .......... .......... .......... .......... g......... .......... ..........
namespaces=kube-system @*                                   .......... .......... .......... .......... .......... .......... .......... g......... g......... .......... ..........
flowschemas.flowcontrol.apiserver.k8s.io @*                 .......... .......... .......... .......... .......... .......... .......... .......... glw....... .......... ..........
apiservices.apiregistration.k8s.io @*                       .......... .......... .......... .......... .......... .......... .......... .......... ...c...... .......... ..........
mutatingwebhookconfigurations.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
mutatingwebhookconfigurations=stasis-admission.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... g...u..... .......... ..........
validatingwebhookconfigurations.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
validatingwebhookconfigurations=stasis-admission.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... g...u..... .......... ..........
validatingadmissionpolicies.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
validatingadmissionpolicybindings.admissionregistration.k8s.io @* .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
customresourcedefinitions.apiextensions.k8s.io @*           .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
runtimeclasses.node.k8s.io @*                               .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
clusterroles.rbac.authorization.k8s.io @*                   .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
clusterrolebindings.rbac.authorization.k8s.io @*            .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
roles.rbac.authorization.k8s.io                             .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
rolebindings.rbac.authorization.k8s.io                      .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
daemonsets.apps @stasis-system                              .......... .......... .......... .......... .......... .......... .......... .......... .......... .......... ..........
`

func TestEveryVerbOfEverySubjectIsAsTheTableOfRightsSays(t *testing.T) {
	ns := namespace(t)
	const editOnly = "edit-only"
	must(t, client.IgnoreAlreadyExists(shared.client.Create(t.Context(), &rbacv1.ClusterRole{
		// What "edit" has of Pods; kube-controller-manager, which fills that in, is not here.
		ObjectMeta: metav1.ObjectMeta{Name: "test-" + editOnly},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"},
			Verbs: []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}}},
	})))
	serviceAccount := func(name string) authorizationv1.SubjectAccessReviewSpec {
		return authorizationv1.SubjectAccessReviewSpec{User: "system:serviceaccount:stasis-system:stasis-" + name,
			Groups: []string{"system:serviceaccounts", "system:serviceaccounts:stasis-system", "system:authenticated"}}
	}
	subjects := map[string]authorizationv1.SubjectAccessReviewSpec{
		"agent": serviceAccount("agent"), "controller": serviceAccount("controller"),
		"anonymous": {User: "system:anonymous", Groups: []string{"system:unauthenticated"}},
	}
	for name, role := range map[string]string{"viewer": "stasis-viewer", "editor": "stasis-editor", "restorer": "stasis-restorer",
		"forensics": "stasis-forensics", "importer": "stasis-importer", "admin": "stasis-admin", editOnly: "test-" + editOnly} {
		subjects[name] = authorizationv1.SubjectAccessReviewSpec{User: "only-" + name, Groups: []string{"system:authenticated"}}
		bind(t, ns, "ClusterRole", role, rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "only-" + name})
	}

	subjects["store-adm"] = authorizationv1.SubjectAccessReviewSpec{User: "only-store-adm", Groups: []string{"system:authenticated"}}
	bind(t, "", "ClusterRole", "stasis-store-admin", rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "only-store-adm"})

	lines := strings.Split(strings.TrimSpace(rights), "\n")
	columns := strings.Fields(lines[0])[1:]
	var all sync.WaitGroup
	limit := make(chan struct{}, 16)
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		what, cells := attributes(ns, fields)
		if len(cells) != len(columns) {
			t.Fatalf("%d cells, want %d: %s", len(cells), len(columns), line)
		}
		for i, column := range columns {
			all.Go(func() {
				limit <- struct{}{}
				defer func() { <-limit }()
				got, err := may(t.Context(), subjects[column], what)
				if err != nil {
					t.Errorf("%s, %s: %v", fields[0], column, err)
				} else if got != cells[i] {
					t.Errorf("%s in %q: %s may %s, the table says %s", fields[0], what.Namespace, column, got, cells[i])
				}
			})
		}
	}
	all.Wait()
}

// attributes reads the first fields of a line of rights, and returns its cells.
func attributes(ns string, fields []string) (authorizationv1.ResourceAttributes, []string) {
	a := authorizationv1.ResourceAttributes{Namespace: ns}
	resource, group, _ := strings.Cut(fields[0], ".")
	a.Group = group
	a.Resource, a.Name, _ = strings.Cut(resource, "=")
	a.Resource, a.Subresource, _ = strings.Cut(a.Resource, "/")
	cells := fields[1:]
	if place, elsewhere := strings.CutPrefix(cells[0], "@"); elsewhere {
		a.Namespace, cells = strings.ReplaceAll(place, "*", ""), cells[1:]
	}
	return a, cells
}

// may asks for every verb and writes the answer as a cell.
func may(ctx context.Context, subject authorizationv1.SubjectAccessReviewSpec, what authorizationv1.ResourceAttributes) (string, error) {
	cell := make([]byte, len(verbs))
	for i, v := range verbs {
		review := &authorizationv1.SubjectAccessReview{Spec: subject}
		attributes := what
		attributes.Verb = v.verb
		review.Spec.ResourceAttributes = &attributes
		if err := shared.client.Create(ctx, review); err != nil {
			return "", err
		}
		cell[i] = '.'
		if review.Status.Allowed {
			cell[i] = v.letter
		}
	}
	return string(cell), nil
}

// requests says what comes of requests about objects of node A once the admission
// policies have had their say. The users may do anything with Pods of the
// namespace, and have one role of Stasis' besides. All are tried as a dry run, so
// that each finds the same objects.
const requests = `
request                                    viewer editor restorer admin agent-A agent-B agent-unbound controller anonymous cluster-admin

read a checkpoint                          yes    yes    yes      yes   yes     yes     yes           yes        no        yes
list the checkpoints of all namespaces     no     no     no       no    yes     yes     yes           yes        no        yes
create a checkpoint                        no     yes    no       yes   no      no      no            yes        no        yes
create a checkpoint in another namespace   no     no     no       no    no      no      no            yes        no        yes
label a checkpoint                         no     yes    no       yes   no      no      no            yes        no        yes
take the finalizer off a checkpoint        no     yes    no       yes   yes     no      no            yes        no        yes
say that a checkpoint is in progress       no     no     no       no    yes     no      no            yes        no        no
say that a checkpoint is Ready             no     no     no       no    yes     no      no            no         no        no
say that another node holds its data       no     no     no       no    no      no      no            yes        no        no
change the template of a Ready checkpoint  no     no     no       no    no      no      no            no         no        no
delete a checkpoint                        no     yes    no       yes   no      no      no            no         no        yes
create a Pod that restores it              no     no     yes      yes   no      no      no            no         no        yes
create a Pod that restores it elsewhere    no     no     no       no    no      no      no            no         no        no
annotate a Pod to be restored              no     no     no       no    no      no      no            no         no        no
read a Pod                                 yes    yes    yes      yes   yes     yes     yes           yes        no        yes
list the Pods of the namespace             yes    yes    yes      yes   no      no      no            yes        no        yes
label a Pod                                yes    yes    yes      yes   no      no      no            no         no        yes
write the status of a Pod                  yes    yes    yes      yes   yes     no      no            no         no        yes
delete a Pod                               yes    yes    yes      yes   no      no      no            no         no        yes
read a Secret                              no     no     no       no    no      no      no            no         no        yes
list the Secrets of the namespace          no     no     no       no    no      no      no            no         no        yes
read a Secret of Stasis' namespace         no     no     no       no    yes     yes     yes           yes        no        yes
list the Secrets of Stasis' namespace      no     no     no       no    no      no      no            no         no        yes
`

func TestWhatComesOfRequestsIsAsTheTableOfRequestsSays(t *testing.T) {
	ns := namespace(t)
	on, agentA := node(t)
	_, agentB := node(t)
	pod := source(t, ns, on)
	held := checkpoint(t, ns, "held", pod.Name)
	patched := held.DeepCopy()
	patched.Finalizers = []string{checkpointv1alpha1.FinalizerData}
	must(t, agentA.Patch(t.Context(), patched, client.MergeFrom(held)))
	finished := checkpoint(t, ns, "c", pod.Name)
	complete(t, agentA, finished, pod)
	must(t, shared.client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "held"}, held))
	must(t, shared.client.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "secret"}}))
	must(t, client.IgnoreAlreadyExists(shared.client.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: "of-a-store"}})))
	elsewhere := namespace(t)

	tokens, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	unbound := func(name string) client.Client {
		token, err := tokens.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), name, tokenRequest(), metav1.CreateOptions{})
		must(t, err)
		return withToken(t, token.Status.Token)
	}
	anonymous := rest.AnonymousClientConfig(shared.admin)
	nobody, err := client.New(anonymous, client.Options{Scheme: scheme, Mapper: shared.client.RESTMapper()})
	must(t, err)
	subjects := map[string]client.Client{
		"viewer": user(t, ns, "v", "stasis-viewer"), "editor": user(t, ns, "e", "stasis-editor"),
		"restorer": user(t, ns, "r", "stasis-restorer"), "admin": user(t, ns, "a", "stasis-admin"),
		"agent-A": agentA, "agent-B": agentB, "agent-unbound": unbound("stasis-agent"), "controller": unbound("stasis-controller"),
		"anonymous": nobody, "cluster-admin": shared.client,
	}

	dry := client.DryRunAll
	patch := func(c client.Client, object client.Object, content string) error {
		return c.Patch(t.Context(), object, client.RawPatch(types.MergePatchType, []byte(content)), dry)
	}
	status := func(c client.Client, of *checkpointv1alpha1.PodCheckpoint, change func(*checkpointv1alpha1.PodCheckpointStatus)) error {
		changed := of.DeepCopy()
		change(&changed.Status)
		return c.Status().Update(t.Context(), changed, &client.SubResourceUpdateOptions{UpdateOptions: client.UpdateOptions{DryRun: []string{metav1.DryRunAll}}})
	}
	progress := func(s *checkpointv1alpha1.PodCheckpointStatus) {
		s.Conditions = []metav1.Condition{{Type: "Ready", Status: metav1.ConditionFalse, Reason: checkpointv1alpha1.ReasonCheckpointInProgress, LastTransitionTime: metav1.Now()}}
	}
	create := func(c client.Client, in string) error {
		return c.Create(t.Context(), &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: in, GenerateName: "new-"},
			Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name}}, dry)
	}
	key, podKey := client.ObjectKeyFromObject(finished), client.ObjectKeyFromObject(pod)
	made := map[string]func(client.Client) error{
		"read a checkpoint": func(c client.Client) error { return c.Get(t.Context(), key, &checkpointv1alpha1.PodCheckpoint{}) },
		"list the checkpoints of all namespaces": func(c client.Client) error {
			return c.List(t.Context(), &checkpointv1alpha1.PodCheckpointList{})
		},
		"create a checkpoint":                      func(c client.Client) error { return create(c, ns) },
		"create a checkpoint in another namespace": func(c client.Client) error { return create(c, elsewhere) },
		"label a checkpoint": func(c client.Client) error {
			return patch(c, held.DeepCopy(), `{"metadata":{"labels":{"a":"b"}}}`)
		},
		"take the finalizer off a checkpoint": func(c client.Client) error {
			return patch(c, held.DeepCopy(), `{"metadata":{"finalizers":null}}`)
		},
		"say that a checkpoint is in progress": func(c client.Client) error { return status(c, held, progress) },
		"say that a checkpoint is Ready": func(c client.Client) error {
			return status(c, held, func(s *checkpointv1alpha1.PodCheckpointStatus) { *s = readyStatus(pod) })
		},
		"say that another node holds its data": func(c client.Client) error {
			return status(c, held, func(s *checkpointv1alpha1.PodCheckpointStatus) { progress(s); s.NodeName = "elsewhere" })
		},
		"change the template of a Ready checkpoint": func(c client.Client) error {
			return status(c, finished, func(s *checkpointv1alpha1.PodCheckpointStatus) { s.CheckpointedPodTemplate.Spec.HostNetwork = true })
		},
		"delete a checkpoint":           func(c client.Client) error { return c.Delete(t.Context(), held.DeepCopy(), dry) },
		"create a Pod that restores it": func(c client.Client) error { return c.Create(t.Context(), restoring(t, ns, "new", "c"), dry) },
		"create a Pod that restores it elsewhere": func(c client.Client) error {
			return c.Create(t.Context(), restoring(t, elsewhere, "new", ns+"/c"), dry)
		},
		"annotate a Pod to be restored": func(c client.Client) error {
			return patch(c, pod.DeepCopy(), `{"metadata":{"annotations":{"checkpoint.podstasis.dev/restore-from":"c"}}}`)
		},
		"read a Pod": func(c client.Client) error { return c.Get(t.Context(), podKey, &corev1.Pod{}) },
		"list the Pods of the namespace": func(c client.Client) error {
			return c.List(t.Context(), &corev1.PodList{}, client.InNamespace(ns))
		},
		"label a Pod": func(c client.Client) error {
			return patch(c, pod.DeepCopy(), `{"metadata":{"labels":{"a":"b"}}}`)
		},
		"write the status of a Pod": func(c client.Client) error {
			return c.Status().Patch(t.Context(), pod.DeepCopy(), client.RawPatch(types.StrategicMergePatchType,
				[]byte(`{"status":{"conditions":[{"type":"x","status":"True"}]}}`)),
				&client.SubResourcePatchOptions{PatchOptions: client.PatchOptions{DryRun: []string{metav1.DryRunAll}}})
		},
		"delete a Pod": func(c client.Client) error { return c.Delete(t.Context(), pod.DeepCopy(), dry) },
		"read a Secret": func(c client.Client) error {
			return c.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "secret"}, &corev1.Secret{})
		},
		"list the Secrets of the namespace": func(c client.Client) error {
			return c.List(t.Context(), &corev1.SecretList{}, client.InNamespace(ns))
		},
		"read a Secret of Stasis' namespace": func(c client.Client) error {
			return c.Get(t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: "of-a-store"}, &corev1.Secret{})
		},
		"list the Secrets of Stasis' namespace": func(c client.Client) error {
			return c.List(t.Context(), &corev1.SecretList{}, client.InNamespace(systemNamespace))
		},
	}
	lines := strings.Split(strings.TrimSpace(requests), "\n")
	columns := strings.Fields(lines[0])[1:]
	for _, line := range lines[1:] {
		if line == "" {
			continue
		}
		name, cells := strings.TrimSpace(line[:43]), strings.Fields(line[43:])
		request, known := made[name]
		if !known || len(cells) != len(columns) {
			t.Fatalf("the line is not understood: %s", line)
		}
		for i, column := range columns {
			err := request(subjects[column])
			switch {
			case cells[i] == "yes" && err != nil:
				t.Errorf("%s may not %s: %v", column, name, err)
			case cells[i] == "no" && err == nil:
				t.Errorf("%s may %s", column, name)
			case cells[i] == "no" && !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err):
				t.Errorf("%s, %s: refused for another reason: %v", column, name, err)
			}
		}
	}
}

func TestNobodyReachesAKubeletThroughTheAPIServer(t *testing.T) {
	ns := namespace(t)
	on, _ := node(t)
	for _, role := range []string{"stasis-viewer", "stasis-editor", "stasis-restorer", "stasis-forensics", "stasis-importer", "stasis-admin"} {
		user(t, ns, "of-"+role, role)
	}
	var roles rbacv1.ClusterRoleList
	must(t, shared.client.List(t.Context(), &roles, client.MatchingLabels{"app.kubernetes.io/part-of": "stasis"}))
	if len(roles.Items) != 9 {
		t.Errorf("%d cluster roles of Stasis, want 9", len(roles.Items))
	}
	for _, role := range roles.Items {
		for _, rule := range role.Rules {
			for _, granted := range [][]string{rule.APIGroups, rule.Resources, rule.Verbs} {
				if slices.Contains(granted, "*") {
					t.Errorf("%s grants * in %v", role.Name, rule)
				}
			}
			for _, r := range rule.Resources {
				if strings.HasPrefix(r, "nodes/") {
					t.Errorf("%s grants %s", role.Name, r)
				}
			}
			for _, v := range rule.Verbs {
				if slices.Contains([]string{"bind", "escalate", "impersonate", "sign", "approve"}, v) {
					t.Errorf("%s grants the verb %s", role.Name, v)
				}
			}
		}
	}
	for _, who := range []string{"of-stasis-viewer", "of-stasis-editor", "of-stasis-restorer", "of-stasis-admin",
		"system:serviceaccount:stasis-system:stasis-agent", "system:serviceaccount:stasis-system:stasis-controller", "system:anonymous"} {
		config := rest.CopyConfig(shared.admin)
		config.Impersonate = rest.ImpersonationConfig{UserName: who}
		set, err := kubernetes.NewForConfig(config)
		must(t, err)
		for _, path := range []string{"/pods", "/checkpoint/" + ns + "/pod/container", "/exec/x"} {
			for _, method := range []string{http.MethodGet, http.MethodPost} {
				err := set.CoreV1().RESTClient().Verb(method).AbsPath(fmt.Sprintf("/api/v1/nodes/%s/proxy%s", on, path)).Do(t.Context()).Error()
				if !apierrors.IsForbidden(err) {
					t.Errorf("%s: %s %s: %v", who, method, path, err)
				}
			}
		}
	}
}

// Identities of the controllers that make Pods of templates.
var workloadControllers = []string{"replicaset-controller", "replication-controller", "statefulset-controller", "daemon-set-controller", "job-controller"}

func TestNoWorkloadControllerRestoresUntilSomebodyGrantsIt(t *testing.T) {
	ns, _, _, _ := ready(t)
	other := namespace(t)
	for _, name := range workloadControllers {
		identity := "system:serviceaccount:kube-system:" + name
		t.Run(name, func(t *testing.T) {
			controller := user(t, ns, identity)
			made := func() *corev1.Pod { // as a controller makes it
				pod := restoring(t, ns, "", "c")
				pod.GenerateName = "replica-"
				yes := true
				pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "replica", UID: "1", Controller: &yes}}
				return pod
			}
			refused(t, controller.Create(t.Context(), made()), apierrors.IsForbidden, `user "`+identity+`" may not restore PodCheckpoint "c"`)

			// The right that docs/security.md tells of: in one namespace, of one checkpoint.
			must(t, client.IgnoreAlreadyExists(shared.client.Create(t.Context(), &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "restore-c"},
				Rules: []rbacv1.PolicyRule{{APIGroups: []string{"checkpoint.podstasis.dev"}, Resources: []string{"podcheckpoints"}, ResourceNames: []string{"c"}, Verbs: []string{"restore"}}}})))
			bind(t, ns, "Role", "restore-c", rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: "kube-system", Name: name})
			must(t, controller.Create(t.Context(), made()))
			another := made()
			another.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] = "d"
			refused(t, controller.Create(t.Context(), another), apierrors.IsForbidden, "may not restore")
			another = made()
			another.Namespace = other
			refused(t, controller.Create(t.Context(), another), apierrors.IsForbidden)
		})
	}
}

func TestWhoeverMayWriteADeploymentRestoresOnceItsControllerMay(t *testing.T) {
	ns, _, _, _ := ready(t)
	const identity = "system:serviceaccount:kube-system:replicaset-controller"
	controller := user(t, ns, identity)
	mallory := user(t, ns, "mallory")
	must(t, shared.client.Create(t.Context(), &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "deploy"},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, Verbs: []string{"create"}}}}))
	bind(t, ns, "Role", "deploy", rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "mallory"})

	template := restoring(t, ns, "r", "c")
	template.Labels = map[string]string{"app": "r"}
	deployment := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "r"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: template.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: template.Labels, Annotations: template.Annotations}, Spec: template.Spec},
		},
	}
	// Nobody asks for the verb here: the Deployment is no Pod.
	must(t, mallory.Create(t.Context(), deployment))
	pod := func() *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "r-",
			Labels: deployment.Spec.Template.Labels, Annotations: deployment.Spec.Template.Annotations}, Spec: deployment.Spec.Template.Spec}
	}
	refused(t, mallory.Create(t.Context(), pod()), apierrors.IsForbidden, `user "mallory" may not restore`)
	refused(t, controller.Create(t.Context(), pod()), apierrors.IsForbidden, `user "`+identity+`" may not restore`)

	bind(t, ns, "ClusterRole", "stasis-restorer", rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: "kube-system", Name: "replicaset-controller"})
	refused(t, mallory.Create(t.Context(), pod()), apierrors.IsForbidden, `user "mallory" may not restore`)
	must(t, controller.Create(t.Context(), pod())) // mallory's Deployment restores now
}
