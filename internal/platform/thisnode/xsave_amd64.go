package thisnode

// cpuid executes CPUID.
func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// xgetbv reads the register XCR0; only where the kernel uses XSAVE.
func xgetbv() (eax, edx uint32)

const (
	leafFeatures = 1
	bitOSXSave   = 1 << 27 // of ECX
	leafXSave    = 0xd
)

// xsave returns which components of a thread's registers the kernel saves, as bits
// of XCR0, and how many bytes they take. CRIU's images hold them in that form.
func xsave() (components int64, bytes int) {
	if _, _, ecx, _ := cpuid(leafFeatures, 0); ecx&bitOSXSave == 0 {
		return 0, 0
	}
	low, high := xgetbv()
	_, enabled, _, _ := cpuid(leafXSave, 0)
	return int64(uint64(high)<<32|uint64(low)) &^ (-1 << 63), int(enabled)
}
