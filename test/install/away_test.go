package install

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

// away kills webhooks and agent while ordinary Pods come and go, keeps them away
// for a while, and brings them back (P33).
func away(t *testing.T, s *story) {
	ready(t)
	calls := webhookCalls(t)
	tr := ordinaryPods(t, "away")
	for _, pid := range append(pids(t, "controller"), pids(t, "agent")...) {
		onNode(t, "kill -9 "+pid)
	}
	kubectl(t, "-n", "stasis-system", "scale", "deployment", "stasis-controller", "--replicas=0")
	agents(t, "add")
	eventually(t, "nothing of Stasis runs", func() error {
		out, err := it.Kubectl(t.Context(), "-n", "stasis-system", "get", "pods", "-o", "name")
		if err != nil || out != "" {
			return fmt.Errorf("%s %w", out, err)
		}
		return nil
	})
	undisturbed(t, s.ordinary, tr.end(t, len(s.ordinary)))
	uncalled(t, calls)
	// They were away indeed: what is Stasis' own is refused.
	restoring := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "r", Annotations: map[string]string{v1alpha1.AnnotationRestoreFrom: "none"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "localhost/busybox:1"}}},
	}
	if err := it.Create(t.Context(), restoring, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("a restoring Pod without webhooks: %v", err)
	}

	calls = webhookCalls(t)
	tr = ordinaryPods(t, "back")
	agents(t, "remove")
	kubectl(t, "-n", "stasis-system", "scale", "deployment", "stasis-controller", "--replicas=2")
	kubectl(t, "-n", "stasis-system", "rollout", "status", "deployment", "stasis-controller", "--timeout=120s")
	ready(t)
	undisturbed(t, s.ordinary, tr.end(t, len(s.ordinary)))
	uncalled(t, calls)
	unrestarted(t)
}

// agents keeps agents off every node ("add") or lets them come back ("remove").
func agents(t *testing.T, op string) {
	t.Helper()
	kubectl(t, "-n", "stasis-system", "patch", "daemonset", "stasis-agent", "--type=json",
		"-p", `[{"op":"`+op+`","path":"/spec/template/spec/nodeSelector/no-such","value":"label"}]`)
}

// webhookCalls counts what the API server has asked of Stasis' webhooks.
func webhookCalls(t *testing.T) string {
	t.Helper()
	var calls []string
	for line := range strings.Lines(kubectl(t, "get", "--raw", "/metrics")) {
		if strings.HasPrefix(line, "apiserver_admission_webhook_request_total{") && strings.Contains(line, "checkpoint.podstasis.dev") {
			calls = append(calls, line)
		}
	}
	if len(calls) == 0 {
		t.Error("the API server does not count the calls of webhooks")
	}
	return strings.Join(calls, "")
}

func uncalled(t *testing.T, before string) {
	t.Helper()
	if now := webhookCalls(t); now != before {
		t.Errorf("webhooks of Stasis were called for ordinary Pods:\n%swas\n%s", now, before)
	}
}
