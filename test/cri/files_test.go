package cri_test

import "testing"

// Most of a writable layer is copied before the freeze and its archive is written after
// the thaw. A process that writes its files in turn, and looks whether each holds what it
// wrote there the time before, notices one that is of any other moment than its memory.
func TestFilesAreOfTheMomentOfTheMemoryThoughMostAreCopiedBefore(t *testing.T) {
	// A file is written once in a second and some: it has settled for a while before it is
	// written again.
	c := container("writer", `mkdir /d; i=0; while :; do
		i=$((i+1)); echo $i > /d/$((i%200))
		if [ $i -gt 200 ]; then read v < /d/$(((i+1)%200)); [ "$v" = $((i-199)) ] || echo "file $(((i+1)%200)) holds $v at $i"; fi
		echo $i; usleep 6000
	done`)
	p := theNode.run(t, "runc", c)
	p.numbers(t, "writer", 300)
	for range 3 {
		dir, m := p.checkpoint(t)
		at := p.numbers(t, "writer", 1)
		restored := theNode.restore(t, dir, c)
		restored.numbers(t, "writer", 210) // it has looked at every file
		restored.remove(t)
		t.Logf("captured after %d writes, frozen for %v", at[len(at)-1], m.FreezeDuration)
	}
}
