// Package agentapi is what the API server of Stasis and the agents say to each
// other: HTTP over TLS, on a port of the agent's Pod.
//
// An agent announces itself in a Lease that only it may write: its address, the
// certificate that it serves with, and its version. The API server shows a token
// of its ServiceAccount, made for the one agent that it calls (Audience), which that
// agent has reviewed: what one node is shown is of no use to it at another. Agents
// know each other by the certificates that they announce.
package agentapi

// Version of this protocol. An agent that announces a lower one than a call needs
// is too old for it, and the caller says so without calling (A3).
const Version = 2

// What calls need at least.
const (
	VersionCalls = 1 // those of the API server of Stasis
	VersionPeers = 2 // those of other agents
)

// Audience of the tokens that the API server shows to the agent of a node, and the
// only one that this agent accepts.
func Audience(node string) string { return "stasis-agent/" + node }

// LeasePrefix and the node's name make the name of the agent's Lease, in the
// namespace that Stasis is installed in.
const LeasePrefix = "agent-"

// Annotations of the Lease.
const (
	AnnotationAddress     = "checkpoint.podstasis.dev/agent-address"     // IP:port
	AnnotationCertificate = "checkpoint.podstasis.dev/agent-certificate" // sha256:HEX of the certificate's DER
	AnnotationProtocol    = "checkpoint.podstasis.dev/agent-protocol"    // Version, in decimal
	AnnotationVersion     = "checkpoint.podstasis.dev/agent-version"     // of the program, for people
	AnnotationPlatform    = "checkpoint.podstasis.dev/agent-platform"    // what its node is to checkpoints, as JSON
)

// Paths, to be filled with the PodCheckpoint's UID.
//
//	GET, HEAD ArchivePath     the archive, or one container's (?container=NAME); Range, If-Range,
//	                          ETag; Want-Repr-Digest is answered by Repr-Digest (RFC 9530)
//	GET ContentsPath          a CheckpointContents, as JSON
//	POST PreflightPath        a PodCheckpoint that nobody has stored, as JSON, of a Pod of this
//	                          node; the answer is a CheckpointPreflight
//	PUT ImportPath            a part of an archive to import: Content-Range: bytes FIRST-LAST/SIZE,
//	                          or bytes */SIZE to ask; the answer's header Upload-Offset says
//	                          how many bytes are there
//
// Other agents fetch checkpoints to restore them (VersionPeers). They show no token but
// the certificate that they announced, and name a Pod of their node that is being
// restored (QueryNode, QueryPod, QueryPodUID):
//
//	GET FilePath              a file of the checkpoint: its manifest or one that this lists; Range
const (
	FilePath     = "/v1/peers/checkpoints/{uid}/files/{path...}"
	ArchivePath  = "/v1/checkpoints/{uid}/archive"
	ContentsPath = "/v1/checkpoints/{uid}/contents"
	ImportPath   = "/v1/imports/{uid}"
	// PreflightPath is not known to agents of before it; they answer 404.
	PreflightPath = "/v1/preflight"
)

// Who asks for FilePath, and for which Pod, which has the namespace of the checkpoint.
const (
	QueryNode   = "node"
	QueryPod    = "pod"
	QueryPodUID = "podUID"
)

// QueryContainer of ArchivePath selects one container.
const QueryContainer = "container"

// MaxPreflight bounds what is posted to PreflightPath, in bytes.
const MaxPreflight = 256 << 10

// MaxPart is the most that one part of an import holds, in bytes.
const MaxPart = 64 << 20

// HeaderUploadOffset says how many bytes of an import are there.
const HeaderUploadOffset = "Upload-Offset"
