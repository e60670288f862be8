package main

// row is one set of versions; what it does not name is what the development cluster pins.
type row struct {
	Kubernetes, Containerd, Runc string
	// Crun has crun run all Pods but restored ones.
	Crun bool
	// CRIU is the Debian release whose CRIU the agent installs (hack/criu.sh).
	CRIU string
	// Podman is the row of conmon, with which Podman and CRI-O start their OCI runtime: without
	// a cluster and without containerd.
	Podman bool
	// Emulated is the row of a machine with systemd and with control groups of version 2 alone
	// (test/matrix/emulated.sh), without Kubernetes.
	Emulated bool
}

// rows are pairs that people run: each minor version of Kubernetes with a containerd of its
// time, each containerd with the newest Kubernetes that its maintainers name for it, and
// each runc with a containerd that was released with it.
var rows = []row{
	{},
	{Containerd: "v2.3.7"},
	{Containerd: "v2.2.9", Runc: "v1.3.6"},
	{Containerd: "v2.1.9", Runc: "v1.3.6"},
	{Containerd: "v1.7.35", Runc: "v1.3.6"},
	{Containerd: "v1.7.35", Runc: "v1.1.14"},
	{Crun: true},
	{Kubernetes: "v1.36.3", Containerd: "v2.3.7"},
	{Kubernetes: "v1.35.4", Containerd: "v2.2.9", Runc: "v1.3.6"},
	{Kubernetes: "v1.34.4", Containerd: "v1.7.35", Runc: "v1.3.6"},
	{CRIU: "trixie"},
	{Podman: true},
	{Emulated: true},
}

// podmanTests are those of the row of conmon.
var podmanTests = []string{
	"TestAContainerThatConmonStartsRunsAsUnderRunc",
	"TestAContainerThatAsksConmonForARestoreThatNobodyPreparedIsRefused",
}

// emulatedTests are those of the row of systemd: the main job, and what has to do with control
// groups, which are other files in version 2 and other names where systemd makes them: freezes,
// limits, memory that is captured or restored while a Pod runs, and the death of whoever was at it.
var emulatedTests = []string{
	"TestARestoredPodContinuesWhereItsSourceWasCaptured",
	"TestAllContainersAreCapturedAtOneMoment",
	"TestARestoredContainerSeesOfCgroupsWhatAnyContainerDoes",
	"TestABusyContainerUnderACPULimitFreezesAndHasItsLimitBackAfter",
	"TestWhatTheNewConfigurationSuppliesIsTheRestoredPodsOwn",
	"TestMemoryThatIsReadWhileThePodRunsIsThatOfTheFreeze",
	"TestProcessesThatRunBeforeTheyHaveTheirMemoryNeverMissIt",
	"TestAContainerWhoseMemoryCannotBeGivenIsKilledAndNeverRunsOnAnythingElse",
	"TestAPodWhoseAgentIsKilledInTheFreezeWindowRunsOn",
	"TestAContainerWhoseRestoreIsInterruptedLeavesNothingBehind",
}

// tests are the main job and five more, of what differs most between runtimes: several
// containers, restores on another node, sidecars and hooks, restarts, and much memory.
var tests = []string{
	"TestTheMainJobARunningPodIsCheckpointedAndRestoredTwiceAfterItIsGone",
	"TestTwoContainersNeverDisagreeAfterARestore",
	"TestACheckpointOfOneNodeIsRestoredOnAnother",
	"TestSidecarsAndContainersWithHooksComeBackRunning",
	"TestAContainerOfARestoredPodThatRestartsStartsAnew",
	"TestAPodWithMuchMemoryIsCapturedWhileItRunsAndRunsBeforeItHasItAll",
}
