package install

import (
	"fmt"
	"strings"
	"testing"
)

func uninstalls(t *testing.T, s *story) {
	ready(t)
	for _, file := range []string{"pod", "podcheckpoint"} {
		kubectl(t, "apply", "-f", "config/samples/"+file+".yaml")
		kubectl(t, "wait", "--for=condition=Ready", "-f", "config/samples/"+file+".yaml", "--timeout=90s")
	}
	kubectl(t, "apply", "-f", "config/samples/restored-pod.yaml")
	kubectl(t, "wait", "--for=condition=Ready", "-f", "config/samples/restored-pod.yaml", "--timeout=90s")

	kubectl(t, "delete", "podcheckpoints", "--all", "--timeout=60s")
	if left := onNode(t, "find /var/lib/stasis/checkpoints -mindepth 1 ! -name .copies"); left != "" {
		t.Errorf("checkpoints of deleted objects are left: %s", left)
	}
	tr := ordinaryPods(t, "uninstalled")
	kubectl(t, "delete", "-k", "config/default", "--timeout=120s")
	kubectl(t, "apply", "-k", "config/uninstall")
	eventually(t, "the uninstall says what it waits for", func() error {
		out, err := it.Kubectl(t.Context(), "-n", "stasis-uninstall", "logs", "daemonset/stasis-uninstall")
		if err != nil || !strings.Contains(out, "default/counter-restored") {
			return fmt.Errorf("%s %w", out, err)
		}
		return nil
	})
	if out := onNode(t, "ls /opt/stasis/bin/stasis-runtime /etc/containerd/conf.d/stasis.toml"); !strings.Contains(out, "stasis.toml") {
		t.Errorf("taken away under a restored Pod: %s", out)
	}
	goesOn(t, "counter-restored", "a")

	kubectl(t, "delete", "pod", "counter-restored", "--timeout=60s")
	kubectl(t, "-n", "stasis-uninstall", "rollout", "status", "daemonset/stasis-uninstall", "--timeout=180s")
	now := onNode(t, "cd /etc/containerd && find . -type f | sort | while read f; do echo \"== $f\"; cat \"$f\"; done")
	if now != s.before {
		t.Errorf("containerd's configuration is\n%s\nwas\n%s", now, s.before)
	}
	if left := onNode(t, "ls -d /opt/stasis /run/stasis /var/lib/stasis 2>/dev/null || true"); left != "" {
		t.Errorf("left on the node: %s", left)
	}
	kubectl(t, "delete", "-k", "config/uninstall", "--timeout=60s")
	goesOn(t, "counter", "a")
	undisturbed(t, s.ordinary, tr.end(t, len(s.ordinary)))
	undisturbed(t, s.ordinary, ordinaryPods(t, "after").end(t, 4))

	// The API goes last, and only when that is said.
	kubectl(t, "annotate", "crd", crd, "checkpoint.podstasis.dev/delete=true")
	kubectl(t, "delete", "-k", "config/crd", "--timeout=60s")
	if left := kubectl(t, "get", "apiservice,crd,clusterrole,clusterrolebinding,validatingadmissionpolicy,validatingwebhookconfiguration,mutatingwebhookconfiguration,runtimeclass",
		"-l", "app.kubernetes.io/part-of=stasis", "-o", "name"); left != "" {
		t.Errorf("left in the cluster: %s", left)
	}
}
