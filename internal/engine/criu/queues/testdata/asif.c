/*
 * A program that looks at a TCP connection as CRIU's soccr does (soccr/soccr.c), question by
 * question, while the other end goes on between any two of them. It ends with 0 if what it
 * got is of one moment: as many bytes as were counted, with the numbers that they have.
 *
 *   as-if receive    the other end sends 8 bytes each time
 *   as-if empty      the other end sends 8 bytes once, after it was said that there are none
 *   as-if send       the other end takes what has been sent
 *   as-if fin        so, after we have closed our side
 *   as-if within     the other end sends 8 bytes after each of the first times that a library
 *                    asks, for one question, how much there is
 *   as-if reset      the other end has reset the connection, of which the process has not
 *                    heard yet
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int ours, theirs;
/* Positions in the streams: that ours receives, and that it sends. */
static uint64_t written, consumed, all, taken;
static int looking, state = TCP_ESTABLISHED;
static uint32_t receiving, sending; /* the numbers that they begin with */
static const char *how;
static char buffer[4 << 20];

static void check(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(2);
}

static unsigned char at(uint64_t position)
{
	return position * 7 + position / 251;
}

static void say(void)
{
	char message[8];
	for (size_t i = 0; i < sizeof(message); i++)
		message[i] = at(written++);
	check(write(theirs, message, sizeof(message)) == sizeof(message), "write");
}

/* syscall is the C library's, which a library calls (cc -rdynamic). */
long syscall(long number, ...)
{
	static long (*next)(long, ...);
	static int calls;
	long argument[6];
	va_list list;
	va_start(list, number);
	for (int i = 0; i < 6; i++)
		argument[i] = va_arg(list, long);
	va_end(list);
	if (!next)
		next = dlsym(RTLD_NEXT, "syscall");
	long result = next(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
	int error = errno;
	if (looking && number == SYS_ioctl && strcmp(how, "within") == 0 && calls++ < 10)
		say();
	errno = error;
	return result;
}

/* goes_on is what happens between two questions. */
static void goes_on(int counted)
{
	if (strcmp(how, "send") == 0 || strcmp(how, "fin") == 0) {
		ssize_t n = recv(theirs, buffer, sizeof(buffer), MSG_DONTWAIT);
		if (n > 0)
			taken += n;
	} else if (strcmp(how, "receive") == 0 || (strcmp(how, "empty") == 0 && counted && written == 0)) {
		say();
	}
}

static void repair(int on)
{
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR, &on, sizeof(on)) == 0, "TCP_REPAIR");
}

static void pair(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), small = 4096, one = 1;
	check(listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 1) == 0 &&
	      getsockname(listener, (struct sockaddr *)&address, &length) == 0, "listen");
	theirs = socket(AF_INET, SOCK_STREAM, 0);
	check(setsockopt(theirs, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small)) == 0, "SO_RCVBUF");
	check(setsockopt(theirs, SOL_TCP, TCP_NODELAY, &one, sizeof(one)) == 0, "TCP_NODELAY");
	check(connect(theirs, (struct sockaddr *)&address, length) == 0, "connect");
	ours = accept(listener, NULL, NULL);
	check(ours >= 0 && close(listener) == 0, "accept");
}

static uint32_t queue(int name, uint32_t length, char **bytes)
{
	uint32_t sequence;
	socklen_t size = sizeof(sequence);
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR_QUEUE, &name, sizeof(name)) == 0, "TCP_REPAIR_QUEUE");
	goes_on(1);
	check(getsockopt(ours, SOL_TCP, TCP_QUEUE_SEQ, &sequence, &size) == 0, "TCP_QUEUE_SEQ");
	goes_on(1);
	*bytes = malloc(length + 1);
	if (length > 0) {
		ssize_t n = recv(ours, *bytes, length + 1, MSG_PEEK | MSG_DONTWAIT);
		if (n != (ssize_t)length) {
			fprintf(stderr, "recv failed (%zd, want %u)\n", n, length);
			exit(1);
		}
	}
	return sequence;
}

static uint32_t sequence_of(int name)
{
	uint32_t sequence;
	socklen_t size = sizeof(sequence);
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR_QUEUE, &name, sizeof(name)) == 0 &&
	      getsockopt(ours, SOL_TCP, TCP_QUEUE_SEQ, &sequence, &size) == 0, "TCP_QUEUE_SEQ");
	return sequence;
}

