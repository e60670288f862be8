package agentapi

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/platform"
)

var moment = time.Date(2026, 11, 22, 1, 2, 3, 456789000, time.UTC)

func announced() Announcement {
	return Announcement{Node: "node-1", Address: "10.0.0.7:8443", Certificate: Fingerprint([]byte("der")), Protocol: 1, Program: "v0.1.0",
		Platform: &platform.Description{OS: "linux", Architecture: "amd64", Kernel: "6.1.0", CPU: &checkpoint.CPU{Features: []string{"sse"}, XSaveFeatures: 3, XSaveBytes: 576},
			Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, FormatVersion: 1},
		Holder: "stasis-agent-x", Renewed: moment, Duration: LeaseDuration}
}

func lease() *coordinationv1.Lease {
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: LeaseName("node-1")}}
	announced().Fill(l)
	return l
}

func TestAnAnnouncementIsReadAsItWasWritten(t *testing.T) {
	got, err := Read(lease())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(announced(), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestWhatIsNoAnnouncementIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(*coordinationv1.Lease){
		"another's Lease":         func(l *coordinationv1.Lease) { l.Name = "stasis-controller" },
		"no node":                 func(l *coordinationv1.Lease) { l.Name = LeasePrefix },
		"no annotations":          func(l *coordinationv1.Lease) { l.Annotations = nil },
		"a host name":             func(l *coordinationv1.Lease) { l.Annotations[AnnotationAddress] = "metadata.internal:80" },
		"no port":                 func(l *coordinationv1.Lease) { l.Annotations[AnnotationAddress] = "10.0.0.7" },
		"no certificate":          func(l *coordinationv1.Lease) { l.Annotations[AnnotationCertificate] = "" },
		"a short certificate":     func(l *coordinationv1.Lease) { l.Annotations[AnnotationCertificate] = "sha256:00" },
		"a protocol of no number": func(l *coordinationv1.Lease) { l.Annotations[AnnotationProtocol] = "v1" },
		"no time":                 func(l *coordinationv1.Lease) { l.Spec.RenewTime = nil },
		"no duration":             func(l *coordinationv1.Lease) { l.Spec.LeaseDurationSeconds = nil },
	} {
		t.Run(name, func(t *testing.T) {
			l := lease()
			spoil(l)
			if got, err := Read(l); err == nil {
				t.Errorf("read as %+v", got)
			}
		})
	}
}

func TestAnAgentThatSaysNothingSensibleOfItsNodeCanStillBeCalled(t *testing.T) {
	l := lease()
	l.Annotations[AnnotationPlatform] = `{"os":"linux"}`
	a, err := Read(l)
	if err != nil || a.Platform != nil {
		t.Errorf("%+v, %v", a, err)
	}
	a.Fill(l)
	if _, told := l.Annotations[AnnotationPlatform]; told {
		t.Error("what an agent before it said of the node stays")
	}
}

func TestAnAgentIsGoneWhenItHasNotRenewed(t *testing.T) {
	a := announced()
	if !a.Alive(moment.Add(LeaseDuration - time.Second)) {
		t.Error("gone too early")
	}
	if a.Alive(moment.Add(LeaseDuration)) {
		t.Error("alive for ever")
	}
	a.Duration = 24 * time.Hour
	if a.Alive(moment.Add(LeaseDuration)) {
		t.Error("an agent says itself how long it counts as alive")
	}
}

func TestANodeWhoseClockIsBehindIsNotGone(t *testing.T) {
	l := lease()
	written := metav1.NewTime(moment.Add(10 * time.Minute))
	l.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "stasis-agent", Operation: metav1.ManagedFieldsOperationUpdate, Time: &written}}
	a, err := Read(l)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Alive(moment.Add(10*time.Minute + time.Second)) {
		t.Error("gone, though the API server has just recorded its write")
	}
}
