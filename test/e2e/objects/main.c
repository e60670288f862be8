#include "objects.h"

#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 128, ANSWER = 512 };

static const struct object *const tables[] = {files, events, sockets, processes, memory, containers, refused};

static jmp_buf give_up;
static char reason[ANSWER];

void failed(const char *format, ...) {
	va_list args;
	va_start(args, format);
	vsnprintf(reason, sizeof reason, format, args);
	va_end(args);
	longjmp(give_up, 1);
}

static char noted[ANSWER];

void note(const char *format, ...) {
	va_list args;
	va_start(args, format);
	vsnprintf(noted, sizeof noted, format, args);
	va_end(args);
}

int start(void (*work)(void)) {
	int pid = ok(fork());
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		work();
		for (;;) pause();
	}
	return pid;
}

void put(const char *path, const char *content) {
	int fd = ok(open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644));
	ok(write(fd, content, strlen(content)));
	ok(close(fd));
}

void hold(int fd, const char *content) {
	char buffer[256];
	ssize_t n = ok(pread(fd, buffer, sizeof buffer - 1, 0));
	buffer[n] = 0;
	need(strcmp(buffer, content) == 0, "it holds \"%s\", not \"%s\"", buffer, content);
}

void is(const char *path, const char *content) {
	int fd = open(path, O_RDONLY);
	need(fd >= 0, "open %s: %s", path, strerror(errno));
	hold(fd, content);
	ok(close(fd));
}

void comes(int fd) {
	struct pollfd p = {.fd = fd, .events = POLLIN};
	need(ok(poll(&p, 1, 10000)) == 1, "there is nothing to read");
}

void nothing_comes(int fd) {
	struct pollfd p = {.fd = fd, .events = POLLIN};
	need(ok(poll(&p, 1, 0)) == 0, "there is something to read");
}

void takes(int fd, const char *content) {
	comes(fd);
	char buffer[256];
	ssize_t n = ok(read(fd, buffer, sizeof buffer - 1));
	buffer[n] = 0;
	need(strcmp(buffer, content) == 0, "\"%s\" lay there, not \"%s\"", buffer, content);
}

// keeper is the process of one object, asked through a socket.
struct keeper {
	const struct object *object;
	int socket;
};

static void answer(int socket, const char *text) {
	if (write(socket, text, strlen(text)) < 0) _exit(1);
}

static void step(int socket, void (*work)(void)) {
	noted[0] = 0;
	if (setjmp(give_up) == 0) {
		work();
		char text[ANSWER + 8];
		snprintf(text, sizeof text, "ok\t%s", noted);
		answer(socket, text);
	} else {
		char text[ANSWER + 8];
		snprintf(text, sizeof text, "failed\t%s", reason);
		answer(socket, text);
	}
}

static void keep(const struct object *o, int socket) {
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_NAME, o->name);
	step(socket, o->set_up);
	char question;
	while (read(socket, &question, 1) == 1) step(socket, o->verify);
	_exit(0);
}

static void hear(const struct keeper *k, char *text) {
	struct pollfd p = {.fd = k->socket, .events = POLLIN};
	if (poll(&p, 1, 20000) != 1) {
		strcpy(text, "failed\tits process does not answer");
		return;
	}
	ssize_t n = read(k->socket, text, ANSWER - 1);
	if (n <= 0) {
		strcpy(text, "failed\tits process has ended");
		return;
	}
	text[n] = 0;
}

static struct sockaddr_un where(const char *container) {
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "objects-%s", container);
	return a;
}

static void finish(int signal) {
	(void)signal;
	_exit(0);
}

static int complain(const char *what) {
	perror(what);
	return 1;
}

static int named(char **names, const char *name) {
	for (; *names; names++)
		if (strcmp(*names, name) == 0) return 1;
	return 0;
}

// run sets the objects of a container up and answers who asks how they are.
static int run(const char *container, char **only) {
	static struct keeper keepers[MOST];
	int count = 0, bad = 0;
	char text[ANSWER + 16];
	unsigned char nonce[8];
	signal(SIGTERM, finish); // process 1 of a container must ask for it
	signal(SIGPIPE, SIG_IGN);
	if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) return complain("getrandom");
	umask(022);
	if (mkdir("/work", 0755) != 0 && errno != EEXIST) return complain("mkdir /work");
	char own[64];
	snprintf(own, sizeof own, "/work/%s", container);
	if (mkdir(own, 0755) != 0 && errno != EEXIST) return complain(own);
	if (chdir(own) != 0) return complain(own);
	for (size_t t = 0; t < sizeof tables / sizeof *tables; t++) {
		for (const struct object *o = tables[t]; o->name; o++) {
			// Most objects are of no group, and held by every container that is not about
			// a matter of its own.
			if (*only ? !named(only, o->name) : strcmp(*o->group || strcmp(container, "terminal") == 0 ? o->group : container, container) != 0) continue;
			int pair[2];
			if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) return complain("socketpair");
			int pid = fork();
			if (pid < 0) return complain("fork");
			if (pid == 0) {
				close(pair[0]);
				for (int i = 0; i < count; i++) close(keepers[i].socket);
				signal(SIGTERM, SIG_DFL);
				if (mkdir(o->name, 0755) != 0 && errno != EEXIST) _exit(complain(o->name));
				if (chdir(o->name) != 0) _exit(complain(o->name));
				keep(o, pair[1]);
			}
			close(pair[1]);
			keepers[count++] = (struct keeper){o, pair[0]};
		}
	}
	for (int i = 0; i < count; i++) {
		hear(&keepers[i], text);
		if (strncmp(text, "ok", 2) != 0) {
			fprintf(stderr, "objects: %s: set up: %s\n", keepers[i].object->name, text);
			bad++;
		}
	}
	if (bad) return 1;
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_un address = where(container);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 8) != 0) return complain("listen");
	printf("objects: %d are set up\n", count);
	fflush(stdout);
	for (;;) {
		int asking = accept(listener, NULL, NULL);
		if (asking < 0) continue;
		dprintf(asking, "nonce\t%02x%02x%02x%02x%02x%02x%02x%02x\n", nonce[0], nonce[1], nonce[2], nonce[3], nonce[4], nonce[5], nonce[6], nonce[7]);
		for (int i = 0; i < count; i++) {
			strcpy(text, "failed\tits process has ended");
			if (write(keepers[i].socket, "?", 1) == 1) hear(&keepers[i], text);
			dprintf(asking, "%s\t%s\n", keepers[i].object->name, text);
		}
		close(asking);
	}
}

// verify asks how the objects of a container in this Pod are.
static int verify(const char *container) {
	struct sockaddr_un address = where(container);
	int asking = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(asking, (struct sockaddr *)&address, sizeof address) != 0) return complain("connect");
	char buffer[4096];
	ssize_t n;
	while ((n = read(asking, buffer, sizeof buffer)) > 0)
		if (write(1, buffer, n) != n) return complain("write");
	return n != 0;
}

static int list(void) {
	for (size_t t = 0; t < sizeof tables / sizeof *tables; t++)
		for (const struct object *o = tables[t]; o->name; o++) printf("%s\t%s\n", o->name, o->group);
	return 0;
}

int main(int argc, char **argv) {
	if (argc >= 3 && strcmp(argv[1], "run") == 0) return run(argv[2], argv + 3);
	if (argc == 3 && strcmp(argv[1], "verify") == 0) return verify(argv[2]);
	if (argc == 2 && strcmp(argv[1], "list") == 0) return list();
	fprintf(stderr, "usage: objects run CONTAINER [OBJECT...] | verify CONTAINER | list\n");
	return 2;
}
