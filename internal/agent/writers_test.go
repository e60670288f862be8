package agent

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/podtemplate"
)

func TestAPodIsNotRestoredBesideASourceThatWritesToTheSameVolume(t *testing.T) {
	claim := func(modes ...corev1.PersistentVolumeAccessMode) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data"},
			Spec:       corev1.PersistentVolumeClaimSpec{AccessModes: modes},
		}
	}
	ofClaim := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}
	hostPath := func(kind corev1.HostPathType) corev1.VolumeSource {
		return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/srv", Type: &kind}}
	}
	readOnly := func(m *corev1.VolumeMount) { m.ReadOnly = true }
	once, oncePod, many := corev1.ReadWriteOnce, corev1.ReadWriteOncePod, corev1.ReadWriteMany
	for name, tc := range map[string]struct {
		volume corev1.VolumeSource
		claim  *corev1.PersistentVolumeClaim
		mount  func(*corev1.VolumeMount)
		source func(*corev1.Pod) // nil: it runs
		gone   bool
		says   string // empty: it is restored
		reason string
	}{
		"a claim for one node":             {volume: ofClaim, claim: claim(once), says: "PersistentVolumeClaim data", reason: v1alpha1.EventSourcePodRunning},
		"a claim for one Pod":              {volume: ofClaim, claim: claim(oncePod), says: "for one writer", reason: v1alpha1.EventSourcePodRunning},
		"a claim for many":                 {volume: ofClaim, claim: claim(once, many)},
		"a claim that is only read":        {volume: ofClaim, claim: claim(once), mount: readOnly},
		"a claim that is not there":        {volume: ofClaim, says: "could not be read", reason: v1alpha1.EventRestoreFailed},
		"a directory of the node":          {volume: hostPath(corev1.HostPathUnset), says: "/srv of the node", reason: v1alpha1.EventSourcePodRunning},
		"a directory that is only read":    {volume: hostPath(corev1.HostPathDirectory), mount: readOnly},
		"a socket of the node":             {volume: hostPath(corev1.HostPathSocket)},
		"an emptyDir":                      {volume: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		"a source that is gone":            {volume: ofClaim, claim: claim(once), gone: true},
		"a source that has ended":          {volume: ofClaim, claim: claim(once), source: func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }},
		"another Pod of the source's name": {volume: ofClaim, claim: claim(once), source: func(p *corev1.Pod) { p.UID = "another" }},
		"a source that is about to be ended": {volume: ofClaim, claim: claim(once), source: func(p *corev1.Pod) {
			p.Finalizers, p.DeletionTimestamp = []string{"x/y"}, &metav1.Time{Time: metav1.Now().Time}
		}, says: "still runs", reason: v1alpha1.EventSourcePodRunning},
	} {
		t.Run(name, func(t *testing.T) {
			with := func(p *corev1.Pod) {
				p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "shared", VolumeSource: tc.volume})
				m := corev1.VolumeMount{Name: "shared", MountPath: "/shared"}
				if tc.mount != nil {
					tc.mount(&m)
				}
				p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, m)
			}
			source := makePod(with)
			pcp := readyCheckpoint(func(p *v1alpha1.PodCheckpoint) {
				p.Status.CheckpointedPodTemplate = podtemplate.FromPod(source)
				p.Status.SourcePodUID = new(types.UID(source.UID))
			})
			if tc.source != nil {
				tc.source(source)
			}
			objects := []client.Object{restoringPod(with), pcp}
			if !tc.gone {
				objects = append(objects, source)
			}
			if tc.claim != nil {
				objects = append(objects, tc.claim)
			}
			_, err := resolve(t, restoringSandbox(), objects...)
			var refusal *nodeapi.Error
			switch {
			case tc.says == "" && err != nil:
				t.Errorf("it was refused: %v", err)
			case tc.says != "" && (!errors.As(err, &refusal) || refusal.Reason != tc.reason || !strings.Contains(refusal.Message, tc.says)):
				t.Errorf("%v, want %s and %q", err, tc.reason, tc.says)
			}
		})
	}
}

func TestAPodWithAVolumeThatNoCheckpointHoldsIsRefused(t *testing.T) {
	pod := makePod(func(p *corev1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "own", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}})
	})
	_, r := checkPod(makePCP(), pod, testNode)
	if r == nil || !strings.Contains(r.message, "volume own is a generic ephemeral volume") {
		t.Errorf("got %v", r)
	}
}
