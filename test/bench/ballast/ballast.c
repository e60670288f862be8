/* ballast MIB [work [N]]: a program to be checkpointed, that knows for itself how long it
 * stood still. It
 *
 *   - holds MIB of memory that it has filled with noise;
 *   - looks at the clocks every 100 µs, or every millisecond if it works: that takes time,
 *     and a processor of the one that works, and writes a line into /gaps when it has not
 *     run for 5 ms or more: how long in nanoseconds of CLOCK_MONOTONIC, then the last moment
 *     before and the first one after, in nanoseconds of CLOCK_REALTIME, which is the
 *     machine's also in a time namespace. After a restore that line tells when the
 *     first instruction was run;
 *     When it gets SIGUSR1 it writes such a line in any case: then all before are written;
 *   - answers on the TCP port that PORT in its environment names, else 7000: eight bytes "touch..." after it has written to four
 *     pages of its memory, chosen at random, with the same bytes; eight bytes "work...."
 *     with the number of pages that it has worked on;
 *   - with "work", works: it takes a page at random and sums it up, writes the sum into
 *     every Nth, or into all, and so on without a pause.
 *
 * It prints "ready" when its memory is filled. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MESSAGE = 8, CLIENTS = 16, TOUCHED = 4 };
static const int64_t TICK = 100 * 1000, WORKING_TICK = 1000 * 1000, GAP = 5 * 1000 * 1000; /* ns */

static uint64_t *memory;
static size_t pages;
static uint64_t each = 1;
static volatile uint64_t unused_sum;
static _Atomic uint64_t worked;
static volatile sig_atomic_t asked;

static void ask(int signal)
{
	(void)signal;
	asked = 1;
}

_Noreturn static void fail(const char *what)
{
	fprintf(stderr, "ballast: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t noise(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int64_t now(clockid_t clock)
{
	struct timespec t;
	if (clock_gettime(clock, &t))
		fail("clock_gettime");
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* watch_clocks opens the file for each line: one that is open has to have, at a restore,
 * the size that it had. */
_Noreturn static void *watch_clocks(void *interval)
{
	int64_t mono = now(CLOCK_MONOTONIC), real = now(CLOCK_REALTIME);
	for (;;) {
		struct timespec tick = {0, *(const int64_t *)interval};
		nanosleep(&tick, NULL);
		int64_t m = now(CLOCK_MONOTONIC), r = now(CLOCK_REALTIME);
		if (m - mono >= GAP || r - real >= GAP || asked) {
			asked = 0;
			char line[80];
			int n = snprintf(line, sizeof line, "%lld %lld %lld\n", (long long)(m - mono), (long long)real, (long long)r);
			int fd = open("/gaps", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
			if (fd < 0 || write(fd, line, n) != n)
				fail("/gaps");
			close(fd);
			m = now(CLOCK_MONOTONIC);
			r = now(CLOCK_REALTIME);
		}
		mono = m;
		real = r;
	}
}

static void answer(int fd, uint64_t *random, struct pollfd *slot)
{
	char message[MESSAGE];
	ssize_t n = recv(fd, message, sizeof message, MSG_WAITALL);
	if (n == (ssize_t)sizeof message && !memcmp(message, "work", 4)) {
		uint64_t count = worked;
		memcpy(message, &count, sizeof count);
	} else if (n == (ssize_t)sizeof message) {
		for (int i = 0; i < TOUCHED; i++)
			memory[noise(random) % pages * (PAGE / sizeof *memory)] = *random;
	}
	if (n != (ssize_t)sizeof message || send(fd, message, sizeof message, MSG_NOSIGNAL) != (ssize_t)sizeof message) {
		close(fd);
		slot->fd = -1;
	}
}

_Noreturn static void *serve(void *listening)
{
	struct pollfd fds[1 + CLIENTS] = {{.fd = *(int *)listening, .events = POLLIN}};
	uint64_t random = 88172645463325252ULL;
	for (int i = 1; i <= CLIENTS; i++)
		fds[i] = (struct pollfd){.fd = -1, .events = POLLIN};
	for (;;) {
		if (poll(fds, 1 + CLIENTS, -1) < 0 && errno != EINTR)
			fail("poll");
		for (int i = 1; i <= CLIENTS; i++)
			if (fds[i].fd >= 0 && fds[i].revents)
				answer(fds[i].fd, &random, &fds[i]);
		if (!(fds[0].revents & POLLIN))
			continue;
		int fd = accept4(fds[0].fd, NULL, NULL, SOCK_CLOEXEC), on = 1;
		if (fd < 0)
			continue;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
		int i = 1;
		while (i <= CLIENTS && fds[i].fd >= 0)
			i++;
		if (i > CLIENTS)
			close(fd);
		else
			fds[i].fd = fd;
	}
}

_Noreturn static void *work(void *unused)
{
	(void)unused;
	uint64_t random = 1234567890123456789ULL;
	for (uint64_t n = 1;; n++) {
		uint64_t *page = memory + noise(&random) % pages * (PAGE / sizeof *page), sum = random;
		for (size_t i = 0; i < PAGE / sizeof *page; i++)
			sum = (sum ^ page[i]) * 1099511628211ULL;
		if (n % each == 0)
			page[sum % (PAGE / sizeof *page)] = sum;
		else
			unused_sum = sum;
		worked++;
	}
}

static void start(void *(*run)(void *), const void *with)
{
	pthread_t thread;
	errno = pthread_create(&thread, NULL, run, (void *)with);
	if (errno)
		fail("pthread_create");
}

int main(int argc, char **argv)
{
	static int listening;
	long mib = argc > 1 ? atol(argv[1]) : 0;
	if (argc > 3)
		each = strtoull(argv[3], NULL, 10);
	if (mib <= 0 || argc > 4 || each == 0 || (argc > 2 && strcmp(argv[2], "work"))) {
		fprintf(stderr, "usage: ballast MIB [work [N]]\n");
		return 2;
	}
	pages = (size_t)mib * (1 << 20) / PAGE;
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	/* Each process has noise of its own: what is alike would be stored once. */
	uint64_t random = (now(CLOCK_REALTIME) ^ (uint64_t)getpid() << 48) | 1;
	for (size_t i = 0; i < pages * PAGE / sizeof *memory; i++)
		memory[i] = noise(&random);

	const char *port = getenv("PORT");
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port ? atoi(port) : 7000)};
	int on = 1;
	listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listening < 0 || setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
	    bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, CLIENTS))
		fail("listen");
	struct sigaction action = {.sa_handler = ask, .sa_flags = SA_RESTART};
	if (sigaction(SIGUSR1, &action, NULL))
		fail("sigaction");
	start(serve, &listening);
	start(watch_clocks, argc > 2 ? &WORKING_TICK : &TICK);
	if (argc > 2)
		start(work, NULL);
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
