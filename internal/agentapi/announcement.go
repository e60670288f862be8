package agentapi

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/internal/platform"
)

// An agent that has not renewed its Lease for LeaseDuration counts as gone. The
// duration outlasts an agent's restart and the replacement of its Pod, so the Lease
// stays when an agent ends. RenewEvery leaves room for two writes that fail.
const (
	LeaseDuration = 60 * time.Second
	RenewEvery    = 20 * time.Second
)

// LeaseName is the name of the Lease of a node's agent. The policy
// stasis-agent-lease holds each agent to its own.
func LeaseName(node string) string { return LeasePrefix + node }

// Announcement is what an agent says about itself.
type Announcement struct {
	Node string
	// Address is where it serves: IP:port.
	Address string
	// Certificate is the Fingerprint of the certificate that it serves with.
	Certificate string
	// Protocol is the Version of this package that it was built with.
	Protocol int
	// Program is the program's version, for people.
	Program string
	// Platform is what its node is to checkpoints; nil if it does not say.
	Platform *platform.Description
	// Holder is the name of the agent's Pod.
	Holder string
	// Renewed is when it last said so.
	Renewed time.Time
	// Duration is how long that holds.
	Duration time.Duration
}

// Fingerprint of a certificate, given as DER.
func Fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Fill writes the announcement into a Lease that is new or was read, and leaves
// what others wrote there as it is.
func (a Announcement) Fill(lease *coordinationv1.Lease) {
	if lease.Annotations == nil {
		lease.Annotations = map[string]string{}
	}
	lease.Annotations[AnnotationAddress] = a.Address
	lease.Annotations[AnnotationCertificate] = a.Certificate
	lease.Annotations[AnnotationProtocol] = strconv.Itoa(a.Protocol)
	lease.Annotations[AnnotationVersion] = a.Program
	delete(lease.Annotations, AnnotationPlatform)
	if a.Platform != nil {
		if text, err := a.Platform.Encode(); err == nil { // one that cannot be told is as good as none
			lease.Annotations[AnnotationPlatform] = text
		}
	}
	seconds := int32(a.Duration / time.Second)
	renewed := metav1.NewMicroTime(a.Renewed)
	holder := a.Holder
	lease.Spec.HolderIdentity = &holder
	lease.Spec.LeaseDurationSeconds = &seconds
	lease.Spec.RenewTime = &renewed
}

// Read reads the announcement from a Lease. What is not as Fill writes it is an
// error: it comes from a node and decides whom the API server shows its token.
func Read(lease *coordinationv1.Lease) (Announcement, error) {
	node, ok := strings.CutPrefix(lease.Name, LeasePrefix)
	if !ok || node == "" {
		return Announcement{}, fmt.Errorf("lease %q is no agent's: its name does not begin with %q", lease.Name, LeasePrefix)
	}
	wrong := func(what string, err error) (Announcement, error) {
		return Announcement{}, fmt.Errorf("lease %q of the agent of node %q: %s: %w", lease.Name, node, what, err)
	}
	a := Announcement{
		Node:        node,
		Address:     lease.Annotations[AnnotationAddress],
		Certificate: lease.Annotations[AnnotationCertificate],
		Program:     lease.Annotations[AnnotationVersion],
	}
	if _, err := netip.ParseAddrPort(a.Address); err != nil {
		return wrong("annotation "+AnnotationAddress, err)
	}
	if err := checkFingerprint(a.Certificate); err != nil {
		return wrong("annotation "+AnnotationCertificate, err)
	}
	protocol, err := strconv.Atoi(lease.Annotations[AnnotationProtocol])
	if err != nil {
		return wrong("annotation "+AnnotationProtocol, err)
	}
	a.Protocol = protocol
	// An agent that says what makes no sense of its node can still be called.
	if d, err := platform.Decode(lease.Annotations[AnnotationPlatform]); err == nil {
		a.Platform = &d
	}
	if lease.Spec.RenewTime == nil || lease.Spec.LeaseDurationSeconds == nil {
		return wrong("spec", fmt.Errorf("renewTime or leaseDurationSeconds is missing"))
	}
	if lease.Spec.HolderIdentity != nil {
		a.Holder = *lease.Spec.HolderIdentity
	}
	a.Renewed = lease.Spec.RenewTime.Time
	a.Duration = time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second
	// The API server's own record of the write: it holds where a node's clock is
	// behind.
	for _, entry := range lease.ManagedFields {
		if entry.Time != nil && entry.Time.After(a.Renewed) {
			a.Renewed = entry.Time.Time
		}
	}
	return a, nil
}

// Alive says whether the announcement still holds. No agent speaks for longer than
// LeaseDuration, whatever it wrote.
func (a Announcement) Alive(now time.Time) bool {
	return now.Sub(a.Renewed) < min(a.Duration, LeaseDuration)
}

func checkFingerprint(s string) error {
	digits, ok := strings.CutPrefix(s, "sha256:")
	if !ok {
		return fmt.Errorf("%.80q is not sha256:HEX", s)
	}
	if b, err := hex.DecodeString(digits); err != nil || len(b) != sha256.Size || digits != strings.ToLower(digits) {
		return fmt.Errorf("%.80q has not 64 hexadecimal digits", s)
	}
	return nil
}
