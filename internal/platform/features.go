package platform

import (
	"slices"
	"strings"
)

// instructions are the x86 features that a program may come to rely on, once it has
// seen them, by the kernel's names in /proc/cpuinfo. These are what "criu cpuinfo
// check --cpu-cap ins" compares, and those that have come since. The rest of what
// /proc/cpuinfo lists is the kernel's own affair: mitigations, virtualisation,
// clocks.
var instructions = words(`
	fpu tsc cx8 sep cmov clflush mmx fxsr sse sse2
	syscall mmxext rdtscp lm 3dnowext 3dnow
	pni pclmulqdq monitor ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand
	lahf_lm abm sse4a misalignsse 3dnowprefetch xop fma4 tbm
	fsgsbase bmi1 hle avx2 bmi2 erms rtm mpx rdseed adx clflushopt clwb sha_ni
	avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2
	avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_bf16 avx512_fp16
	avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma avx_ne_convert avx10 gfni vaes vpclmulqdq sha512 sm3 sm4
	amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex amx_avx512 amx_tf32 amx_fp8 amx_movrs
	xsaveopt xsavec xgetbv1 xsaves pku ospke rdpid cldemote movdiri movdir64b enqcmd waitpkg serialize tsxldtrk
	cmpccxadd raoint uintr prefetchiti movrs apx user_shstk clzero wbnoinvd mwaitx lwp rdpru
`)

func words(s string) map[string]bool {
	set := map[string]bool{}
	for _, w := range strings.Fields(s) {
		set[w] = true
	}
	return set
}

// Features reads from the text of /proc/cpuinfo the features that all CPUs have and
// that programs of the architecture may rely on, sorted.
func Features(cpuinfo, architecture string) []string {
	seen := map[string]int{}
	cpus := 0
	for line := range strings.Lines(cpuinfo) {
		key, value, found := strings.Cut(line, ":")
		if key = strings.TrimSpace(key); !found || key != "flags" && key != "Features" {
			continue
		}
		cpus++
		of := map[string]bool{}
		for _, f := range strings.Fields(value) {
			if !of[f] && (architecture != "amd64" || instructions[f]) {
				of[f] = true
				seen[f]++
			}
		}
	}
	features := []string{}
	for f, times := range seen {
		if times == cpus {
			features = append(features, f)
		}
	}
	slices.Sort(features)
	return features
}

// Without leaves features out of a description, by their names.
func (d Description) Without(features []string) Description {
	if d.CPU == nil || len(features) == 0 {
		return d
	}
	cpu := *d.CPU
	cpu.Features = slices.DeleteFunc(slices.Clone(cpu.Features), func(f string) bool { return slices.Contains(features, f) })
	d.CPU = &cpu
	return d
}
