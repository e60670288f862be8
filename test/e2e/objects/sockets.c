// Sockets within one container.
#include "objects.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int ends[2];
static int listener;

static struct sockaddr_un named(const char *name) {
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	strcpy(a.sun_path, name);
	return a;
}

// queue lays two messages into each direction.
static void queue(void) {
	ok(write(ends[0], "first", 5));
	ok(write(ends[0], "second", 6));
	ok(write(ends[1], "back", 4));
}

static void verify_stream(void) {
	takes(ends[1], "firstsecond");
	takes(ends[0], "back");
	queue();
}

static void verify_messages(void) {
	takes(ends[1], "first");
	takes(ends[1], "second");
	takes(ends[0], "back");
	queue();
}

static void set_up_unix_stream(void) {
	struct sockaddr_un a = named("socket");
	listener = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(bind(listener, (struct sockaddr *)&a, sizeof a));
	ok(listen(listener, 4));
	ends[0] = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(connect(ends[0], (struct sockaddr *)&a, sizeof a));
	ends[1] = ok(accept(listener, NULL, NULL));
	queue();
}

// verify_listening makes a new connection.
static void verify_listening(const struct sockaddr *a, socklen_t size) {
	int asking = ok(socket(a->sa_family, SOCK_STREAM, 0));
	if (connect(asking, a, size) != 0) failed("its listener takes no connection: %s", strerror(errno));
	comes(listener);
	int asked = ok(accept(listener, NULL, NULL));
	ok(write(asking, "hello", 5));
	takes(asked, "hello");
	ok(close(asking));
	ok(close(asked));
}

static void verify_unix_stream(void) {
	struct sockaddr_un a = named("socket");
	verify_stream();
	verify_listening((struct sockaddr *)&a, sizeof a);
}

// knock connects to the listener, which does not accept.
static void knock(void) {
	struct sockaddr_un a;
	socklen_t size = sizeof a;
	ok(getsockname(listener, (struct sockaddr *)&a, &size));
	ends[0] = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(connect(ends[0], (struct sockaddr *)&a, size));
}

static void set_up_not_accepted(void) {
	struct sockaddr_un a = named("socket");
	listener = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(bind(listener, (struct sockaddr *)&a, sizeof a));
	ok(listen(listener, 4));
	knock();
}

static void verify_not_accepted(void) {
	comes(listener);
	int asked = ok(accept(listener, NULL, NULL));
	ok(write(ends[0], "at last", 7));
	takes(asked, "at last");
	ok(close(asked));
	ok(close(ends[0]));
	knock();
}

static void set_up_abstract(void) {
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	socklen_t size = offsetof(struct sockaddr_un, sun_path) + 1 + snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "abstract-%d-%d", getuid(), getpid());
	listener = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(bind(listener, (struct sockaddr *)&a, size));
	ok(listen(listener, 4));
	ends[0] = ok(socket(AF_UNIX, SOCK_STREAM, 0));
	ok(connect(ends[0], (struct sockaddr *)&a, size));
	ends[1] = ok(accept(listener, NULL, NULL));
	queue();
}

static void verify_abstract(void) {
	struct sockaddr_un a;
	socklen_t size = sizeof a;
	ok(getsockname(listener, (struct sockaddr *)&a, &size));
	verify_stream();
	verify_listening((struct sockaddr *)&a, size);
}

// What was written to a connection that nobody has accepted.
static void set_up_data_not_accepted(void) {
	set_up_not_accepted();
	ok(write(ends[0], "too early", 9));
}

static void verify_data_not_accepted(void) {
	comes(listener);
	int asked = ok(accept(listener, NULL, NULL));
	takes(asked, "too early");
	ok(close(asked));
	ok(close(ends[0]));
	knock();
	ok(write(ends[0], "too early", 9));
}

static void set_up_unix_datagram(void) {
	struct sockaddr_un a = named("a"), b = named("b");
	ends[0] = ok(socket(AF_UNIX, SOCK_DGRAM, 0));
	ends[1] = ok(socket(AF_UNIX, SOCK_DGRAM, 0));
	ok(bind(ends[0], (struct sockaddr *)&a, sizeof a));
	ok(bind(ends[1], (struct sockaddr *)&b, sizeof b));
	ok(connect(ends[0], (struct sockaddr *)&b, sizeof b));
	ok(connect(ends[1], (struct sockaddr *)&a, sizeof a));
	queue();
}

static void verify_unix_datagram(void) {
	verify_messages();
	struct stat st;
	ok(stat("a", &st));
	need(S_ISSOCK(st.st_mode), "its name is no socket's");
}

static void set_up_unix_seqpacket(void) {
	ok(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends));
	queue();
}

