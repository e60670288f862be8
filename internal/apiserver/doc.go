// Package apiserver is the aggregated API subresources.checkpoint.podstasis.dev
// (KEP-5901): a checkpoint by one call, and what a checkpoint holds, for users
// without a way to any node.
//
// It stores nothing. A checkpoint that is asked for here is a PodCheckpoint like any
// other; what a checkpoint holds comes from the agent of its node and passes
// through. Who somebody is and what they may do is asked of the Kubernetes API
// server; its address of the aggregated API, the APIService, lasts no longer than
// somebody answers there (package registration).
package apiserver
