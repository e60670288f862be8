/*
 * A program that does as CRIU does, word by word of its command line, for tests of what
 * CRIU is started with:
 *
 *   alarm SECONDS    sets the alarm
 *   alarmed          says how many seconds of it are left
 *   freezer FILE     opens it as CRIU does; says why it cannot, and ends with 3
 *   touch FILE       makes it
 *   await FILE       waits until it is there
 *   answer           says over a socket, as to an OCI runtime, that the capture has succeeded
 *   connections      asks for tracked connections by a descriptor that is no socket any more
 *   alone MOUNT      lists what is in it without what is mounted there
 *   mappings PID     writes what it reads of the list of a process's mappings
 *   tar DIRECTORY    becomes the tar that archives it
 *   exit CODE
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/netfilter/nfnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 2;
}

static int connections(void)
{
	struct {
		struct nlmsghdr header;
		struct nfgenmsg of;
	} question = { .header = { sizeof(question), NFNL_SUBSYS_CTNETLINK << 8 | 1, NLM_F_REQUEST | NLM_F_DUMP, 24680, 0 } };
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	char answer[16384];
	struct iovec vector = { &question, sizeof(question) };
	struct msghdr message = { .msg_name = &kernel, .msg_namelen = sizeof(kernel), .msg_iov = &vector, .msg_iovlen = 1 };
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER), null = open("/dev/null", O_RDWR);
	if (fd < 0 || null < 0 || dup2(null, fd) < 0)
		return fail("socket");
	if (sendmsg(fd, &message, 0) != sizeof(question)) {
		puts("the kernel was asked");
		return 0;
	}
	vector = (struct iovec){ answer, sizeof(answer) };
	ssize_t n = recvmsg(fd, &message, 0);
	struct nlmsghdr *header = (struct nlmsghdr *)answer;
	if (n < (ssize_t)(sizeof(*header) + sizeof(int)) || header->nlmsg_len != n || header->nlmsg_type != NLMSG_DONE ||
	    header->nlmsg_seq != 24680 || *(int *)NLMSG_DATA(header) != 0)
		return fail("answer");
	puts("none");
	return 0;
}

static int alone(const char *what)
{
	char name[] = "/tmp/cr-tmpfs.XXXXXX";
	if (!mkdtemp(name))
		return fail(name);
	if (access(name, F_OK) == 0)
		puts("a directory was made");
	if (mount(what, name, NULL, MS_BIND, NULL) < 0)
		return fail(what);
	int fd = open(name, O_RDONLY | O_DIRECTORY);
	if (fd < 0 || umount2(name, MNT_DETACH) < 0 || rmdir(name) < 0)
		return fail(name);
	DIR *directory = fdopendir(fd);
	for (struct dirent *entry; directory && (entry = readdir(directory));)
		if (entry->d_name[0] != '.')
			puts(entry->d_name);
	return 0;
}

static int mappings(const char *pid)
{
	char text[4096];
	snprintf(text, sizeof(text), "/proc/%s", pid);
	int directory = open(text, O_RDONLY | O_DIRECTORY), fd = directory < 0 ? -1 : openat(directory, "smaps", O_RDONLY);
	if (fd < 0)
		return fail(text);
	for (ssize_t n; (n = read(fd, text, sizeof(text))) != 0;)
		if (n < 0 || fwrite(text, 1, n, stdout) != (size_t)n)
			return fail("smaps");
	return 0;
}

int main(int count, char **words)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	for (int i = 1; i < count; i++) {
		const char *word = words[i], *of = i + 1 < count ? words[i + 1] : "";
		int fd;
		if (strcmp(word, "alarmed") == 0) {
			printf("%u\n", alarm(0));
			continue;
		}
		if (strcmp(word, "answer") == 0) {
			int pair[2];
			if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0 || write(pair[0], "\x08\x01\x10\x01\x1a\x02\x08\x00", 8) != 8)
				return fail(word);
			continue;
		}
		if (strcmp(word, "connections") == 0) {
			int code = connections();
			if (code != 0)
				return code;
			continue;
		}
		i++;
		if (strcmp(word, "alarm") == 0) {
			alarm(atoi(of));
		} else if (strcmp(word, "freezer") == 0) {
			if (open(of, O_RDWR) < 0) {
				printf("%s\n", strerror(errno));
				return 3;
			}
		} else if (strcmp(word, "touch") == 0) {
			if ((fd = open(of, O_WRONLY | O_CREAT, 0600)) < 0)
				return fail(of);
			close(fd);
		} else if (strcmp(word, "await") == 0) {
			while (access(of, F_OK) < 0)
				usleep(1000);
		} else if (strcmp(word, "alone") == 0) {
			int code = alone(of);
			if (code != 0)
				return code;
		} else if (strcmp(word, "mappings") == 0) {
			int code = mappings(of);
			if (code != 0)
				return code;
		} else if (strcmp(word, "exit") == 0) {
			return atoi(of);
		} else if (strcmp(word, "tar") == 0) {
			char *tar[] = { "tar", "--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system", "--check-links",
				"--preserve-permissions", "--sparse", "--numeric-owner", "--directory", "/proc/self/fd/0", ".", NULL };
			if ((fd = open(of, O_RDONLY | O_DIRECTORY)) < 0 || dup2(fd, STDIN_FILENO) < 0)
				return fail(of);
			execvp(tar[0], tar);
			return fail(tar[0]);
		} else {
			fprintf(stderr, "what is %s?\n", word);
			return 2;
		}
	}
	return 0;
}
