// weaver fills memory with what it can check later, waits until it is told, and then does
// to its memory what programs do to theirs: reads it by several threads, has the kernel
// read it, forks, gives parts back, moves parts, unmaps parts. It says what it finds wrong.
//
// weaver MIB DIRECTORY: it goes on when DIRECTORY/go exists, whose first line says how:
// "check" reads all; "weave" does everything; "touch" reads one page a second.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)

static size_t pages;
static uint8_t *area;
static int bad;

// value is what a word of a page holds. Every seventh page was never written.
static uint64_t value(uint64_t page, int word) {
	return page % 7 == 3 ? 0 : (page + 1) * 0x9e3779b97f4a7c15ull + word;
}

static void fill(void) {
	for (uint64_t p = 0; p < pages; p++)
		if (p % 7 != 3)
			for (int w = 0; w < WORDS; w++)
				((uint64_t *)(area + p * PAGE))[w] = value(p, w);
}

static void complain(const char *what, uint64_t page, uint64_t found) {
	if (__sync_add_and_fetch(&bad, 1) < 10)
		printf("BAD %s: page %lu holds %lx\n", what, (unsigned long)page, (unsigned long)found);
}

static void is_right(const char *what, const uint8_t *at, uint64_t page) {
	for (int w = 0; w < WORDS; w++)
		if (((const uint64_t *)at)[w] != value(page, w)) {
			complain(what, page, ((const uint64_t *)at)[w]);
			return;
		}
}

static void is_zero(const char *what, const uint8_t *at, uint64_t page) {
	for (int w = 0; w < WORDS; w++)
		if (((const uint64_t *)at)[w]) {
			complain(what, page, ((const uint64_t *)at)[w]);
			return;
		}
}

static void check(const char *what, const uint8_t *at, uint64_t from, uint64_t to) {
	for (uint64_t p = from; p < to; p++)
		is_right(what, at + (p - from) * PAGE, p);
}

static void done(const char *what) {
	printf("done %s\n", what);
	fflush(stdout);
}

static void *backwards(void *arg) {
	(void)arg;
	for (uint64_t p = pages; p-- > pages / 2;)
		is_right("a thread reads", area + p * PAGE, p);
	return NULL;
}

// weave uses a sixteenth of the area for each of its tricks.
static void weave(const char *directory) {
	uint64_t part = pages / 16, p;
	uint8_t *at;
	pthread_t thread;

	// The kernel reads what is not there.
	char name[256];
	snprintf(name, sizeof name, "%s/written-XXXXXX", directory); // the source is doing the same
	int fd = mkstemp(name);
	if (fd < 0 || write(fd, area, part * PAGE) != (ssize_t)(part * PAGE))
		perror("BAD write");
	uint8_t *copy = mmap(NULL, part * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	check("the kernel reads", copy, 0, part);
	done("write");

	// What is given back is zero from then on, also if it had not come yet.
	if (madvise(area + part * PAGE, part * PAGE, MADV_DONTNEED))
		perror("BAD madvise");
	for (p = part; p < 2 * part; p++)
		is_zero("given back", area + p * PAGE, p);
	done("madvise");

	// A child gets what is missing too, and what its parent does later is not its own.
	pid_t child = fork();
	if (child == 0) {
		usleep(300000);
		check("a child reads", area + 2 * part * PAGE, 2 * part, 3 * part);
		check("a child reads", area + 4 * part * PAGE, 4 * part, 5 * part);
		munmap(area + 2 * part * PAGE, part * PAGE);
		if (fork() == 0) {
			check("a grandchild reads", area + 5 * part * PAGE, 5 * part, 6 * part);
			fflush(stdout);
			_exit(bad > 0);
		}
		int status = 0;
		wait(&status);
		bad += status != 0;
		fflush(stdout);
		_exit(bad > 0);
	}
	madvise(area + 4 * part * PAGE, part * PAGE, MADV_DONTNEED);
	for (p = 4 * part; p < 5 * part; p++)
		is_zero("given back after a fork", area + p * PAGE, p);
	done("fork");

	// What is moved is found at its new place, also when it is moved by odd pages and again.
	at = mmap(NULL, (part + 3) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	at = mremap(area + 6 * part * PAGE, part * PAGE, part * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at + 3 * PAGE);
	if (at == MAP_FAILED)
		perror("BAD mremap");
	check("moved", at + part / 2 * PAGE, 6 * part + part / 2, 7 * part);
	uint8_t *again = mremap(at, part / 2 * PAGE, part * PAGE, MREMAP_MAYMOVE);
	check("moved again", again, 6 * part, 6 * part + part / 2);
	for (p = part / 2; p < part; p++)
		is_zero("grown", again + p * PAGE, p);
	done("mremap");

	// What is mapped where something was unmapped is zero.
	munmap(area + 7 * part * PAGE, part * PAGE);
	at = mmap(area + 7 * part * PAGE, part * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	for (p = 0; p < part; p++)
		is_zero("mapped anew", at + p * PAGE, 7 * part + p);
	done("munmap");

	// What is written before it was read keeps the rest of its page.
	for (p = 8 * part; p < 9 * part; p++) {
		uint64_t *word = (uint64_t *)(area + p * PAGE) + 5, old = value(p, 5);
		if (*word != old)
			complain("written", p, *word);
		*word = ~old;
		*word = old;
	}
	mprotect(area + 8 * part * PAGE, part / 2 * PAGE, PROT_READ);
	check("protected", area + 8 * part * PAGE, 8 * part, 9 * part);
	done("mprotect");

	pthread_create(&thread, NULL, backwards, NULL);
	check("all the rest", area + 9 * part * PAGE, 9 * part, 16 * part);
	check("all the rest", area + 3 * part * PAGE, 3 * part, 4 * part);
	check("all the rest", area + 5 * part * PAGE, 5 * part, 6 * part);
	pthread_join(thread, NULL);
	int status = 0;
	waitpid(child, &status, 0);
	if (status)
		printf("BAD child %x\n", status);
	done("threads");
}

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	pages = strtoul(argv[1], NULL, 10) << 8;
	area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(area, pages * PAGE, MADV_NOHUGEPAGE);
	fill();
	char name[256], how[32] = "";
	snprintf(name, sizeof name, "%s/go", argv[2]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (unsigned long i = 1;; i++) {
		FILE *f = fopen(name, "r");
		if (f) {
			int n = fscanf(f, "%31s", how);
			fclose(f);
			if (n == 1)
				break;
		}
		printf("%lu\n", i);
		usleep(10000);
	}
	if (!strcmp(how, "touch"))
		for (uint64_t p = 0;; p = (p + 257) % pages) {
			is_right("touch", area + p * PAGE, p);
			printf(bad ? "BAD\n" : "touched\n");
			usleep(20000);
		}
	if (!strcmp(how, "weave"))
		weave(argv[2]);
	else
		check("all", area, 0, pages);
	printf("end %s\n", bad ? "BAD" : "good");
	for (;;)
		pause();
}
