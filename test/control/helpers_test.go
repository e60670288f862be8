package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/podtemplate"
)

// privateKey makes the key that signs service account tokens.
func privateKey() []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// namespace makes a namespace with the service account that a Pod needs.
func namespace(t *testing.T) string {
	t.Helper()
	must(t, once())
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}
	must(t, shared.client.Create(t.Context(), n))
	must(t, shared.client.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: n.Name, Name: "default"}}))
	return n.Name
}

// node makes a Ready node with an agent, and returns its name and a client with
// the token of that agent.
func node(t *testing.T) (string, client.Client) {
	t.Helper()
	name, token := nodeAndToken(t)
	return name, withToken(t, token)
}

func nodeAndToken(t *testing.T) (node, token string) {
	t.Helper()
	must(t, once())
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{GenerateName: "node-"}}
	must(t, shared.client.Create(t.Context(), n))
	n.Labels = map[string]string{corev1.LabelHostname: n.Name}
	n.Spec.Taints = nil
	must(t, shared.client.Update(t.Context(), n))
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	n.Status.Allocatable = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}
	must(t, shared.client.Status().Update(t.Context(), n))

	agent := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: systemNamespace, Name: "stasis-agent-" + n.Name,
			Labels: map[string]string{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "agent"},
		},
		Spec: corev1.PodSpec{ServiceAccountName: "stasis-agent", NodeName: n.Name, Containers: []corev1.Container{{Name: "agent", Image: "i"}}},
	}
	must(t, shared.client.Create(t.Context(), agent))
	agent.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	agent.Status.Phase = corev1.PodRunning
	must(t, shared.client.Status().Update(t.Context(), agent))

	set, err := kubernetes.NewForConfig(shared.admin)
	must(t, err)
	bound, err := set.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), "stasis-agent", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: agent.Name, UID: agent.UID}},
	}, metav1.CreateOptions{})
	must(t, err)
	announce(t, withToken(t, bound.Status.Token), agentapi.Announcement{Node: n.Name, Address: "127.0.0.1:1",
		Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version, Holder: agent.Name, Renewed: unattended()})
	return n.Name, bound.Status.Token
}

// agentOf returns a client with the identity of a node's agent, of which there need
// be no Pod.
func agentOf(t *testing.T, node string) client.Client {
	t.Helper()
	config := rest.CopyConfig(shared.admin)
	config.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:stasis-system:stasis-agent",
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:stasis-system", "system:authenticated"},
		Extra:  map[string][]string{"authentication.kubernetes.io/node-name": {node}}}
	c, err := client.New(config, client.Options{Scheme: scheme, Mapper: shared.client.RESTMapper()})
	must(t, err)
	return c
}

// unattended is when an agent was heard of last that nobody has to renew the Lease of,
// however long a test takes.
func unattended() time.Time { return time.Now().Add(time.Hour) }

// announce writes the Lease of an agent, as that agent. It goes with the test: where there
// are many agents, nodes get their labels later.
func announce(t *testing.T, agent client.Client, a agentapi.Announcement) {
	t.Helper()
	a.Duration = agentapi.LeaseDuration
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: agentapi.LeaseName(a.Node)}}
	err := agent.Get(t.Context(), client.ObjectKeyFromObject(lease), lease)
	must(t, client.IgnoreNotFound(err))
	a.Fill(lease)
	if err != nil {
		must(t, agent.Create(t.Context(), lease))
		cleanUp(t, lease)
		return
	}
	must(t, agent.Update(t.Context(), lease))
}

func withToken(t *testing.T, token string) client.Client {
	t.Helper()
	config := rest.CopyConfig(shared.admin)
	config.BearerToken = token
	c, err := client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	return c
}

// as returns a client of a user.
func as(t *testing.T, user string, groups ...string) client.Client {
	t.Helper()
	config := rest.CopyConfig(shared.admin)
	config.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	c, err := client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	return c
}

// user makes a user who may edit a namespace and has the cluster roles named.
func user(t *testing.T, namespace, name string, roles ...string) client.Client {
	t.Helper()
	for _, role := range append([]string{"edit"}, roles...) {
		bind(t, namespace, "ClusterRole", role, rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name})
	}
	// Aggregated roles are filled in by kube-controller-manager, which is not here.
	must(t, client.IgnoreAlreadyExists(shared.client.Create(t.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "test-pods"},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Verbs: []string{"*"},
			Resources: []string{"pods", "pods/status", "pods/binding", "pods/resize", "pods/ephemeralcontainers"}}},
	})))
	bind(t, namespace, "ClusterRole", "test-pods", rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name})
	return as(t, name)
}

