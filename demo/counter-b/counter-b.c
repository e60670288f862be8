/*
 * counter-b is the demo's second program: C, one thread, no runtime of its own.
 * It answers the exchanges of counter-a (the Go package demo/exchange says how),
 * reads on in the ledger that counter-a writes, and keeps in memory alone its
 * count, a random nonce and the digest of every exchange there was. When anything
 * does not fit it prints DISAGREE and exits with 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LEDGER "/shared/ledger"
#define PORT_A 7101
#define PORT_B 7102
#define LEDGER_RECORDS 4096

struct record { uint64_t count, token, chain; }; /* as in the ledger, little-endian */

static uint64_t count, nonce, chain, checks;
static struct record last;    /* the message that count came of */
static char answer_text[128]; /* the answer to it, to be given again */
static int ledger = -1, sock = -1;
static volatile sig_atomic_t ending;

static void on_signal(int signum) { (void)signum; ending = 1; }

static void die(const char *what)
{
	fprintf(stderr, "b %s: %s\n", what, strerror(errno));
	exit(1);
}

/* From the kernel itself: a generator in memory would be copied with it. */
static uint64_t draw(void)
{
	uint64_t x;
	if (syscall(SYS_getrandom, &x, sizeof x, 0) != (long)sizeof x)
		die("getrandom");
	return x;
}

static uint64_t extend(uint64_t c, uint64_t x)
{
	c = (c ^ x) * UINT64_C(0x9e3779b97f4a7c15);
	return c ^ c >> 29;
}

static int status(char *line, size_t size)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return snprintf(line, size, "b t=%lld count=%" PRIu64 " peer=%" PRIu64 " nonce=%016" PRIx64 " checks=%" PRIu64 " ok\n",
			(long long)t.tv_sec * 1000000 + t.tv_nsec / 1000, count, last.count, nonce, checks);
}

static void disagree(const struct sockaddr_in *peer, const char *format, ...)
{
	va_list args;
	fprintf(stderr, "b DISAGREE count=%" PRIu64 " nonce=%016" PRIx64 ": ", count, nonce);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	/* a is told, so that both start anew; if it does not hear it finds out itself. */
	if (sendto(sock, "D", 1, 0, (const struct sockaddr *)peer, sizeof *peer) < 0)
		perror("b telling a");
	exit(1);
}

/* Reads on in the ledger at the file's own position. */
static void check_ledger(const struct record *want, const struct sockaddr_in *peer)
{
	struct record got;
	if (ledger < 0 && (ledger = open(LEDGER, O_RDONLY | O_CLOEXEC)) < 0)
		die("opening " LEDGER);
	if ((want->count - 1) % LEDGER_RECORDS == 0 && lseek(ledger, 0, SEEK_SET) < 0)
		die("rewinding " LEDGER);
	ssize_t n = read(ledger, &got, sizeof got);
	if (n < 0)
		die("reading " LEDGER);
	if (n != (ssize_t)sizeof got)
		disagree(peer, "the ledger ends before record %" PRIu64, want->count);
	if (memcmp(&got, want, sizeof got) != 0)
		disagree(peer, "the ledger has %" PRIu64 " %016" PRIx64 " %016" PRIx64 ", a says %" PRIu64 " %016" PRIx64 " %016" PRIx64,
			 got.count, got.token, got.chain, want->count, want->token, want->chain);
	checks++;
}

static void take(const char *text, const struct sockaddr_in *peer)
{
	struct record message;
	char line[256];
	if (sscanf(text, "M %" SCNu64 " %" SCNx64 " %" SCNx64, &message.count, &message.token, &message.chain) != 3)
		disagree(peer, "%s is not a message", text);
	if (message.count == count && memcmp(&message, &last, sizeof last) == 0) {
		/* The answer was lost, or late. */
	} else if (message.count != count + 1 || message.chain != chain) {
		disagree(peer, "a says \"%s\", the chain here is %016" PRIx64, text, chain);
	} else {
		check_ledger(&message, peer);
		uint64_t answer = draw();
		chain = extend(extend(extend(chain, message.count), message.token), answer);
		count = message.count;
		last = message;
		checks++;
		snprintf(answer_text, sizeof answer_text, "R %" PRIu64 " %016" PRIx64 " %016" PRIx64 " %016" PRIx64,
			 count, message.token, answer, chain);
		int length = status(line, sizeof line);
		if (write(STDOUT_FILENO, line, length) != length)
			die("writing the log");
	}
	/* Not sent is not worse than lost: a asks again. */
	if (sendto(sock, answer_text, strlen(answer_text), 0, (const struct sockaddr *)peer, sizeof *peer) < 0)
		perror("b answering");
}

int main(void)
{
	struct sigaction action = {.sa_handler = on_signal}; /* no SA_RESTART: recvfrom is to end */
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);

	nonce = draw();
	struct sockaddr_in self = {.sin_family = AF_INET, .sin_port = htons(PORT_B), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	if ((sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)) < 0 || bind(sock, (struct sockaddr *)&self, sizeof self) < 0)
		die("listening");

	while (!ending) {
		char text[256];
		struct sockaddr_in from;
		socklen_t size = sizeof from;
		ssize_t n = recvfrom(sock, text, sizeof text - 1, 0, (struct sockaddr *)&from, &size);
		if (n < 0) {
			if (errno == EINTR || errno == ECONNREFUSED)
				continue;
			die("receiving");
		}
		text[n] = 0;
		if (strcmp(text, "?") == 0) {
			char line[256];
			int length = status(line, sizeof line);
			if (sendto(sock, line, length, 0, (struct sockaddr *)&from, size) < 0)
				perror("b telling its status");
		} else if (strcmp(text, "D") == 0) {
			fprintf(stderr, "b DISAGREE: a says so\n");
			return 1;
		} else if (from.sin_port == htons(PORT_A)) {
			take(text, &from);
		}
	}
	return 0;
}
