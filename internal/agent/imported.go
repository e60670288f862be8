package agent

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	// maxWord bounds what is taken over of names and versions in an archive.
	maxWord = 253
	// maxReason bounds what is taken over of why memory was captured as it was.
	maxReason = 1024
	// maxPhases is how many timings are taken over.
	maxPhases = 16
	// noUID stands for a source Pod of which an archive says no UID.
	noUID = types.UID("unknown")
)

// imported is the record of a checkpoint that came as an archive. What that says is
// held against what its object asked for; nothing of it is believed that decides on
// another object.
func (o *operations) imported(pcp *v1alpha1.PodCheckpoint, in *archive.Unpacked) (*record, error) {
	var from *v1alpha1.PodCheckpoint
	var err error
	if in.Object != nil {
		from, err = sourceObject(pcp, in)
	} else {
		from, err = kubeletObject(pcp, in.Manifest)
	}
	if err != nil {
		return nil, err
	}
	m := in.Manifest
	now := metav1.NewTime(o.now())
	data := dataName(pcp.Namespace, pcp.Name, pcp.UID)
	s := v1alpha1.PodCheckpointStatus{
		NodeName:     o.nodeName,
		SourcePodUID: from.Status.SourcePodUID,
		CheckpointLocation: &v1alpha1.CheckpointSource{
			Type:      v1alpha1.CheckpointSourceTypeNodeLocal,
			NodeLocal: &v1alpha1.NodeLocalCheckpointSource{Path: data},
		},
		ManifestDigest:             in.ManifestDigest,
		StartTime:                  pcp.Status.StartTime,
		CompletionTime:             &now,
		CheckpointedPodTemplate:    from.Status.CheckpointedPodTemplate,
		CheckpointedContainers:     from.Status.CheckpointedContainers,
		CheckpointedInitContainers: from.Status.CheckpointedInitContainers,
		Engine:                     &v1alpha1.EngineStatus{Name: word(m.Engine.Name), Version: word(m.Engine.Version)},
		Platform:                   word(m.Platform.OS) + "/" + word(m.Platform.Architecture),
		Requires:                   requirements(m),
		Size:                       &v1alpha1.CheckpointSize{Logical: binaryBytes(m.LogicalBytes()), LogicalBytes: m.LogicalBytes()},
		FreezeDuration:             &metav1.Duration{Duration: max(m.FreezeDuration, 0).Round(time.Microsecond)},
		EarlierFreezes:             earlierFreezes(m.EarlierFreezes),
		Capture:                    capture(m.Capture),
		Phases:                     timings(m.Phases),
	}
	setReady(&s, pcp.Generation, now, v1alpha1.ReasonCheckpointCompleted, fmt.Sprintf(
		"Imported %s of Pod %s, captured at %s, on node %s: %s", strings.Join(containerNames(m), ", "),
		pcp.Spec.SourcePodName, m.CutTime.UTC().Format(time.RFC3339), o.nodeName, s.Size.Logical))
	return &record{Namespace: pcp.Namespace, Name: pcp.Name, UID: pcp.UID, PodName: pcp.Spec.SourcePodName, Data: data, StoreName: pcp.Spec.StoreName, Status: s}, nil
}

// sourceObject reads the PodCheckpoint that a Pod's archive begins with.
func sourceObject(pcp *v1alpha1.PodCheckpoint, in *archive.Unpacked) (*v1alpha1.PodCheckpoint, error) {
	var from v1alpha1.PodCheckpoint
	if err := json.Unmarshal(in.Object, &from); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", archive.ErrInvalid, archive.ObjectName, err)
	}
	s := &from.Status
	switch {
	case from.GroupVersionKind() != v1alpha1.GroupVersion.WithKind("PodCheckpoint"):
		return nil, fmt.Errorf("%w: %s is a %.80q, not a PodCheckpoint of %s", archive.ErrInvalid, archive.ObjectName, from.GroupVersionKind().String(), v1alpha1.GroupVersion)
	case s.ManifestDigest != in.ManifestDigest:
		return nil, fmt.Errorf("%w: its object tells of a manifest with digest %.80q, the manifest has %s", checkpoint.ErrCorrupt, s.ManifestDigest, in.ManifestDigest)
	case s.CheckpointedPodTemplate == nil || s.SourcePodUID == nil || *s.SourcePodUID == "" || len(*s.SourcePodUID) > 128:
		return nil, fmt.Errorf("%w: its object holds no Pod template or no UID of its source: it is not of a checkpoint that was Ready", archive.ErrInvalid)
	case from.Spec.SourcePodName != pcp.Spec.SourcePodName:
		return nil, fmt.Errorf("it is a checkpoint of Pod %.253q: create the PodCheckpoint with that sourcePodName, not %q", from.Spec.SourcePodName, pcp.Spec.SourcePodName)
	case !sameNames(from.Spec.Containers, pcp.Spec.Containers):
		return nil, fmt.Errorf("it is a checkpoint with spec.containers %q: create the PodCheckpoint with those, not %q", from.Spec.Containers, pcp.Spec.Containers)
	}
	return &from, sameAsTold(s, in.Manifest)
}