static void set_up_half_closed(void) {
	ok(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	ok(write(ends[0], "the last", 8));
	ok(shutdown(ends[0], SHUT_WR));
}

static void verify_half_closed(void) {
	char text[16] = "";
	ok(recv(ends[1], text, sizeof text, MSG_PEEK));
	need(strcmp(text, "the last") == 0, "\"%s\" lay there", text);
	need(write(ends[0], "x", 1) == -1 && errno == EPIPE, "the closed direction takes more");
	ok(write(ends[1], "y", 1));
	takes(ends[0], "y");
}

// A descriptor on its way through a socket.
static void send_descriptor(void) {
	int carried[2];
	ok(pipe(carried));
	ok(write(carried[1], "in a pipe in a socket", 21));
	char byte = 'd', space[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec part = {&byte, 1};
	struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &carried[0], sizeof(int));
	ok(sendmsg(ends[0], &m, 0));
	ok(close(carried[0]));
	ok(close(carried[1]));
}

static void set_up_descriptor_in_flight(void) {
	ok(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	send_descriptor();
}

static void verify_descriptor_in_flight(void) {
	char byte, space[CMSG_SPACE(sizeof(int))];
	struct iovec part = {&byte, 1};
	struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
	comes(ends[1]);
	ok(recvmsg(ends[1], &m, 0));
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	need(c && c->cmsg_type == SCM_RIGHTS, "it carries no descriptor");
	int carried;
	memcpy(&carried, CMSG_DATA(c), sizeof carried);
	takes(carried, "in a pipe in a socket");
	ok(close(carried));
	send_descriptor();
}

static void set_up_socket_options(void) {
	ends[0] = ok(socket(AF_INET, SOCK_STREAM, 0));
	int yes = 1, size = 65536, idle = 77;
	ok(setsockopt(ends[0], SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes));
	ok(setsockopt(ends[0], SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes));
	ok(setsockopt(ends[0], SOL_SOCKET, SO_RCVBUF, &size, sizeof size));
	ok(setsockopt(ends[0], IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle));
	ok(setsockopt(ends[0], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes));
	struct timeval patience = {.tv_sec = 5};
	ok(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience));
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	ok(bind(ends[0], (struct sockaddr *)&a, sizeof a));
	ok(listen(ends[0], 4));
}

static int option(int level, int name) {
	int value = 0;
	socklen_t size = sizeof value;
	ok(getsockopt(ends[0], level, name, &value, &size));
	return value;
}

static void verify_socket_options(void) {
	need(option(SOL_SOCKET, SO_REUSEADDR) == 1, "SO_REUSEADDR is another");
	need(option(SOL_SOCKET, SO_KEEPALIVE) == 1, "SO_KEEPALIVE is another");
	need(option(SOL_SOCKET, SO_RCVBUF) == 131072, "SO_RCVBUF is %d", option(SOL_SOCKET, SO_RCVBUF));
	need(option(IPPROTO_TCP, TCP_KEEPIDLE) == 77, "TCP_KEEPIDLE is %d", option(IPPROTO_TCP, TCP_KEEPIDLE));
	need(option(IPPROTO_TCP, TCP_NODELAY) == 1, "TCP_NODELAY is another");
	struct timeval patience;
	socklen_t size = sizeof patience;
	ok(getsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &patience, &size));
	need(patience.tv_sec == 5, "SO_RCVTIMEO is another");
}

static struct sockaddr_in address;
static struct sockaddr_in6 address6;

static int port_of(int s) {
	struct sockaddr_in6 a;
	socklen_t size = sizeof a;
	ok(getsockname(s, (struct sockaddr *)&a, &size));
	return a.sin6_port; // where sin_port is too
}

static void connected(struct sockaddr *a, socklen_t size) {
	listener = ok(socket(a->sa_family, SOCK_STREAM, 0));
	ok(bind(listener, a, size));
	ok(listen(listener, 16));
	ok(getsockname(listener, a, &size));
	ends[0] = ok(socket(a->sa_family, SOCK_STREAM, 0));
	ok(connect(ends[0], a, size));
	ends[1] = ok(accept(listener, NULL, NULL));
}

static void set_up_tcp(void) {
	address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	connected((struct sockaddr *)&address, sizeof address);
	queue();
	comes(ends[0]);
	comes(ends[1]);
}

static void verify_tcp(void) {
	verify_stream();
	verify_listening((struct sockaddr *)&address, sizeof address);
}

static void set_up_tcp6(void) {
	address6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	connected((struct sockaddr *)&address6, sizeof address6);
	queue();
	comes(ends[0]);
	comes(ends[1]);
}

static void verify_tcp6(void) {
	verify_stream();
	verify_listening((struct sockaddr *)&address6, sizeof address6);
}

