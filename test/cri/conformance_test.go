package cri_test

import (
	"fmt"
	"testing"

	"podstasis.dev/stasis/test/cri/conformance"
)

// C2: what knows nothing of Stasis finds nothing amiss.
func TestTheServiceConformsToTheCRI(t *testing.T) {
	n := theNode
	conformance.Run(t, conformance.Config{
		Server: n.stasis, Runtime: n.runtime, Image: image, CgroupParent: cgroupsOfSuite(), Directory: scratch, Local: n.host.Path,
	})
}

// cgroupsOfSuite says where the Pods that the conformance suite makes have their cgroups,
// which are removed with all others.
func cgroupsOfSuite() string {
	name := fmt.Sprintf("suite-%d", len(podNames))
	podNames[name] = true
	if bySystemd {
		return sliceOf(name + "-%") // which is in the other
	}
	return cgroupsOfPods + name + "/%"
}
