package agentapi

import (
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

// The announcements of agents of each version of the protocol are kept as they were written,
// and beside them one of a version that does not exist yet and says more. A node's agent and
// the controller are upgraded one after the other: each reads what the other says.
func TestAnnouncementsOfOlderAndNewerAgentsAreReadAndOnlyTooOldOnesAreRefused(t *testing.T) {
	for file, want := range map[string]struct {
		protocol int
		format   int // that its node reads; 0 if it does not say what the node is
		program  string
		serves   map[int]bool // calls that need a version
	}{
		"protocol-1.json": {1, 0, "v0.0.1", map[int]bool{VersionCalls: true, VersionPeers: false}},
		"protocol-2.json": {2, 1, "v0.1.0", map[int]bool{VersionCalls: true, VersionPeers: true}},
		"protocol-3.json": {3, 2, "v0.2.0", map[int]bool{VersionCalls: true, VersionPeers: true}},
	} {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile("testdata/" + file)
			if err != nil {
				t.Fatal(err)
			}
			var lease coordinationv1.Lease
			if err := json.Unmarshal(text, &lease); err != nil {
				t.Fatal(err)
			}
			a, err := Read(&lease)
			if err != nil {
				t.Fatal(err)
			}
			if a.Protocol != want.protocol || a.Program != want.program || a.Address != "10.128.1.7:41871" || a.Node != "node-1" || a.Holder == "" || a.Duration != time.Minute {
				t.Errorf("read as %+v", a)
			}
			format := 0
			if a.Platform != nil {
				format = a.Platform.FormatVersion
			}
			if format != want.format {
				t.Errorf("its node reads format %d, want %d", format, want.format)
			}
			l := &Locator{Reader: fake.NewClientBuilder().WithObjects(&lease).Build(), Namespace: lease.Namespace, Clock: clocktesting.NewFakePassiveClock(a.Renewed.Add(time.Second)), Blind: true}
			for needs, serves := range want.serves {
				_, err := l.Locate(t.Context(), "node-1", needs)
				var no *Unreachable
				if serves && err != nil || !serves && (!errors.As(err, &no) || no.Reason != TooOld) {
					t.Errorf("a call that needs version %d: %v", needs, err)
				}
			}
		})
	}
	if _, err := os.Stat("testdata/protocol-" + string('0'+rune(Version)) + ".json"); err != nil {
		t.Errorf("what an agent of this version announces is not kept for later ones: %v", err)
	}
}

// An agent takes over the Lease of the one before it, which may have been a newer one: after
// a downgrade what that has said of itself does not stand for this one.
func TestAnOlderAgentTakesOverTheLeaseOfANewerOne(t *testing.T) {
	text, err := os.ReadFile("testdata/protocol-3.json")
	if err != nil {
		t.Fatal(err)
	}
	var lease coordinationv1.Lease
	if err := json.Unmarshal(text, &lease); err != nil {
		t.Fatal(err)
	}
	announced().Fill(&lease)
	got, err := Read(&lease)
	if err != nil || got.Protocol != announced().Protocol || got.Platform == nil || got.Platform.FormatVersion != 1 {
		t.Errorf("read as %+v, %v", got, err)
	}
	if lease.Annotations["checkpoint.podstasis.dev/later"] != "said" {
		t.Error("an annotation that this version does not know is gone")
	}
}
