/*
 * A program that looks at a TCP connection as CRIU's soccr does (soccr/soccr.c), question by
 * question, while the other end goes on between any two of them. It ends with 0 if what it
 * got is of one moment: as many bytes as were counted, with the numbers that they have.
 *
 *   as-if receive    the other end sends 8 bytes each time
 *   as-if empty      the other end sends 8 bytes once, after it was said that there are none
 *   as-if send       the other end takes what has been sent
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int ours, theirs;
static uint64_t written, taken, expected; /* bytes of the stream that ours receives, or sends */
static const char *how;

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

/* goes_on is what happens between two questions. */
static void goes_on(int counted)
{
	if (strcmp(how, "send") == 0) {
		static char buffer[1 << 20];
		ssize_t n = recv(theirs, buffer, sizeof(buffer), MSG_DONTWAIT);
		if (n > 0)
			taken += n;
		return;
	}
	if (strcmp(how, "empty") == 0 && (!counted || written > 0))
		return;
	char message[8];
	for (size_t i = 0; i < sizeof(message); i++)
		message[i] = at(written++);
	check(write(theirs, message, sizeof(message)) == sizeof(message), "write");
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

int main(int argc, char **argv)
{
	check(argc == 2, "usage");
	how = argv[1];
	pair();
	int one = 1, sent, unsent, received;
	uint32_t receiving, sending; /* the numbers that the streams begin with */
	struct { unsigned char state, rest[6]; } info;
	struct tcp_repair_window window;
	socklen_t size = sizeof(info), number = sizeof(uint32_t), windows = sizeof(window);
	int names[] = { TCP_RECV_QUEUE, TCP_SEND_QUEUE };
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR, &one, sizeof(one)) == 0, "TCP_REPAIR");
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR_QUEUE, &names[0], sizeof(int)) == 0 && getsockopt(ours, SOL_TCP, TCP_QUEUE_SEQ, &receiving, &number) == 0, "TCP_QUEUE_SEQ");
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR_QUEUE, &names[1], sizeof(int)) == 0 && getsockopt(ours, SOL_TCP, TCP_QUEUE_SEQ, &sending, &number) == 0, "TCP_QUEUE_SEQ");
	int zero = 0;
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR, &zero, sizeof(zero)) == 0, "TCP_REPAIR");
	uint64_t all = 0;
	if (strcmp(how, "send") == 0)
		for (;;) { /* until it takes no more */
			char message[1000];
			for (size_t i = 0; i < sizeof(message); i++)
				message[i] = at(all + i);
			ssize_t n = send(ours, message, sizeof(message), MSG_DONTWAIT);
			if (n < 0)
				break;
			all += n;
		}

	check(setsockopt(ours, SOL_TCP, TCP_REPAIR, &one, sizeof(one)) == 0, "TCP_REPAIR");
	goes_on(0);
	check(getsockopt(ours, SOL_TCP, TCP_INFO, &info, &size) == 0 && size == sizeof(info) && info.state == TCP_ESTABLISHED, "TCP_INFO");
	goes_on(0);
	check(ioctl(ours, SIOCOUTQ, &sent) == 0, "SIOCOUTQ");
	goes_on(0);
	check(ioctl(ours, SIOCOUTQNSD, &unsent) == 0, "SIOCOUTQNSD");
	goes_on(0);
	check(ioctl(ours, SIOCINQ, &received) == 0, "SIOCINQ");
	goes_on(1);
	check(getsockopt(ours, SOL_TCP, TCP_REPAIR_WINDOW, &window, &windows) == 0, "TCP_REPAIR_WINDOW");
	char *in, *out;
	uint32_t in_sequence = queue(TCP_RECV_QUEUE, received, &in), out_sequence = queue(TCP_SEND_QUEUE, sent, &out);
	check(setsockopt(ours, SOL_TCP, TCP_REPAIR, &zero, sizeof(zero)) == 0, "TCP_REPAIR");

	int bad = 0;
	if (in_sequence - receiving != (uint32_t)received) {
		fprintf(stderr, "%d bytes had been received, their numbers are those of %u\n", received, in_sequence - receiving);
		bad = 1;
	}
	if (out_sequence - sending != all || unsent > sent || window.rcv_wup - receiving > (uint32_t)received) {
		fprintf(stderr, "sent %u of %lu, %d unsent of %d, window %u\n", out_sequence - sending, (unsigned long)all, unsent, sent, window.rcv_wup - receiving);
		bad = 1;
	}
	for (int i = 0; i < received; i++)
		bad |= (unsigned char)in[i] != at(i);
	for (int i = 0; i < sent; i++)
		bad |= (unsigned char)out[i] != at(all - sent + i);
	/* It goes on afterwards, and all arrives. */
	static char rest[1 << 20];
	alarm(20);
	while (strcmp(how, "send") == 0 && taken < all) {
		ssize_t n = read(theirs, rest, sizeof(rest));
		check(n > 0, "the connection goes on");
		taken += n;
	}
	while (expected < written) {
		ssize_t n = read(ours, rest, sizeof(rest));
		check(n > 0, "the connection goes on");
		for (ssize_t i = 0; i < n; i++)
			bad |= (unsigned char)rest[i] != at(expected++);
	}
	printf("%d in, %d out\n", received, sent);
	return bad;
}
