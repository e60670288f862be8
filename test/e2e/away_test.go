package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// agents has all agents go, or come back.
func (s *scene) agents(ctx context.Context, there bool) {
	s.Helper()
	where := `{"no-agent":"here"}`
	if there {
		where = `null`
	}
	for _, args := range [][]string{
		{"patch", "daemonset", "stasis-agent", "--type=merge", "-p", `{"spec":{"template":{"spec":{"nodeSelector":` + where + `}}}}`},
		{"rollout", "status", "daemonset", "stasis-agent", "--timeout=120s"},
	} {
		if _, err := s.Kubectl(ctx, append([]string{"-n", "stasis-system"}, args...)...); err != nil {
			s.Error(err)
		}
	}
	if there {
		return
	}
	s.eventually("the agents are gone", func() error {
		var pods corev1.PodList
		if err := s.List(ctx, &pods, client.InNamespace("stasis-system"), client.MatchingLabels{"app.kubernetes.io/component": "agent"}); err != nil {
			return err
		}
		if n := len(pods.Items); n > 0 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
}

// heldAtStart has the restored containers of a node wait just before they are let go,
// until the returned function is called.
func (s *scene) heldAtStart(node string) (reached func() error, goOn func()) {
	s.Helper()
	// The agent's return writes the wrapper's settings anew.
	settings := "/opt/stasis/etc/" + engine.settings
	s.onNode(node, `set -e
real=$(sed 's/.*"runtime":"\([^"]*\)".*/\1/' `+settings+`)
rm -f /run/stasis-e2e-reached /run/stasis-e2e-go-on
printf '#!/bin/sh\ncase "$*" in *" `+engine.letsGo+` "*) : > /run/stasis-e2e-reached; while [ ! -e /run/stasis-e2e-go-on ]; do sleep 0.1; done;; esac\nexec %s "$@"\n' "$real" > /opt/stasis/bin/e2e-runc
chmod 755 /opt/stasis/bin/e2e-runc
cp `+settings+` /run/stasis-e2e-runtime.json
printf '{"runtime":"/opt/stasis/bin/e2e-runc"}\n' > `+settings)
	s.Cleanup(func() {
		_, err := s.OnNode(context.Background(), node, `: > /run/stasis-e2e-go-on; sleep 0.3
cp /run/stasis-e2e-runtime.json `+settings+`
rm -f /run/stasis-e2e-* /opt/stasis/bin/e2e-runc`)
		if err != nil {
			s.Error(err)
		}
	})
	return func() error {
			_, err := s.OnNode(s.Context(), node, "ls /run/stasis-e2e-reached")
			return err
		}, func() {
			s.onNode(node, ": > /run/stasis-e2e-go-on")
		}
}

func (s *scene) restoringCondition(name string) *corev1.PodCondition {
	for _, c := range s.pod(name).Status.Conditions {
		if c.Type == checkpointv1alpha1.PodConditionRestoring {
			return &c
		}
	}
	return nil
}

// P24, P25, P29: what the agent does not hear it finds.
func TestARestoreThatIsCompletedWhileTheAgentIsAwayIsKnownWhenItIsBack(t *testing.T) {
	s := newScene(t)
	source := s.running(MakePod("source").Subject().Obj())
	s.checkpoint("one", "source")
	s.remove("source")
	reached, goOn := s.heldAtStart(source.Spec.NodeName)
	restored := s.create(MakePod("restored").Subject().RestoreFrom("one").Obj())
	s.eventually("the container is about to be let go", reached)
	t.Cleanup(func() { s.agents(context.Background(), true) }) // also for the tests that follow
	s.agents(t.Context(), false)
	goOn()
	s.waitReady("restored")
	var before, after report
	s.ask("restored", "/state", &before)
	if c := s.restoringCondition("restored"); c == nil || c.Status != corev1.ConditionTrue {
		t.Errorf("while the agent is away the condition is %+v", c)
	}
	if err := s.Delete(t.Context(), &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "one"}}); err != nil {
		t.Fatal(err)
	}
	// Nothing is left of the container when the agent is back.
	_, _ = s.exec("restored", "subject", "subject", "get", "/exit?code=7")
	s.eventually("the container has ended", func() error {
		if status := s.pod("restored").Status.ContainerStatuses[0]; status.State.Running != nil {
			return errors.New("it runs")
		}
		return nil
	})

	s.agents(t.Context(), true)
	s.waitEvent(restored, checkpointv1alpha1.EventRestoreSucceeded, "Restored from PodCheckpoint one")
	s.eventually("the condition is taken off", func() error {
		if c := s.restoringCondition("restored"); c != nil {
			return fmt.Errorf("it is %s: %s", c.Status, c.Message)
		}
		return nil
	})
	s.eventually("the data are not in use any more", func() error {
		err := s.Get(t.Context(), s.key("one"), &checkpointv1alpha1.PodCheckpoint{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("the deleted PodCheckpoint is there"))
	})
	s.within(2*patience, "the container is started again", func() error { // the kubelet's backoff
		_, err := s.exec("restored", "subject", "subject", "get", "/healthz")
		return err
	})
	s.ask("restored", "/state", &after)
	if after.Nonce == before.Nonce {
		t.Errorf("nonce %s as before: it was restored again", after.Nonce)
	}
	succeeded := 0
	for _, e := range s.events(restored.UID) {
		if e.Reason == checkpointv1alpha1.EventRestoreSucceeded {
			succeeded += max(1, int(e.Count))
		}
	}
	if succeeded != 1 {
		t.Errorf("there are %d events RestoreSucceeded", succeeded)
	}
}
