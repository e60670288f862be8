package e2e

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The shell has its script open, in a directory that is named after the moment at
// which the kubelet wrote it. The second restore is of a restored Pod.
func TestAScriptFromAConfigMapGoesOnInPodsRestoredOneFromTheOther(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	script := "n=0\nwhile :; do\nn=$((n+1))\necho n=$n\nsleep 0.1\ndone\n"
	if err := s.Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "scripts"}, Data: map[string]string{"count": script},
	}); err != nil {
		t.Fatal(err)
	}
	pod := MakePod("source").Container("main", imageBusybox, "sh", "/scripts/count")
	pod.pod.Spec.Volumes = []corev1.Volume{{Name: "scripts", VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "scripts"}}}}}
	pod.last().VolumeMounts = []corev1.VolumeMount{{Name: "scripts", MountPath: "/scripts"}}
	s.running(pod.Obj())
	for i, from := range []string{"source", "restored-1"} {
		s.eventually("pod "+from+" counts", func() error {
			if lines := strings.Count(s.logs(from, "main"), "\n"); lines < 3 {
				return fmt.Errorf("%d lines", lines)
			}
			return nil
		})
		checkpoint := fmt.Sprintf("one-%d", i+1)
		s.checkpoint(checkpoint, from)
		next := pod.RestoreFrom(checkpoint).Obj()
		next.Name = fmt.Sprintf("restored-%d", i+1)
		s.running(next)
		s.unharmed(next.Name)
		if log := s.logs(next.Name, "main"); strings.HasPrefix(log, "n=1\n") {
			t.Errorf("%s began anew: %q", next.Name, log)
		}
	}
}