// bind gives a subject the rights of a Role or ClusterRole in a namespace, or
// in all with no namespace, and returns when the API server's authorizer knows:
// it learns of roles and of bindings by watching them, each for itself.
func bind(t *testing.T, namespace, kind, role string, subject rbacv1.Subject) {
	t.Helper()
	// The binding holds for this user, too, who has no other.
	witness := rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "witness-" + rand.Text()}
	meta := metav1.ObjectMeta{Namespace: namespace, GenerateName: strings.ReplaceAll(role, ":", "-") + "-"}
	ref, subjects := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: role}, []rbacv1.Subject{subject, witness}
	var rules []rbacv1.PolicyRule
	if kind == "Role" {
		r := &rbacv1.Role{}
		must(t, shared.client.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: role}, r))
		rules = r.Rules
	} else {
		r := &rbacv1.ClusterRole{}
		must(t, shared.client.Get(t.Context(), client.ObjectKey{Name: role}, r))
		rules = r.Rules
	}
	if namespace == "" {
		must(t, shared.client.Create(t.Context(), &rbacv1.ClusterRoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}))
	} else {
		must(t, shared.client.Create(t.Context(), &rbacv1.RoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}))
	}
	if len(rules) == 0 { // aggregated, and so empty here
		return
	}
	rule := rules[0]
	resource, subresource, _ := strings.Cut(rule.Resources[0], "/")
	review := authorizationv1.SubjectAccessReviewSpec{User: witness.Name, ResourceAttributes: &authorizationv1.ResourceAttributes{
		Namespace: namespace, Verb: rule.Verbs[0], Group: rule.APIGroups[0], Resource: resource, Subresource: subresource}}
	if len(rule.ResourceNames) > 0 {
		review.ResourceAttributes.Name = rule.ResourceNames[0]
	}
	must(t, eventually(t.Context(), func() error {
		r := &authorizationv1.SubjectAccessReview{Spec: review}
		if err := shared.client.Create(t.Context(), r); err != nil {
			return err
		}
		if !r.Status.Allowed {
			return fmt.Errorf("%s %s: its rights have not reached the authorizer", kind, role)
		}
		return nil
	}))
}

// sample reads a manifest of config/samples.
func sample[T any](t *testing.T, file string) *T {
	t.Helper()
	b, err := os.ReadFile("../../config/samples/" + file)
	must(t, err)
	object := new(T)
	must(t, yaml.UnmarshalStrict(b, object))
	return object
}

// source makes the sample's Pod run on a node.
func source(t *testing.T, namespace, node string) *corev1.Pod {
	t.Helper()
	pod := sample[corev1.Pod](t, "pod.yaml")
	pod.Namespace = namespace
	must(t, shared.client.Create(t.Context(), pod))
	must(t, shared.client.SubResource("binding").Create(t.Context(), pod, &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: pod.Name},
		Target:     corev1.ObjectReference{Kind: "Node", Name: node},
	}))
	must(t, shared.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod))
	return pod
}

// checkpoint makes a PodCheckpoint of a Pod.
func checkpoint(t *testing.T, namespace, name, pod string) *checkpointv1alpha1.PodCheckpoint {
	t.Helper()
	c := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod},
	}
	must(t, shared.client.Create(t.Context(), c))
	return c
}

// complete plays the agent that takes the checkpoint of a Pod.
func complete(t *testing.T, agent client.Client, c *checkpointv1alpha1.PodCheckpoint, pod *corev1.Pod) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
			return err
		}
		c.Status = readyStatus(pod)
		return agent.Status().Update(t.Context(), c)
	}))
}

func readyStatus(pod *corev1.Pod) checkpointv1alpha1.PodCheckpointStatus {
	now := metav1.NewTime(time.Now().Truncate(time.Second))
	uid := pod.UID
	return checkpointv1alpha1.PodCheckpointStatus{
		NodeName: pod.Spec.NodeName, SourcePodUID: &uid, StartTime: &now, CompletionTime: &now,
		CheckpointLocation: &checkpointv1alpha1.CheckpointSource{
			Type:      checkpointv1alpha1.CheckpointSourceTypeNodeLocal,
			NodeLocal: &checkpointv1alpha1.NodeLocalCheckpointSource{Path: "a_b_c"},
		},
		ManifestDigest:          "sha256:" + strings.Repeat("0", 64),
		CheckpointedPodTemplate: podtemplate.FromPod(pod),
		Size:                    &checkpointv1alpha1.CheckpointSize{Logical: "12Mi", LogicalBytes: 12 << 20},
		FreezeDuration:          &metav1.Duration{Duration: 123 * time.Millisecond},
		Conditions: []metav1.Condition{{Type: checkpointv1alpha1.PodCheckpointReady, Status: metav1.ConditionTrue,
			Reason: checkpointv1alpha1.ReasonCheckpointCompleted, LastTransitionTime: now}},
	}
}

// restoring returns the Pod that restores a checkpoint: the sample's manifest.
func restoring(t *testing.T, namespace, name, from string) *corev1.Pod {
	t.Helper()
	pod := sample[corev1.Pod](t, "restored-pod.yaml")
	pod.Namespace, pod.Name = namespace, name
	pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] = from
	return pod
}

// ended waits for a terminal condition.
func ended(t *testing.T, c *checkpointv1alpha1.PodCheckpoint) *metav1.Condition {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		if err := shared.client.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil {
			return err
		}
		if !c.IsTerminal() {
			return fmt.Errorf("PodCheckpoint %s has not ended: %+v", c.Name, c.ReadyCondition())
		}
		return nil
	}))
	return c.ReadyCondition()
}

// event waits for an event on an object and returns its text.
func event(t *testing.T, namespace string, uid types.UID, reason string) string {
	t.Helper()
	var text string
	must(t, eventually(t.Context(), func() error {
		var list corev1.EventList
		if err := shared.client.List(t.Context(), &list, client.InNamespace(namespace)); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.InvolvedObject.UID == uid && e.Reason == reason {
				text = e.Message
				return nil
			}
		}
		return fmt.Errorf("no event %s on %s among %d", reason, uid, len(list.Items))
	}))
	return text
}

// refused checks that an error is of a kind and says each of the words.
func refused(t *testing.T, err error, kind func(error) bool, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted; want it refused: %s", strings.Join(words, " … "))
	}
	if !kind(err) {
		t.Errorf("refused as %s: %v", apierrors.ReasonForError(err), err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func runtimeClass(name string) *nodev1.RuntimeClass {
	return &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: name}
}
