// Descriptors by which the kernel tells of events, pipes, terminals.
#include "objects.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <termios.h>
#include <unistd.h>

static int fd, other, third;
static int watch;

static void set_up_inotify(void) {
	fd = ok(inotify_init1(IN_NONBLOCK));
	watch = ok(inotify_add_watch(fd, ".", IN_CREATE | IN_DELETE));
}

static void verify_inotify(void) {
	char buffer[4096] __attribute__((aligned(8)));
	const struct inotify_event *e = (const void *)buffer;
	while (read(fd, buffer, sizeof buffer) > 0) {
	}
	put("touched", "");
	comes(fd);
	ok(read(fd, buffer, sizeof buffer));
	need(e->wd == watch && e->mask == IN_CREATE && strcmp(e->name, "touched") == 0, "the event is of watch %d, mask %x", e->wd, e->mask);
	ok(unlink("touched"));
}

static void set_up_eventfd(void) {
	fd = ok(eventfd(41, EFD_NONBLOCK));
}

static void verify_eventfd(void) {
	uint64_t n;
	ok(read(fd, &n, sizeof n));
	need(n == 41, "its counter is %llu", (unsigned long long)n);
	ok(write(fd, &n, sizeof n));
}

static void set_up_semaphore(void) { fd = ok(eventfd(3, EFD_NONBLOCK | EFD_SEMAPHORE)); }

static void verify_semaphore(void) {
	uint64_t n;
	ok(read(fd, &n, sizeof n));
	need(n == 1, "it gave %llu", (unsigned long long)n);
	ok(write(fd, &n, sizeof n));
}

static time_t hour_began;

static time_t monotonic(void) {
	struct timespec t;
	ok(clock_gettime(CLOCK_MONOTONIC, &t));
	return t.tv_sec;
}

