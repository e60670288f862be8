/*
 * A library that CRIU is started with (ld.so(8), --preload) to capture each TCP connection
 * at one moment.
 *
 * Processes stand still while they are captured. The kernel does not: it takes what others
 * send and what they acknowledge. CRIU (soccr/soccr.c) asks one after the other for a
 * connection's state, how much is in its queues, their sequence numbers and what is in them. If
 * something has come in between it gives up; or, where a queue was empty, does not see that
 * it has the number of a byte that it has not got.
 *
 * Here all of it is read when CRIU asks for the first, again as long as it was not the same
 * before and after. What CRIU asks then is answered from that. A connection on which that
 * does not come to an end is left to the kernel, as without this library.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST = 1000 }; /* how often a connection is read; a time takes some 10 us */

enum { RECEIVE, SEND, QUEUES };
static const int names[QUEUES] = { TCP_RECV_QUEUE, TCP_SEND_QUEUE };

/* What does not change while a connection stands still. There are no gaps in it, for
 * it is compared as bytes. */
struct numbers {
	uint32_t state, sequence[QUEUES];
	int received, sent, unsent;
	uint32_t window[5]; /* struct tcp_repair_window: of the queues too */
};

/* The connection that CRIU asks about. */
static struct {
	int fd; /* -1: none */
	int asked; /* the queue that CRIU has chosen; -1: none */
	struct numbers numbers;
	struct { char *bytes; size_t room; ssize_t length; } queue[QUEUES];
} still = { .fd = -1 };

static int get(int fd, int option, void *value, socklen_t size)
{
	socklen_t length = size;
	return syscall(SYS_getsockopt, fd, SOL_TCP, option, value, &length) == 0 && length == size ? 0 : -1;
}

static bool choose(int fd, int queue)
{
	return syscall(SYS_setsockopt, fd, SOL_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)) == 0;
}

/* look reads the numbers. With no queue chosen the kernel goes on to send what it may. */
static bool look(int fd, struct numbers *n)
{
	unsigned char state;
	if (get(fd, TCP_INFO, &state, sizeof(state)) < 0 || get(fd, TCP_REPAIR_WINDOW, n->window, sizeof(n->window)) < 0 ||
	    syscall(SYS_ioctl, fd, SIOCINQ, &n->received) < 0 || syscall(SYS_ioctl, fd, SIOCOUTQ, &n->sent) < 0 ||
	    syscall(SYS_ioctl, fd, SIOCOUTQNSD, &n->unsent) < 0)
		return false;
	n->state = state;
	for (int q = 0; q < QUEUES; q++)
		if (!choose(fd, names[q]) || get(fd, TCP_QUEUE_SEQ, &n->sequence[q], sizeof(n->sequence[q])) < 0)
			return false;
	return choose(fd, TCP_NO_QUEUE);
}

/* peek reads what is in a queue. */
static bool peek(int fd, int q, int length)
{
	if (length < 0)
		return false;
	if (still.queue[q].room <= (size_t)length) {
		char *larger = realloc(still.queue[q].bytes, length + 1);
		if (!larger)
			return false;
		still.queue[q].bytes = larger;
		still.queue[q].room = length + 1;
	}
	if (!choose(fd, names[q]))
		return false;
	/* One more, as CRIU does it: more than there are must not come. */
	still.queue[q].length = length == 0 ? 0 :
		syscall(SYS_recvfrom, fd, still.queue[q].bytes, length + 1, MSG_PEEK | MSG_DONTWAIT, NULL, NULL);
	return choose(fd, TCP_NO_QUEUE) && still.queue[q].length <= length;
}

static bool hold_still(int fd)
{
	int repaired = 0;
	if (get(fd, TCP_REPAIR, &repaired, sizeof(repaired)) < 0 || repaired != 1)
		return false;
	for (int i = 0; i < MOST; i++) {
		struct numbers before, after;
		if (!look(fd, &before))
			return false;
		bool whole = peek(fd, RECEIVE, before.received) && peek(fd, SEND, before.sent);
		if (!look(fd, &after))
			return false;
		if (whole && memcmp(&before, &after, sizeof(before)) == 0) {
			still.numbers = before;
			return true;
		}
	}
	return false;
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *length)
{
	if (level == SOL_TCP && option == TCP_INFO) { /* which it asks first */
		int result = syscall(SYS_getsockopt, fd, level, option, value, length);
		int error = errno;
		still.fd = result == 0 && *length > 0 && hold_still(fd) ? fd : -1;
		still.asked = -1;
		if (still.fd == fd)
			*(unsigned char *)value = still.numbers.state; /* struct tcp_info: it comes first */
		errno = error;
		return result;
	}
	if (fd == still.fd && level == SOL_TCP) {
		if (option == TCP_QUEUE_SEQ && still.asked >= 0 && *length >= sizeof(uint32_t)) {
			*length = sizeof(uint32_t);
			memcpy(value, &still.numbers.sequence[still.asked], *length);
			return 0;
		}
		if (option == TCP_REPAIR_WINDOW && *length == sizeof(still.numbers.window)) {
			memcpy(value, still.numbers.window, *length);
			return 0;
		}
	}
	return syscall(SYS_getsockopt, fd, level, option, value, length);
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t length)
{
	if (fd == still.fd && level == SOL_TCP) {
		int chosen = -1;
		if (option == TCP_REPAIR) {
			still.fd = -1;
		} else if (option == TCP_REPAIR_QUEUE && length == sizeof(chosen)) {
			memcpy(&chosen, value, sizeof(chosen));
			still.asked = chosen == TCP_RECV_QUEUE ? RECEIVE : chosen == TCP_SEND_QUEUE ? SEND : -1;
			if (still.asked >= 0)
				return 0;
		}
	}
	return syscall(SYS_setsockopt, fd, level, option, value, length);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	const int *answer = request == SIOCINQ ? &still.numbers.received :
		request == SIOCOUTQ ? &still.numbers.sent : request == SIOCOUTQNSD ? &still.numbers.unsent : NULL;
	if (answer && fd == still.fd) {
		memcpy(argument, answer, sizeof(*answer));
		return 0;
	}
	return syscall(SYS_ioctl, fd, request, argument);
}

ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
	if (fd == still.fd && still.asked >= 0 && flags == (MSG_PEEK | MSG_DONTWAIT)) {
		ssize_t length = still.queue[still.asked].length;
		if (length <= 0) {
			errno = EAGAIN;
			return -1;
		}
		if ((size_t)length > size)
			length = size;
		memcpy(buffer, still.queue[still.asked].bytes, length);
		return length;
	}
	return syscall(SYS_recvfrom, fd, buffer, size, flags, NULL, NULL);
}
