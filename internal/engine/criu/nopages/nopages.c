/*
 * A library that CRIU is started with (ld.so(8), --preload) to capture everything of
 * processes but their memory, which is read from children of theirs once they run again
 * (package cow).
 *
 * CRIU asks the kernel which pages of a process there are (ioctl(2), PAGEMAP_SCAN), and
 * learns that none are. Other questions, such as after guard pages, are the kernel's to
 * answer, or another library's (queues.c). The vDSO it writes without asking.
 *
 * A CRIU that asks in another way writes all memory: that is seen by its images.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/ioctl.h>

struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define SCAN _IOWR('f', 16, struct scan)
#define IS_PRESENT (1 << 3)

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	if (request == SCAN) {
		struct scan *scan = argument;
		if (scan->vec_len > 0 && (scan->category_anyof_mask & IS_PRESENT)) {
			scan->walk_end = scan->end;
			return 0;
		}
	}
	static int (*next)(int, unsigned long, ...);
	if (!next)
		next = dlsym(RTLD_NEXT, "ioctl");
	return next(fd, request, argument);
}
