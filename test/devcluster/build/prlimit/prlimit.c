// Lets a machine that withholds CAP_SYS_RESOURCE from root behave as others do in one
// respect: root may read the resource limits of another user's process.
//
// The kernel demands that capability of prlimit(2) for processes of other users, even only
// to read, and CRIU reads the limits of everything it dumps. /proc/PID/limits shows the
// same figures to root without it. This library, named in /etc/ld.so.preload, answers from
// there when the kernel refuses. Setting limits stays refused.
//
// It has no constructor, opens nothing by itself and needs no library, so that it can be
// loaded into any program, also one with a C library of its own. x86-64 and arm64.
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#define EXPORT __attribute__((visibility("default")))

static long kernel(long nr, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
#error "no system call convention known for this architecture"
#endif
}

// titles are the lines of /proc/PID/limits, by the numbers of RLIMIT_*.
static const char *const titles[] = {
	[RLIMIT_CPU] = "Max cpu time",
	[RLIMIT_FSIZE] = "Max file size",
	[RLIMIT_DATA] = "Max data size",
	[RLIMIT_STACK] = "Max stack size",
	[RLIMIT_CORE] = "Max core file size",
	[RLIMIT_RSS] = "Max resident set",
	[RLIMIT_NPROC] = "Max processes",
	[RLIMIT_NOFILE] = "Max open files",
	[RLIMIT_MEMLOCK] = "Max locked memory",
	[RLIMIT_AS] = "Max address space",
	[RLIMIT_LOCKS] = "Max file locks",
	[RLIMIT_SIGPENDING] = "Max pending signals",
	[RLIMIT_MSGQUEUE] = "Max msgqueue size",
	[RLIMIT_NICE] = "Max nice priority",
	[RLIMIT_RTPRIO] = "Max realtime priority",
	[RLIMIT_RTTIME] = "Max realtime timeout",
};

static const char *skip(const char *s, const char *end, char c) {
	while (s < end && *s == c)
		s++;
	return s;
}

// value reads "unlimited" or a number at *s and moves *s behind it.
static int value(const char **s, const char *end, uint64_t *out) {
	const char *p = skip(*s, end, ' ');
	if (p < end && *p == 'u') {
		while (p < end && *p != ' ' && *p != '\n')
			p++;
		*out = ~(uint64_t)0;
	} else {
		uint64_t n = 0;
		const char *first = p;
		for (; p < end && *p >= '0' && *p <= '9'; p++)
			n = n * 10 + (uint64_t)(*p - '0');
		if (p == first)
			return 0;
		*out = n;
	}
	*s = p;
	return 1;
}

static int from_proc(long pid, unsigned long resource, struct rlimit64 *old) {
	char path[32], text[4096];
	size_t n = 0;
	const char *prefix = "/proc/", *suffix = "/limits";
	char digits[20];
	int k = 0;

	if (resource >= sizeof titles / sizeof *titles || pid <= 0)
		return 0;
	while (*prefix)
		path[n++] = *prefix++;
	for (long rest = pid; rest; rest /= 10)
		digits[k++] = (char)('0' + rest % 10);
	if (k > 10)
		return 0;
	while (k)
		path[n++] = digits[--k];
	while (*suffix)
		path[n++] = *suffix++;
	path[n] = 0;

	long fd = kernel(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
	if (fd < 0)
		return 0;
	size_t have = 0;
	for (long got; have < sizeof text && (got = kernel(SYS_read, fd, (long)(text + have), (long)(sizeof text - have), 0, 0, 0)) > 0;)
		have += (size_t)got;
	kernel(SYS_close, fd, 0, 0, 0, 0, 0);

	const char *end = text + have;
	for (const char *line = text; line < end;) {
		const char *p = line, *t = titles[resource];
		while (*t && p < end && *p == *t)
			p++, t++;
		if (!*t && p < end && *p == ' ') {
			uint64_t soft, hard;
			if (!value(&p, end, &soft) || !value(&p, end, &hard))
				return 0;
			old->rlim_cur = soft;
			old->rlim_max = hard;
			return 1;
		}
		while (line < end && *line != '\n')
			line++;
		line++;
	}
	return 0;
}

static long query(long pid, unsigned long resource, const void *new, struct rlimit64 *old) {
	long result = kernel(SYS_prlimit64, pid, (long)resource, (long)new, (long)old, 0, 0);
	if (result == -EPERM && !new && old && from_proc(pid, resource, old))
		return 0;
	return result;
}

static long conclude(long result) {
	if (result < 0 && result >= -4095) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

EXPORT int prlimit64(pid_t pid, __rlimit_resource_t resource, const struct rlimit64 *new, struct rlimit64 *old) {
	return (int)conclude(query(pid, resource, new, old));
}

EXPORT int prlimit(pid_t pid, __rlimit_resource_t resource, const struct rlimit *new, struct rlimit *old) {
	// On 64-bit machines both structures are the same.
	return (int)conclude(query(pid, resource, new, (struct rlimit64 *)old));
}

// CRIU makes the call by its number.
EXPORT long syscall(long nr, ...) {
	va_list args;
	va_start(args, nr);
	long a = va_arg(args, long), b = va_arg(args, long), c = va_arg(args, long);
	long d = va_arg(args, long), e = va_arg(args, long), f = va_arg(args, long);
	va_end(args);
	if (nr == SYS_prlimit64)
		return conclude(query(a, (unsigned long)b, (const void *)c, (struct rlimit64 *)d));
	return conclude(kernel(nr, a, b, c, d, e, f));
}
