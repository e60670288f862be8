package v1alpha1

// Annotations of Pods. All of them are passed to the node by the restoring
// runtime handler's pod_annotations pattern "checkpoint.podstasis.dev/*".
const (
	// AnnotationRestoreFrom names the PodCheckpoint, in the Pod's namespace, that
	// the Pod is restored from. It stands in for spec.restoreFrom of KEP-5823 and
	// cannot be added or changed once the Pod exists (P20).
	AnnotationRestoreFrom = GroupName + "/restore-from"
	// AnnotationRestoreFromUID pins the PodCheckpoint's UID. Admission writes it,
	// or the controller when it takes the gate off; users never do.
	AnnotationRestoreFromUID = GroupName + "/restore-from-uid"
	// AnnotationNamedRuntimeClass is the RuntimeClass that a restored Pod's manifest names,
	// in place of which admission has set one of Stasis'. A manifest that names it restores
	// from checkpoints of that Pod, too. It decides nothing else.
	AnnotationNamedRuntimeClass = GroupName + "/named-runtime-class"
	// AnnotationGivenUp tells when the restore of a Pod was given up. The agent writes
	// it together with the phase Failed.
	AnnotationGivenUp = GroupName + "/given-up"
	// AnnotationRestoreMemory says when a restored Pod's processes run: lazy, at once, and
	// their memory comes when they touch it; eager, when all of it is there; auto, the
	// default, which of the two by how much it is, as the node's agent is set, and eager
	// where its data are on another node or in a store.
	AnnotationRestoreMemory = GroupName + "/restore-memory"
	// AnnotationRestoreTicket is what the CRI service's RestorePod hands to the
	// runtime it drives: a random, single-use name for one prepared restore. It is
	// not for Pods: admission refuses it.
	AnnotationRestoreTicket = GroupName + "/restore-ticket"
)

// Annotations of Pods that hold hooks: what is run in the Pod around its checkpoints
// and after its restore (X7). They can be set at a Pod's creation and taken off, not
// added or changed later: who may write a Pod's metadata may not run commands in it.
const (
	// AnnotationPreCheckpoint is run before each checkpoint of the Pod, while it runs.
	AnnotationPreCheckpoint = GroupName + "/pre-checkpoint"
	// AnnotationPostCheckpoint is run in the source Pod when it runs again, also
	// after a checkpoint that failed: what AnnotationPreCheckpoint stopped goes on.
	AnnotationPostCheckpoint = GroupName + "/post-checkpoint"
	// AnnotationPostRestore is run in a Pod that was restored, once all its containers go on.
	AnnotationPostRestore = GroupName + "/post-restore"
)

// AnnotationRequestedBy of a PodCheckpoint names the user whose call to pods/checkpoint
// it was created for (KEP-5901). Admission lets nobody but Stasis write it.
const AnnotationRequestedBy = GroupName + "/requested-by"

const (
	// SchedulingGate holds back a Pod whose PodCheckpoint is not Ready yet.
	SchedulingGate = GroupName + "/not-ready"
	// FinalizerData keeps a PodCheckpoint until the node that holds its data has
	// removed them.
	FinalizerData = GroupName + "/data"
	// FinalizerStore keeps a PodCheckpoint with spec.storeName until the controller has
	// removed it from the store. Admission sets it.
	FinalizerStore = GroupName + "/store"
	// RuntimeClassStasis is the RuntimeClass, and the runtime handler, of Pods
	// restored by the CRIU engine.
	RuntimeClassStasis = "stasis"
	// RuntimeClassGVisor is that of Pods restored by the gVisor engine.
	RuntimeClassGVisor = "stasis-gvisor"
	// VerbRestore is the RBAC verb on a named PodCheckpoint that lets its holder
	// restore it.
	VerbRestore = "restore"
	// VerbImport is the RBAC verb on podcheckpoints that lets its holder create one
	// with spec.import.
	VerbImport = "import"
)

// LabelAllowed with the value "false" on a Pod forbids checkpoints of it (P35).
// On a Namespace, "true" lets it have checkpoints where config/opt-in is applied.
const LabelAllowed = GroupName + "/allowed"

// LabelRunsPrefix and the class of a platform make a label of Nodes, with the value
// LabelRunsValue: the node can restore checkpoints that were taken on such a platform.
// Only stasis-controller writes these labels, by what the node's agent says of it.
// A Pod that was restored keeps the label that it requires on its node.
const (
	LabelRunsPrefix = "runs." + GroupName + "/"
	LabelRunsValue  = "true"
)

// PodCheckpointReady is the type of the one condition that tells a
// PodCheckpoint's progress (P3).
const PodCheckpointReady = "Ready"

// Reasons of the Ready condition.
const (
	ReasonPending              = "Pending"              // False: nobody has acted yet
	ReasonCheckpointInProgress = "CheckpointInProgress" // False: the agent is at work
	ReasonCheckpointCompleted  = "CheckpointCompleted"  // True: terminal
	ReasonCheckpointFailed     = "CheckpointFailed"     // False: terminal, the message says why
	ReasonSourcePodReplaced    = "SourcePodReplaced"    // False: terminal, the live Pod has another UID
)

// CheckpointStoreReady is the type of a CheckpointStore's condition.
const CheckpointStoreReady = "Ready"

// Reasons of a CheckpointStore's condition Ready, and of the events that tell of it. But
// for the first its status is False.
const (
	ReasonStoreReady         = "StoreReady"
	ReasonStoreUnreachable   = "StoreUnreachable"   // the server or the directory does not answer as it should
	ReasonCredentialsInvalid = "CredentialsInvalid" // the Secret of credentials is missing, incomplete, or refused by the server
	ReasonKeyInvalid         = "KeyInvalid"         // the Secret of keys is missing, or holds none that opens the store
	ReasonStoreReplaced      = "StoreReplaced"      // what is there is not the store of status.storeID
	ReasonStoreInvalid       = "StoreInvalid"       // the object says what no store of its type can be
	ReasonStoreCorrupt       = "StoreCorrupt"       // what is there was changed by somebody else
	ReasonStoreFull          = "StoreFull"          // there is no room on the device, or by the server's quota
)

