// What cannot be captured: a checkpoint is refused before anything is frozen.
// More of these are beside their like, in the group "refused".
#include "objects.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void holds(void) {}

static void idle(void) {}

static void set_up_stopped(void) {
	int pid = start(idle);
	ok(kill(pid, SIGSTOP));
	ok(waitpid(pid, NULL, WUNTRACED));
}

static void set_up_traced(void) {
	int pid = start(idle);
	ok(ptrace(PTRACE_SEIZE, pid, 0, 0));
}

static void set_up_io_uring(void) {
	struct io_uring_params p = {0};
	ok(syscall(SYS_io_uring_setup, 4, &p));
}

static void set_up_userfaultfd(void) { ok(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)); }

static void set_up_multipath(void) { ok(socket(AF_INET, SOCK_STREAM, 262 /* IPPROTO_MPTCP */)); }

static void set_up_icmp_echo(void) { ok(socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP)); }

static void set_up_message_queue(void) { ok(mq_open("/objects", O_CREAT | O_RDWR, 0600, NULL)); }

const struct object refused[] = {
	{"stopped-process", "refused", set_up_stopped, holds},
	{"traced-process", "refused", set_up_traced, holds},
	{"io_uring", "refused", set_up_io_uring, holds},
	{"userfaultfd", "refused", set_up_userfaultfd, holds},
	{"multipath-tcp", "refused", set_up_multipath, holds},
	{"icmp-echo-socket", "refused", set_up_icmp_echo, holds},
	{"posix-message-queue", "refused", set_up_message_queue, holds},
	{0},
};
