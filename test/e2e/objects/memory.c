// Mappings, of one process and of several.
#include "objects.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGES = 64 };

static size_t page;
static char *map;
static int fd;

static char *mapped(size_t size, int protection, int flags, int file) {
	char *p = mmap(NULL, size, protection, flags, file, 0);
	if (p == MAP_FAILED) failed("mmap: %s", strerror(errno));
	return p;
}

static void fill(char *p) {
	for (int i = 0; i < PAGES; i += 2) memset(p + i * page, 'A' + i % 26, page); // every other page is touched
}

static void full(const char *p) {
	for (int i = 0; i < PAGES; i++)
		for (size_t j = 0; j < page; j += 64) {
			char want = i % 2 ? 0 : 'A' + i % 26;
			need(p[i * page + j] == want, "page %d holds %d", i, p[i * page + j]);
		}
}

static void set_up_private(void) {
	page = sysconf(_SC_PAGESIZE);
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	fill(map);
	ok(mprotect(map, page, PROT_READ));
	ok(madvise(map + page, page, MADV_DONTFORK));
}

// protection finds a mapping in /proc/self/maps.
static void protection(const void *p, const char *wanted) {
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	need(maps, "no /proc/self/maps");
	while (fgets(line, sizeof line, maps)) {
		unsigned long from, to;
		char mode[8];
		if (sscanf(line, "%lx-%lx %7s", &from, &to, mode) == 3 && (unsigned long)p >= from && (unsigned long)p < to) {
			fclose(maps);
			need(strcmp(mode, wanted) == 0, "a mapping is %s, not %s", mode, wanted);
			return;
		}
	}
	fclose(maps);
	failed("a mapping is gone");
}

static void verify_private(void) {
	full(map);
	protection(map, "r--p");
	protection(map + page, "rw-p");
}

static void echo_shared(void) {
	volatile char *ask = map;
	for (;;) {
		if (ask[0] == '?') ask[1] = '!', ask[0] = 0;
		usleep(1000);
	}
}

// another asks the process that shares the memory.
static void another_answers(void) {
	volatile char *ask = map;
	ask[1] = 0;
	ask[0] = '?';
	for (int i = 0; i < 10000 && ask[1] != '!'; i++) usleep(1000);
	need(ask[1] == '!', "the other process does not see what is written");
}

static void set_up_shared_anonymous(void) {
	page = sysconf(_SC_PAGESIZE);
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	fill(map + page * 0);
	start(echo_shared);
}

static void verify_shared_anonymous(void) {
	another_answers();
	for (int i = 2; i < PAGES; i += 2) need(map[i * page] == 'A' + i % 26, "page %d holds %d", i, map[i * page]);
}

static void set_up_shared_file(void) {
	page = sysconf(_SC_PAGESIZE);
	fd = ok(open("mapped", O_CREAT | O_RDWR, 0644));
	ok(ftruncate(fd, PAGES * page));
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	fill(map);
	start(echo_shared);
}

static void verify_shared_file(void) {
	another_answers();
	map[3 * page] = 0;
	for (int i = 2; i < PAGES; i += 2) need(map[i * page] == 'A' + i % 26, "page %d holds %d", i, map[i * page]);
	strcpy(map + 5 * page, "through the mapping");
	char text[32];
	ok(pread(fd, text, sizeof text, 5 * page));
	need(strcmp(text, "through the mapping") == 0, "the file does not hold what the mapping does");
	memset(map + 5 * page, 0, 32);
}

static void set_up_private_file(void) {
	page = sysconf(_SC_PAGESIZE);
	fd = ok(open("mapped", O_CREAT | O_RDWR, 0644));
	ok(ftruncate(fd, PAGES * page));
	ok(pwrite(fd, "of the file", 11, page));
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	strcpy(map + 2 * page, "of the process");
	ok(close(fd));
}

static void verify_private_file(void) {
	need(strcmp(map + page, "of the file") == 0, "it does not show the file");
	need(strcmp(map + 2 * page, "of the process") == 0, "what was written into it is gone");
	char text[8] = "";
	fd = ok(open("mapped", O_RDONLY));
	ok(pread(fd, text, sizeof text, 2 * page));
	ok(close(fd));
	need(text[0] == 0, "what was written into it is in the file");
}

static void set_up_shared_memfd(void) {
	page = sysconf(_SC_PAGESIZE);
	fd = ok(memfd_create("shared", 0));
	ok(ftruncate(fd, PAGES * page));
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	fill(map);
	start(echo_shared);
}

static void set_up_posix_shared_memory(void) {
	char name[64];
	page = sysconf(_SC_PAGESIZE);
	snprintf(name, sizeof name, "/objects-%d-%d", getuid(), getpid());
	fd = ok(shm_open(name, O_CREAT | O_RDWR, 0600));
	ok(ftruncate(fd, PAGES * page));
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	fill(map);
	start(echo_shared);
}

static void set_up_deleted_shared_memory(void) {
	char name[64];
	page = sysconf(_SC_PAGESIZE);
	snprintf(name, sizeof name, "/deleted-%d-%d", getuid(), getpid());
	fd = ok(shm_open(name, O_CREAT | O_RDWR, 0600));
	ok(ftruncate(fd, PAGES * page));
	map = mapped(PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	fill(map);
	ok(shm_unlink(name));
	ok(close(fd));
	start(echo_shared);
}

static void set_up_locked(void) {
	page = sysconf(_SC_PAGESIZE);
	map = mapped(4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	ok(mlock(map, 4 * page));
}

static void verify_locked(void) {
	char line[256];
	long kilobytes = -1;
	FILE *status = fopen("/proc/self/status", "r");
	need(status, "no /proc/self/status");
	while (fgets(line, sizeof line, status)) sscanf(line, "VmLck: %ld", &kilobytes);
	fclose(status);
	need(kilobytes == (long)(4 * page >> 10), "%ld KiB are locked", kilobytes);
}

const struct object memory[] = {
	{"private-memory", "", set_up_private, verify_private},
	{"shared-memory-of-processes", "", set_up_shared_anonymous, verify_shared_anonymous},
	{"shared-file-mapping", "", set_up_shared_file, verify_shared_file},
	{"private-file-mapping", "", set_up_private_file, verify_private_file},
	{"shared-memfd", "", set_up_shared_memfd, verify_shared_anonymous},
	{"posix-shared-memory", "", set_up_posix_shared_memory, verify_shared_anonymous},
	{"deleted-posix-shared-memory", "", set_up_deleted_shared_memory, verify_shared_anonymous},
	{"locked-memory", "", set_up_locked, verify_locked},
	{0},
};