static void set_up_tcp_listener(void) {
	listener = ok(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0));
	address6 = (struct sockaddr_in6){.sin6_family = AF_INET6};
	ok(bind(listener, (struct sockaddr *)&address6, sizeof address6));
	ok(listen(listener, 16));
	address6.sin6_port = port_of(listener);
	address6.sin6_addr = in6addr_loopback;
	// Three that nobody has accepted. They do not survive; that it listens does.
	for (int i = 0; i < 3; i++) {
		int s = ok(socket(AF_INET6, SOCK_STREAM, 0));
		ok(connect(s, (struct sockaddr *)&address6, sizeof address6));
	}
}

static void verify_tcp_listener(void) {
	int s;
	while ((s = accept(listener, NULL, NULL)) >= 0) close(s);
	verify_listening((struct sockaddr *)&address6, sizeof address6);
	for (int i = 0; i < 3; i++) {
		s = ok(socket(AF_INET6, SOCK_STREAM, 0));
		ok(connect(s, (struct sockaddr *)&address6, sizeof address6));
	}
}

static void set_up_udp(void) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	for (int i = 0; i < 2; i++) {
		ends[i] = ok(socket(AF_INET, SOCK_DGRAM, 0));
		ok(bind(ends[i], (struct sockaddr *)&a, sizeof a));
	}
	a.sin_port = port_of(ends[1]);
	ok(connect(ends[0], (struct sockaddr *)&a, sizeof a));
	listener = ok(socket(AF_INET6, SOCK_DGRAM, 0));
	address6 = (struct sockaddr_in6){.sin6_family = AF_INET6};
	ok(bind(listener, (struct sockaddr *)&address6, sizeof address6));
	address6.sin6_port = port_of(listener);
	address6.sin6_addr = in6addr_loopback;
}

static void verify_udp(void) {
	struct sockaddr_in from;
	socklen_t size = sizeof from;
	char text[16] = "";
	ok(write(ends[0], "datagram", 8));
	comes(ends[1]);
	ok(recvfrom(ends[1], text, sizeof text, 0, (struct sockaddr *)&from, &size));
	need(strcmp(text, "datagram") == 0 && from.sin_port == port_of(ends[0]), "\"%s\" came from port %d", text, ntohs(from.sin_port));
	int s = ok(socket(AF_INET6, SOCK_DGRAM, 0));
	ok(sendto(s, "six", 3, 0, (struct sockaddr *)&address6, sizeof address6));
	takes(listener, "six");
	ok(close(s));
}

static void set_up_raw(void) {
	ends[0] = ok(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
}

static void verify_raw(void) {
	need(option(SOL_SOCKET, SO_TYPE) == SOCK_RAW && option(SOL_SOCKET, SO_PROTOCOL) == IPPROTO_ICMP, "it is another socket");
}

static void set_up_netlink(void) {
	ends[0] = ok(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
	struct sockaddr_nl a = {.nl_family = AF_NETLINK};
	ok(bind(ends[0], (struct sockaddr *)&a, sizeof a));
}

static void verify_netlink(void) {
	struct {
		struct nlmsghdr h;
		struct ifinfomsg i;
	} ask = {{sizeof ask, RTM_GETLINK, NLM_F_REQUEST, 7, 0}, {.ifi_index = 1}};
	char buffer[8192] __attribute__((aligned(4)));
	const struct nlmsghdr *h = (const void *)buffer;
	ok(write(ends[0], &ask, sizeof ask));
	comes(ends[0]);
	ok(read(ends[0], buffer, sizeof buffer));
	need(h->nlmsg_seq == 7 && h->nlmsg_type == RTM_NEWLINK, "it answers with type %d", h->nlmsg_type);
}

const struct object sockets[] = {
	{"unix-stream", "", set_up_unix_stream, verify_unix_stream},
	{"unix-stream-not-accepted", "", set_up_not_accepted, verify_not_accepted},
	{"unix-stream-data-not-accepted", "refused", set_up_data_not_accepted, verify_data_not_accepted},
	{"unix-stream-abstract", "", set_up_abstract, verify_abstract},
	{"unix-stream-half-closed", "", set_up_half_closed, verify_half_closed},
	{"unix-datagram", "", set_up_unix_datagram, verify_unix_datagram},
	{"unix-seqpacket", "", set_up_unix_seqpacket, verify_messages},
	{"descriptor-in-flight", "", set_up_descriptor_in_flight, verify_descriptor_in_flight},
	{"tcp", "", set_up_tcp, verify_tcp},
	{"tcp6", "", set_up_tcp6, verify_tcp6},
	{"tcp-listener-with-backlog", "", set_up_tcp_listener, verify_tcp_listener},
	{"socket-options", "", set_up_socket_options, verify_socket_options},
	{"udp", "", set_up_udp, verify_udp},
	{"raw-socket", "plain", set_up_raw, verify_raw},
	{"netlink", "", set_up_netlink, verify_netlink},
	{0},
};
