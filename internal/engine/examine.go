package engine

// Examination is what was found out about a running sandbox that bears on a
// checkpoint of it. Nothing was frozen for it, and what it says may change at any
// moment.
type Examination struct {
	// Problems say why the sandbox cannot be captured. Each is enough.
	Problems []string
	// Whole says that the engine restores the sandbox as a whole: nothing can run in it
	// before the last container has been started.
	Whole bool
	// Outside are the established TCP connections whose other end is not in the sandbox.
	Outside []Connection
}

// Connection is an established TCP connection of a container; its ends are
// "address:port".
type Connection struct{ Container, Local, Remote string }
