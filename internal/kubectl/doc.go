// Package kubectl holds the kubectl plugins: "kubectl checkpoint POD" takes a
// checkpoint of a running Pod and "kubectl restore CHECKPOINT" makes a new Pod
// from one. Both follow kubectl's conventions: objects and results go to standard
// output, progress and errors to standard error.
//
// Exit codes (ExitOK and the others) are part of the interface.
package kubectl
