// Package cow captures the memory of processes after they have been let go. Each of
// them is made to fork in the moment in which it would run on; the children never run,
// so their memory stays what it was, and is read at leisure, while the kernel copies
// what the processes write to. A process notices nothing but that a process ID is used
// up: registers, signals, interrupted system calls and results of wait(2) stay its own.
//
// All of it is done by a helper, a process outside of everything that the agent's end
// takes along. When it is killed, at any moment, the kernel lets go of the processes
// that it holds and kills the children. A process that is let go while it executes what
// was put into it finishes that by itself and goes on where it was (see stub).
//
// The helper is stasis-restore under another name.
package cow
