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
 * Here all of it is read when CRIU asks for the first, and what CRIU asks then is answered
 * from that. What is in a queue is read at one moment, and two numbers stay as they are
 * while processes stand still: that of the next byte that the process will read, and that of
 * the next one that it will send. So what was read tells how much there was, and up to which
 * number. Only if the connection's state has changed meanwhile, it is read again. A
 * connection of which this cannot be said is left to the kernel, as without this library.
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

enum {
	MOST = 8, /* how often a connection is read: its state changes less often */
	MOST_LOOKS = 100,
	ROOM = 64 << 10, /* for what comes while a queue is read */
};

enum { RECEIVE, SEND, QUEUES };
static const int names[QUEUES] = { TCP_RECV_QUEUE, TCP_SEND_QUEUE };

struct numbers {
	int state;
	int length[QUEUES], unsent; /* a FIN counts in what is sent */
	uint32_t sequence[QUEUES]; /* of the end of the queues */
	uint32_t window[5]; /* struct tcp_repair_window */
};
enum { SEND_WINDOW = 1, MAX_WINDOW = 2 };

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

/* choose says which queue is meant from now on. While none is, the kernel goes on to send
 * what it may. */
static bool choose(int fd, int queue)
{
	return syscall(SYS_setsockopt, fd, SOL_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)) == 0;
}

static bool end_of(int fd, int q, uint32_t *sequence)
{
	return choose(fd, names[q]) && get(fd, TCP_QUEUE_SEQ, sequence, sizeof(*sequence)) == 0 && choose(fd, TCP_NO_QUEUE);
}

/* look reads the numbers; the length and the end of the receive queue are of one moment. */
static bool look(int fd, struct numbers *n)
{
	unsigned char state;
	int again;
	if (get(fd, TCP_INFO, &state, sizeof(state)) < 0 || get(fd, TCP_REPAIR_WINDOW, n->window, sizeof(n->window)) < 0 ||
	    syscall(SYS_ioctl, fd, SIOCOUTQ, &n->length[SEND]) < 0 ||
	    !end_of(fd, SEND, &n->sequence[SEND]))
		return false;
	n->state = state;
	for (int i = 0; i < MOST_LOOKS; i++)
		if (syscall(SYS_ioctl, fd, SIOCINQ, &n->length[RECEIVE]) < 0 || !end_of(fd, RECEIVE, &n->sequence[RECEIVE]) ||
		    syscall(SYS_ioctl, fd, SIOCINQ, &again) < 0)
			return false;
		else if (again == n->length[RECEIVE])
			return true;
	return false;
}

/* peek reads what is in a queue that had a length. Where there was nothing it does not look:
 * the process would not hear of an error any more that waits for it (recv(2)). unsent, which
 * may be NULL, is how much of it had not been sent: while the send queue is chosen the kernel
 * counts what it would send as sent, and sends nothing. */
static bool peek(int fd, int q, int had, int *unsent)
{
	still.queue[q].length = 0;
	if (unsent)
		*unsent = 0;
	while (had > 0) {
		size_t room = (size_t)had + ROOM;
		if (still.queue[q].room < room) {
			char *larger = realloc(still.queue[q].bytes, room);
			if (!larger)
				return false;
			still.queue[q].bytes = larger;
			still.queue[q].room = room;
		}
		if (!choose(fd, names[q]) || (unsent && syscall(SYS_ioctl, fd, SIOCOUTQNSD, unsent) < 0))
			return false;
		ssize_t n = syscall(SYS_recvfrom, fd, still.queue[q].bytes, still.queue[q].room, MSG_PEEK | MSG_DONTWAIT, NULL, NULL);
		if (!choose(fd, TCP_NO_QUEUE))
			return false;
		still.queue[q].length = n < 0 ? 0 : n; /* whether all was read is seen by the numbers */
		if (still.queue[q].length < (ssize_t)still.queue[q].room)
			break;
		had = still.queue[q].length;
	}
	return true;
}

/* ended says whether there is a FIN behind what was sent, which has a number and is no byte. */
static bool ended(int state)
{
	return state == TCP_FIN_WAIT1 || state == TCP_CLOSING || state == TCP_LAST_ACK;
}

/* read_at_once reads a connection, and says whether what it has is of one moment. */
static bool read_at_once(int fd)
{
	struct numbers before, after;
	int unsent;
	ssize_t *received = &still.queue[RECEIVE].length, *sent = &still.queue[SEND].length;
	if (!look(fd, &before) || !peek(fd, RECEIVE, before.length[RECEIVE], NULL) ||
	    !peek(fd, SEND, before.length[SEND], &unsent) || !look(fd, &after))
		return false;
	uint32_t next = before.sequence[RECEIVE] - before.length[RECEIVE];
	if (before.state != after.state || before.sequence[SEND] != after.sequence[SEND] ||
	    next != after.sequence[RECEIVE] - after.length[RECEIVE])
		return false;
	/* The receive queue grows, the send queue shrinks. What is left of that where the other
	 * end has reset the connection, CRIU does not ask for. */
	int length = before.state == TCP_CLOSE ? after.length[SEND] : *sent + ended(before.state);
	if (*received < before.length[RECEIVE] || *received > after.length[RECEIVE] ||
	    length > before.length[SEND] || length < after.length[SEND])
		return false;
	still.numbers = before; /* its window is no further than the queue; what may be sent, from then on */
	memcpy(&still.numbers.window[SEND_WINDOW], &after.window[SEND_WINDOW], 2 * sizeof(uint32_t));
	if (after.window[SEND_WINDOW] > after.window[MAX_WINDOW]) /* read while it was written: nothing restores that */
		return false;
	still.numbers.length[RECEIVE] = *received;
	still.numbers.sequence[RECEIVE] = next + *received;
	still.numbers.length[SEND] = length;
	still.numbers.unsent = unsent < length ? unsent : length;
	return true;
}

static bool hold_still(int fd)
{
	int repaired = 0, offset = -1;
	socklen_t size = sizeof(offset);
	if (get(fd, TCP_REPAIR, &repaired, sizeof(repaired)) < 0 || repaired != 1)
		return false;
	/* The process reads by an offset that each look at the queue moves (socket(7)). */
	if (syscall(SYS_getsockopt, fd, SOL_SOCKET, SO_PEEK_OFF, &offset, &size) == 0 && offset >= 0)
		return false;
	for (int i = 0; i < MOST; i++)
		if (read_at_once(fd))
			return true;
	return false;
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *length)
{
	if (level == SOL_TCP && option == TCP_INFO) { /* which it asks first */
		int result = syscall(SYS_getsockopt, fd, level, option, value, length);
		if (result < 0 || *length == 0)
			return result;
		still.fd = hold_still(fd) ? fd : -1;
		still.asked = -1;
		unsigned char *state = value; /* struct tcp_info: it comes first */
		if (still.fd == fd && *state != still.numbers.state) { /* so have its options */
			result = syscall(SYS_getsockopt, fd, level, option, value, length);
			*state = still.numbers.state;
		}
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
	const int *answer = request == SIOCINQ ? &still.numbers.length[RECEIVE] :
		request == SIOCOUTQ ? &still.numbers.length[SEND] : request == SIOCOUTQNSD ? &still.numbers.unsent : NULL;
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