static void set_up_timerfd(void) {
	struct itimerspec hour = {.it_value.tv_sec = 3600, .it_interval.tv_sec = 60};
	struct itimerspec often = {.it_value.tv_nsec = 50000000, .it_interval.tv_nsec = 50000000};
	fd = ok(timerfd_create(CLOCK_MONOTONIC, 0));
	ok(timerfd_settime(fd, 0, &hour, NULL));
	hour_began = monotonic();
	other = ok(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
	ok(timerfd_settime(other, 0, &often, NULL));
	// It has expired and nobody has asked.
	struct itimerspec once = {.it_value.tv_nsec = 1};
	third = ok(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
	ok(timerfd_settime(third, 0, &once, NULL));
	comes(third);
}

static void verify_timerfd(void) {
	struct itimerspec left;
	ok(timerfd_gettime(fd, &left));
	long passed = 3600 - left.it_value.tv_sec, wanted = monotonic() - hour_began;
	// It goes on with what it had left at the cut; the clock, during the restore too.
	need(left.it_interval.tv_sec == 60 && passed <= wanted + 1 && passed > wanted - 60, "%ld s of its hour have passed, %ld s on the monotonic clock", passed, wanted);
	uint64_t n;
	while (read(other, &n, sizeof n) > 0) {
	}
	struct pollfd p = {.fd = other, .events = POLLIN};
	need(ok(poll(&p, 1, 10000)) == 1, "the timer of an interval is still");
	ok(read(third, &n, sizeof n));
	need(n == 1, "it had expired %llu times", (unsigned long long)n);
	struct itimerspec once = {.it_value.tv_nsec = 1};
	ok(timerfd_settime(third, 0, &once, NULL));
	comes(third);
}

static void set_up_signalfd(void) {
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	ok(sigprocmask(SIG_BLOCK, &set, NULL));
	fd = ok(signalfd(-1, &set, SFD_NONBLOCK));
	ok(raise(SIGUSR1));
}

static void verify_signalfd(void) {
	struct signalfd_siginfo info;
	comes(fd);
	need(ok(read(fd, &info, sizeof info)) == sizeof info && info.ssi_signo == SIGUSR1, "it gives signal %u", info.ssi_signo);
	nothing_comes(fd);
	ok(raise(SIGUSR1));
}

static int ends[2];

static void set_up_epoll(void) {
	ok(pipe(ends));
	fd = ok(epoll_create1(0));
	struct epoll_event level = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};
	ok(epoll_ctl(fd, EPOLL_CTL_ADD, ends[0], &level));
	other = ok(eventfd(0, 0));
	struct epoll_event edge = {.events = EPOLLIN | EPOLLET, .data.u64 = 2};
	ok(epoll_ctl(fd, EPOLL_CTL_ADD, other, &edge));
	third = ok(epoll_create1(0)); // one that waits for the other
	struct epoll_event nested = {.events = EPOLLIN, .data.u64 = 3};
	ok(epoll_ctl(third, EPOLL_CTL_ADD, fd, &nested));
}

static void verify_epoll(void) {
	struct epoll_event got[4];
	char byte;
	while (ok(epoll_wait(fd, got, 4, 0)) > 0) {
	}
	ok(write(ends[1], "x", 1));
	need(ok(epoll_wait(third, got, 4, 10000)) == 1 && got[0].data.u64 == 3, "the one that waits for it hears nothing");
	need(ok(epoll_wait(fd, got, 4, 0)) == 1 && got[0].data.u64 == 0x1122334455667788, "it does not tell of the pipe");
	need(ok(epoll_wait(fd, got, 4, 0)) == 1, "it tells of the pipe once only");
	ok(read(ends[0], &byte, 1));
	uint64_t one = 1;
	ok(write(other, &one, sizeof one));
	need(ok(epoll_wait(fd, got, 4, 10000)) == 1 && got[0].data.u64 == 2, "it does not tell of the edge");
	need(ok(epoll_wait(fd, got, 4, 0)) == 0, "it tells of an edge twice");
	ok(read(other, &one, sizeof one));
}

static void set_up_memfd(void) {
	fd = ok(memfd_create("stasis", MFD_ALLOW_SEALING));
	ok(write(fd, "in memory", 9));
	ok(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
}

static void verify_memfd(void) {
	hold(fd, "in memory");
	need(ok(fcntl(fd, F_GET_SEALS)) == (F_SEAL_SHRINK | F_SEAL_GROW), "its seals are others");
	need(ftruncate(fd, 100) == -1 && errno == EPERM, "its seals do not hold");
}

static void set_up_pipe(void) {
	ok(pipe2(ends, O_NONBLOCK));
	ok(fcntl(ends[0], F_SETPIPE_SZ, 1 << 17));
	ok(write(ends[1], "left in the pipe", 16));
}

static void verify_pipe(void) {
	need(ok(fcntl(ends[0], F_GETPIPE_SZ)) == 1 << 17, "its size is another");
	takes(ends[0], "left in the pipe");
	ok(write(ends[1], "left in the pipe", 16));
}

static void set_up_packet_pipe(void) {
	ok(pipe2(ends, O_DIRECT | O_NONBLOCK));
	ok(write(ends[1], "packet", 6));
}

static void verify_packet_pipe(void) {
	need(ok(fcntl(ends[1], F_GETFL)) & O_DIRECT, "it has no packets any more");
	takes(ends[0], "packet");
	ok(write(ends[1], "one", 3));
	ok(write(ends[1], "two", 3));
	takes(ends[0], "one");
	takes(ends[0], "two");
	ok(write(ends[1], "packet", 6));
}

static void set_up_full_pipe(void) {
	static char page[4096];
	ok(pipe2(ends, O_NONBLOCK));
	memset(page, 'p', sizeof page);
	while (write(ends[1], page, sizeof page) > 0) {
	}
}

static void verify_full_pipe(void) {
	int n;
	ok(ioctl(ends[0], FIONREAD, &n));
	need(n == 65536, "%d bytes are in it", n);
	need(write(ends[1], "x", 1) == -1 && errno == EAGAIN, "it takes more");
}

static void set_up_terminal(void) {
	fd = ok(posix_openpt(O_RDWR | O_NOCTTY));
	ok(grantpt(fd));
	ok(unlockpt(fd));
	other = ok(open(ptsname(fd), O_RDWR | O_NOCTTY));
	struct termios t;
	ok(tcgetattr(other, &t));
	cfmakeraw(&t);
	t.c_cc[VMIN] = 7;
	ok(tcsetattr(other, TCSANOW, &t));
	struct winsize size = {.ws_row = 33, .ws_col = 77};
	ok(ioctl(fd, TIOCSWINSZ, &size));
}

static void verify_terminal(void) {
	struct termios t;
	struct winsize size;
	ok(tcgetattr(other, &t));
	need(!(t.c_lflag & (ICANON | ECHO)) && t.c_cc[VMIN] == 7, "its modes are others");
	ok(ioctl(other, TIOCGWINSZ, &size));
	need(size.ws_row == 33 && size.ws_col == 77, "its size is %d by %d", size.ws_row, size.ws_col);
	ok(write(fd, "typed..", 7));
	takes(other, "typed..");
	ok(write(other, "printed", 7));
	takes(fd, "printed");
}

static void idle(void) {}

static int child;

static void set_up_pidfd(void) {
	child = start(idle);
	fd = ok(pidfd_open(child, 0));
}

static void verify_pidfd(void) {
	ok(pidfd_send_signal(fd, 0, NULL, 0));
	nothing_comes(fd);
}

const struct object events[] = {
	{"inotify", "", set_up_inotify, verify_inotify},
	{"eventfd", "", set_up_eventfd, verify_eventfd},
	{"eventfd-semaphore", "refused", set_up_semaphore, verify_semaphore},
	{"timerfd", "", set_up_timerfd, verify_timerfd},
	{"signalfd", "", set_up_signalfd, verify_signalfd},
	{"epoll", "", set_up_epoll, verify_epoll},
	{"memfd", "", set_up_memfd, verify_memfd},
	{"pidfd", "", set_up_pidfd, verify_pidfd},
	{"pipe", "", set_up_pipe, verify_pipe},
	{"packet-pipe", "refused", set_up_packet_pipe, verify_packet_pipe},
	{"full-pipe", "", set_up_full_pipe, verify_full_pipe},
	{"pseudo-terminal", "", set_up_terminal, verify_terminal},
	{0},
};