// Labels of a checkpoint in a store: whose it is.
const (
	StoreLabelCluster   = "cluster"   // status.clusterID of the CheckpointStore: the UID of the namespace kube-system
	StoreLabelNamespace = "namespace" // of the PodCheckpoint
	StoreLabelName      = "name"      // of the PodCheckpoint
	StoreLabelUID       = "uid"       // of the PodCheckpoint
	StoreLabelPod       = "pod"       // name of the source Pod
	StoreLabelPodUID    = "podUID"
	StoreLabelNode      = "node"     // that it was taken on
	StoreLabelWorkload  = "workload" // KIND/NAME of the Pod's controller, if it has one
)

// Condition types on Pods.
const (
	PodConditionCheckpointing  = GroupName + "/Checkpointing"  // True while the Pod is being checkpointed, gone after
	PodConditionRestoring      = GroupName + "/Restoring"      // True while the Pod is being restored
	PodConditionMemoryRestored = GroupName + "/MemoryRestored" // on Pods that run before all their memory has come to their node: False until it is there
)

// Reasons of the condition MemoryRestored of Pods. As long as it is False with another
// than MemoryLost the Pod needs its PodCheckpoint, and a deletion of that waits.
const (
	ReasonMemoryComing   = "MemoryComing"      // False: it comes while the Pod runs
	ReasonMemoryLost     = EventMemoryLost     // False: no more is to come, and a container was killed for it
	ReasonMemoryRestored = EventMemoryRestored // True: all is there
)

// Reasons of events on the PodCheckpoint and on its source Pod.
const (
	EventCheckpointingPod    = "CheckpointingPod"    // on the Pod: a checkpoint of it begins
	EventCheckpointStarted   = "CheckpointStarted"   // the agent is at work
	EventCheckpointSucceeded = "CheckpointSucceeded" // the checkpoint is Ready
	EventCheckpointFailed    = "CheckpointFailed"    // the checkpoint ended without data; the message says why
	EventCheckpointWarning   = "CheckpointWarning"   // something in the Pod will not come back, or hardly

	EventPreCheckpointHookFailed     = "PreCheckpointHookFailed"     // on the Pod
	EventPreCheckpointHookSucceeded  = "PreCheckpointHookSucceeded"  // on the Pod
	EventPostCheckpointHookFailed    = "PostCheckpointHookFailed"    // on the Pod: what stood still for the checkpoint may still do
	EventPostCheckpointHookSucceeded = "PostCheckpointHookSucceeded" // on the Pod
)

// Reasons of events that have to do with stores.
const (
	EventDeletionDelayed     = "DeletionDelayed"     // on the PodCheckpoint: its data cannot be removed yet; the message says why, or which Pod needs them
	EventLeftInStore         = "LeftInStore"         // on the PodCheckpoint: its store is gone, and what that held stays there
	EventDeletedByRetention  = "DeletedByRetention"  // on the PodCheckpoint: by spec.retention of its store
	EventOrphanDeleted       = "OrphanDeleted"       // on the CheckpointStore: it held a checkpoint of which this cluster has no PodCheckpoint
	EventKeyRotated          = "KeyRotated"          // on the CheckpointStore: the last key in the alphabet opens it now, and no other
	EventCollectionFailed    = "CollectionFailed"    // on the CheckpointStore: what nothing uses was not looked for to the end
	EventCheckpointsUnusable = "CheckpointsUnusable" // on the CheckpointStore: checkpoints in it cannot be read
)

// Reasons of events on a restoring Pod (P23).
const (
	EventCheckpointNotReady       = "CheckpointNotReady"       // there is no such checkpoint, or it is not Ready: the Pod waits
	EventCheckpointWrongNode      = "CheckpointWrongNode"      // the Pod is on a node that cannot restore the checkpoint; the message says what it lacks
	EventCheckpointFetching       = "CheckpointFetching"       // the data are being brought to the node: the Pod waits
	EventCheckpointFetched        = "CheckpointFetched"        // the data have been brought to the node, and are whole
	EventCheckpointFetchFailed    = "CheckpointFetchFailed"    // the data could not be brought to the node, yet; it is tried again
	EventPodSpecMismatch          = "PodSpecMismatch"          // the Pod differs from the one that was checkpointed; the message says where
	EventCheckpointDataMissing    = "CheckpointDataMissing"    // files of the checkpoint are not there
	EventCheckpointDataCorrupt    = "CheckpointDataCorrupt"    // files of the checkpoint are not as they were written
	EventSourcePodRunning         = "SourcePodRunning"         // the source still writes to a volume for one writer: the Pod waits for its end
	EventRestoreInProgress        = "RestoreInProgress"        // the data are whole and the restore begins
	EventRestoreFailed            = "RestoreFailed"            // a container could not be restored
	EventRestoreSucceeded         = "RestoreSucceeded"         // all containers go on
	EventMemoryRestored           = "MemoryRestored"           // a container that ran before all its memory was there has it now
	EventMemoryLost               = "MemoryLost"               // it could not be given all, and was killed
	EventPostRestoreHookSucceeded = "PostRestoreHookSucceeded" // all its post-restore hooks did
	EventPostRestoreHookFailed    = "PostRestoreHookFailed"    // one did not; the message says which and what it put out
	EventRestoreGivenUp           = "RestoreGivenUp"           // it kept failing: the Pod is Failed now
)