// sameAsTold makes sure that the containers of which the object tells are those of
// the manifest, and of the template.
func sameAsTold(s *v1alpha1.PodCheckpointStatus, m *checkpoint.Manifest) error {
	inTemplate := map[string]bool{}
	for _, c := range s.CheckpointedPodTemplate.Spec.Containers {
		inTemplate[c.Name] = true
	}
	for _, c := range s.CheckpointedPodTemplate.Spec.InitContainers {
		inTemplate[c.Name] = true
	}
	held := map[string]bool{}
	for _, name := range containerNames(m) {
		held[name] = true
	}
	told := map[string]bool{}
	for _, c := range s.CheckpointedContainers {
		if !held[c.Name] {
			return fmt.Errorf("%w: its object tells of container %.80q, which is not there", archive.ErrInvalid, c.Name)
		}
		told[c.Name] = true
	}
	for _, c := range s.CheckpointedInitContainers {
		told[c.Name] = true // one that had completed has no images
	}
	for name := range held {
		if !told[name] || !inTemplate[name] {
			return fmt.Errorf("%w: it holds container %.80q, of which its object does not tell", archive.ErrInvalid, name)
		}
	}
	for name := range told {
		if !inTemplate[name] {
			return fmt.Errorf("%w: its object tells of container %.80q, which its Pod template has not", archive.ErrInvalid, name)
		}
	}
	return nil
}

// kubeletObject is what there would be of a container that a kubelet checkpointed.
func kubeletObject(pcp *v1alpha1.PodCheckpoint, m *checkpoint.Manifest) (*v1alpha1.PodCheckpoint, error) {
	c := m.Containers[0]
	if !sameNames(pcp.Spec.Containers, []string{c.Name}) {
		return nil, fmt.Errorf("it is a kubelet's checkpoint of container %s alone: create the PodCheckpoint with spec.containers [%s], not %q", c.Name, c.Name, pcp.Spec.Containers)
	}
	if m.Sandbox.Name != "" && m.Sandbox.Name != pcp.Spec.SourcePodName {
		return nil, fmt.Errorf("it is a checkpoint of Pod %.253q: create the PodCheckpoint with that sourcePodName, not %q", m.Sandbox.Name, pcp.Spec.SourcePodName)
	}
	uid := noUID
	if m.Sandbox.UID != "" && len(m.Sandbox.UID) <= 128 {
		uid = types.UID(m.Sandbox.UID)
	}
	from := &v1alpha1.PodCheckpoint{}
	from.Status.SourcePodUID = &uid
	from.Status.CheckpointedPodTemplate = &corev1.PodTemplateSpec{
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: c.Name, Image: word(c.Image)}}},
	}
	from.Status.CheckpointedContainers = []v1alpha1.PodCheckpointContainerStatus{{Name: c.Name, Image: word(c.Image)}}
	return from, nil
}

func containerNames(m *checkpoint.Manifest) (names []string) {
	for _, c := range m.Containers {
		names = append(names, c.Name)
	}
	return names
}

func sameNames(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// timings takes the first few phases over, each name once.
func timings(phases []checkpoint.Phase) (out []v1alpha1.PhaseTiming) {
	seen := map[string]bool{}
	for _, p := range phases {
		name := word(p.Name)
		if seen[name] || len(out) == maxPhases {
			continue
		}
		seen[name] = true
		out = append(out, v1alpha1.PhaseTiming{Name: name, Duration: metav1.Duration{Duration: max(p.Duration, 0).Round(time.Microsecond)}})
	}
	return out
}

// word makes something printable and short of a name that came from elsewhere.
func word(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, s)
	return cut(s, maxWord)
}