/* look asks as soccr does, and says whether the answers are of one moment. */
static int look(void)
{
	struct { unsigned char state, rest[6]; } info;
	struct tcp_repair_window window;
	socklen_t size = sizeof(info), windows = sizeof(window);
	int sent, unsent, received;
	repair(1);
	looking = 1;
	goes_on(0);
	check(getsockopt(ours, SOL_TCP, TCP_INFO, &info, &size) == 0 && size == sizeof(info) && info.state == state, "TCP_INFO");
	goes_on(0);
	check(ioctl(ours, SIOCOUTQ, &sent) == 0, "SIOCOUTQ");
	goes_on(0);
	check(ioctl(ours, SIOCOUTQNSD, &unsent) == 0, "SIOCOUTQNSD");
	goes_on(0);
	check(ioctl(ours, SIOCINQ, &received) == 0, "SIOCINQ");
	if (state == TCP_FIN_WAIT1) { /* a FIN is no byte */
		sent--;
		unsent -= unsent > 0;
	}
	goes_on(1);
	check(getsockopt(ours, SOL_TCP, TCP_REPAIR_WINDOW, &window, &windows) == 0, "TCP_REPAIR_WINDOW");
	char *in, *out;
	uint32_t in_number = queue(TCP_RECV_QUEUE, received, &in) - receiving - consumed;
	uint32_t out_number = queue(TCP_SEND_QUEUE, sent, &out) - sending;
	looking = 0;
	repair(0);

	int good = 1;
	if (in_number != (uint32_t)received || (int32_t)(window.rcv_wup - receiving - consumed) > received) {
		fprintf(stderr, "%d bytes had been received, their numbers are those of %u, of %d in the window\n", received, in_number,
			(int32_t)(window.rcv_wup - receiving - consumed));
		good = 0;
	}
	if (out_number != all + (state == TCP_FIN_WAIT1) || unsent > sent) {
		fprintf(stderr, "%u have been sent of %lu, %d of %d not yet\n", out_number, (unsigned long)all, unsent, sent);
		good = 0;
	}
	for (int i = 0; i < received; i++)
		good &= (unsigned char)in[i] == at(consumed + i);
	for (int i = 0; i < sent; i++)
		good &= (unsigned char)out[i] == at(all - sent + i);
	printf("%d in, %d out\n", received, sent);
	free(in);
	free(out);
	return good;
}

/* take receives what has been sent to ours, which must be whole. */
static int take(void)
{
	int good = 1;
	ssize_t n = recv(ours, buffer, sizeof(buffer), MSG_DONTWAIT);
	check(n >= 0 || errno == EAGAIN, "recv");
	for (ssize_t i = 0; i < n; i++)
		good &= (unsigned char)buffer[i] == at(consumed++);
	return good;
}

int main(int argc, char **argv)
{
	check(argc == 2, "usage");
	how = argv[1];
	alarm(60); /* a connection that does not go on */
	pair();
	repair(1);
	receiving = sequence_of(TCP_RECV_QUEUE);
	sending = sequence_of(TCP_SEND_QUEUE);
	repair(0);
	if (strcmp(how, "send") == 0 || strcmp(how, "fin") == 0)
		for (;;) { /* until it takes no more */
			char message[1000];
			for (size_t i = 0; i < sizeof(message); i++)
				message[i] = at(all + i);
			ssize_t n = send(ours, message, sizeof(message), MSG_DONTWAIT);
			if (n < 0)
				break;
			all += n;
		}
	if (strcmp(how, "reset") == 0) {
		struct linger now = { .l_onoff = 1 };
		struct pollfd gone = { .fd = ours };
		check(setsockopt(theirs, SOL_SOCKET, SO_LINGER, &now, sizeof(now)) == 0 && close(theirs) == 0, "close");
		check(poll(&gone, 1, -1) == 1, "poll");
		state = TCP_CLOSE;
	} else if (strcmp(how, "fin") == 0) {
		check(shutdown(ours, SHUT_WR) == 0, "shutdown");
		state = TCP_FIN_WAIT1;
	}
	int good = look();
	if (state == TCP_CLOSE)
		check(recv(ours, buffer, 1, MSG_DONTWAIT) < 0 && errno == ECONNRESET, "the process hears of it");
	else
		good &= take();
	while (taken < all) { /* it goes on afterwards, and all arrives */
		ssize_t n = read(theirs, buffer, sizeof(buffer));
		check(n > 0, "the connection goes on");
		taken += n;
	}
	return !good;
}
