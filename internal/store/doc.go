// Package store keeps checkpoints in a backend: content-addressed, each part once, small,
// and so that a change of one bit is found. docs/format.md is its format, precise enough
// to be implemented again.
//
// A checkpoint's files are cut into blocks: memory along pages, all else by content
// (cut.go). Blocks that the store does not have yet are compressed together in frames,
// and frames go into packs, objects of some 16 MiB that end with an index of their blocks
// (pack.go). What a file consists of is a list of extents, runs of blocks in packs
// (extents.go); a checkpoint's extents, labels and packs are its root (root.go), an object
// that is named by its digest. Who knows the root's digest needs to trust nothing else.
//
// Writers on many nodes need no lock (put.go): they show a lease while they write
// (lease.go), and the collector (collect.go) removes a pack only after it was seen
// without use and all who wrote at that time have ended.
package store
