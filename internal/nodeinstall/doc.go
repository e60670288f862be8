// Package nodeinstall puts onto a node what restoring Pods needs there, and
// takes it back: the OCI runtime and CRIU below /opt/stasis, and a runtime
// handler in containerd's configuration. containerd is restarted only when what
// it runs with is not what is wanted, and gets its old configuration back when
// it does not come up with the new one.
//
// Files of the container runtime are reached through its own mount namespace
// (package hostns), so that a node which is itself a container is no exception.
package nodeinstall
