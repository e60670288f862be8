package v1alpha1

// GroupName is the API group of the aggregated API.
const GroupName = "subresources.checkpoint.podstasis.dev"

// Resources of the group, as RBAC names them.
const (
	ResourceCheckpoint = "pods/checkpoint"         // create: take a checkpoint of a Pod
	ResourceArchive    = "podcheckpoints/archive"  // get: bring a checkpoint out, with all that the Pod knew; update: bring one in
	ResourceContents   = "podcheckpoints/contents" // get: what is inside, values masked

	ResourceVerify       = "podcheckpoints/verify"    // create: read it in its store, and compare
	ResourceStoreVerify  = "checkpointstores/verify"  // create: the same with all that a store holds
	ResourceStoreCollect = "checkpointstores/collect" // create: remove what no checkpoint uses
)

// MaxWaitSeconds is the longest that a request for a checkpoint waits: the API
// server ends ordinary calls after 60 s.
const MaxWaitSeconds = 50

// QueryContainer selects one container of a checkpoint: its archive has the layout
// that the kubelet's checkpoint endpoint writes. Without it the whole Pod's is meant.
const QueryContainer = "container"
