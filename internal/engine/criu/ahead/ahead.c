/*
 * A library that CRIU is started with (ld.so(8), --preload) to capture a container, so
 * that as little as possible happens while that stands still.
 *
 * It has CRIU wait before it touches a process: when it opens the freezer of the container,
 * which it does after all that it needs to know of the kernel and of itself. By the socket
 * that STASIS_AHEAD names it says that it waits, and by the same it is told to go on.
 * When nobody is at the other end any more CRIU fails, as if there were no freezer: it has
 * touched nothing, and nothing waits for ever. When it has let the processes go it says
 * so, for it takes a while until it and the OCI runtime have ended.
 *
 * Meanwhile it saves four things that take longer than all the rest of a small container:
 * the start of tar, a shell and gzip for each tmpfs that holds next to nothing; a directory
 * made on the container's disk, to mount there without its children each one that has any;
 * the walk through the kernel's table of connections for those of a network namespace that
 * has none; and the one through all page tables of a process for what the kernel counts with
 * its list of mappings. What is written is what would have been.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

/* The connection to who holds it, in the process that was held; -1 before. */
static int gate = -1;
static pid_t held;

static bool say(const char *what)
{
	size_t size = strlen(what);
	ssize_t n;
	do
		n = syscall(SYS_sendto, gate, what, size, MSG_NOSIGNAL, NULL, 0);
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)size;
}

/* wait_here returns when it is told to, and says whether to go on. */
static bool wait_here(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof(address.sun_path))
		return false;
	strcpy(address.sun_path, path);
	gate = syscall(SYS_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (gate < 0 || syscall(SYS_connect, gate, &address, sizeof(address)) < 0 || !say("held\n"))
		return false;
	char go;
	ssize_t n;
	do
		n = syscall(SYS_read, gate, &go, 1);
	while (n < 0 && errno == EINTR);
	return n == 1;
}

static bool ends_with(const char *text, const char *end)
{
	size_t n = strlen(text), m = strlen(end);
	return n >= m && strcmp(text + n - m, end) == 0;
}

/*
 * A mount without its children. CRIU makes a directory with this name, mounts there, opens
 * that, and undoes it. The kernel has it for the asking; it is in nobody's sight, and goes
 * with this process, after the processes have been let go.
 */
static char place[32]; /* the name that CRIU believes to have made; empty if none */
static int mounted = -1;

static bool is_place(const char *path)
{
	return place[0] && strcmp(path, place) == 0;
}

char *mkdtemp(char *name)
{
	static const char wanted[] = "/tmp/cr-tmpfs.XXXXXX";
	if (!held || strcmp(name, wanted) != 0) {
		char *(*real)(char *) = dlsym(RTLD_NEXT, "mkdtemp");
		return real(name);
	}
	return strcpy(place, name);
}

int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data)
{
	if (held && is_place(target) && flags == MS_BIND) {
		mounted = syscall(SYS_open_tree, AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
		if (mounted >= 0)
			return 0;
		place[0] = 0; /* as CRIU would have done it */
		if (mkdir(target, 0700) < 0)
			return -1;
	}
	return syscall(SYS_mount, source, target, type, flags, data);
}

int umount2(const char *target, int flags)
{
	return held && is_place(target) ? 0 : syscall(SYS_umount2, target, flags);
}

int rmdir(const char *path)
{
	if (held && is_place(path)) {
		place[0] = 0;
		return 0;
	}
	return syscall(SYS_rmdir, path);
}

/* mode_of is the argument that open(2) has when it may make a file. */
static mode_t mode_of(int flags, va_list list)
{
	return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, mode_t) : 0;
}

int open64(const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = mode_of(flags, list);
	va_end(list);
	if (held && is_place(path) && mounted >= 0)
		return syscall(SYS_openat, mounted, ".", flags | O_LARGEFILE);
	const char *socket = getenv("STASIS_AHEAD");
	if (socket && !held && (flags & O_ACCMODE) == O_RDWR &&
	    (ends_with(path, "/freezer.state") || ends_with(path, "/cgroup.freeze"))) {
		held = getpid();
		unsigned left = alarm(0); /* the time that it gives itself to stop the processes */
		if (!wait_here(socket)) {
			errno = ECANCELED;
			return -1;
		}
		alarm(left);
	}
	return syscall(SYS_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

/*
 * Lists of mappings. Of /proc/PID/smaps CRIU reads what needs no walk through page tables;
 * that may be in a file beside the socket.
 */
static int list_of(int directory)
{
	const char *socket = getenv("STASIS_AHEAD"), *end = socket ? strrchr(socket, '/') : NULL;
	char link[32], process[64], name[256];
	snprintf(link, sizeof(link), "/proc/self/fd/%d", directory);
	ssize_t n = readlink(link, process, sizeof(process) - 1);
	if (n < 0 || !end)
		return -1;
	process[n] = 0;
	const char *pid = strrchr(process, '/');
	if (!pid || !pid[1] || strspn(pid + 1, "0123456789") != strlen(pid + 1))
		return -1;
	n = snprintf(name, sizeof(name), "%.*s/smaps-%s", (int)(end - socket), socket, pid + 1);
	return n < (ssize_t)sizeof(name) ? syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC) : -1;
}

int openat64(int directory, const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = mode_of(flags, list);
	va_end(list);
	if (held && strcmp(path, "smaps") == 0 && (flags & O_ACCMODE) == O_RDONLY) {
		int fd = list_of(directory);
		if (fd >= 0)
			return fd;
	}
	return syscall(SYS_openat, directory, path, flags | O_LARGEFILE, mode);
}

/*
 * What CRIU tells the OCI runtime are protocol buffers, one a write. This is how the one
 * begins that says that a capture has succeeded: everything is written, the processes
 * are let go.
 */
static const char captured[] = "\x08\x01\x10\x01";

ssize_t write(int fd, const void *data, size_t size)
{
	int type;
	socklen_t length = sizeof(type);
	if (held && size >= 4 && memcmp(data, captured, 4) == 0 && held == getpid() &&
	    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type == SOCK_SEQPACKET)
		say("captured\n"); /* who does not hear it waits for the end */
	return syscall(SYS_write, fd, data, size);
}

/*
 * Archives. What is more than this, or is not plain, is left to tar.
 */
enum { BLOCK = 512, MOST = 256 << 10, DEEPEST = 16 };

static unsigned char archive[MOST];
static size_t archived;

static unsigned char *room(size_t size)
{
	size = (size + BLOCK - 1) / BLOCK * BLOCK;
	if (size > sizeof(archive) - archived)
		return NULL;
	unsigned char *at = archive + archived;
	archived += size;
	return at;
}

/* number writes one as ustar has it; false if it has more digits than fit. */
static bool number(char *field, size_t size, uint64_t value)
{
	field[size - 1] = 0;
	for (size_t i = size - 1; i-- > 0; value >>= 3)
		field[i] = '0' + (value & 7);
	return value == 0;
}

struct header { /* tar(5) */
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, target[100];
	char magic[6], version[2], uname[32], gname[32], major[8], minor[8], prefix[155], unused[12];
};
_Static_assert(sizeof(struct header) == BLOCK, "a header is a block");

/* add archives what is called name in a directory. */
static bool add(int directory, const char *name, const char *path, const struct stat *st)
{
	struct header *h = (struct header *)room(sizeof(*h));
	if (!h || strlen(path) >= sizeof(h->name))
		return false;
	strcpy(h->name, path);
	off_t size = 0;
	switch (st->st_mode & S_IFMT) {
	case S_IFDIR:
		h->type = '5';
		break;
	case S_IFLNK: {
		ssize_t n = readlinkat(directory, name, h->target, sizeof(h->target));
		if (n < 0 || n == sizeof(h->target))
			return false;
		h->type = '2';
		break;
	}
	case S_IFCHR:
	case S_IFBLK:
		h->type = S_ISCHR(st->st_mode) ? '3' : '4';
		if (!number(h->major, sizeof(h->major), major(st->st_rdev)) || !number(h->minor, sizeof(h->minor), minor(st->st_rdev)))
			return false;
		break;
	case S_IFIFO:
		h->type = '6';
		break;
	case S_IFREG:
		h->type = '0';
		size = st->st_size;
		break;
	default:
		return false;
	}
	/* A file of two names would have to be found again. */
	if ((h->type != '5' && st->st_nlink != 1) || st->st_mtime < 0 || size > MOST)
		return false;
	if (!number(h->mode, sizeof(h->mode), st->st_mode & 07777) || !number(h->uid, sizeof(h->uid), st->st_uid) ||
	    !number(h->gid, sizeof(h->gid), st->st_gid) || !number(h->size, sizeof(h->size), size) ||
	    !number(h->mtime, sizeof(h->mtime), st->st_mtime))
		return false;
	memcpy(h->magic, "ustar", 6);
	memcpy(h->version, "00", 2);
	memset(h->checksum, ' ', sizeof(h->checksum));
	unsigned sum = 0;
	for (size_t i = 0; i < sizeof(*h); i++)
		sum += ((unsigned char *)h)[i];
	number(h->checksum, 7, sum);
	if (size == 0)
		return true;
	unsigned char *content = room(size);
	int fd = content ? syscall(SYS_openat, directory, name, O_RDONLY | O_NOFOLLOW | O_NOATIME | O_CLOEXEC) : -1;
	if (fd < 0)
		return false;
	bool whole = syscall(SYS_read, fd, content, size) == size;
	close(fd);
	return whole;
}

/* add_all archives what is in a directory, whose path ends with a slash. */
static bool add_all(int fd, const char *path, dev_t device, int depth)
{
	DIR *directory = depth < DEEPEST ? fdopendir(fd) : NULL;
	if (!directory) {
		close(fd);
		return false;
	}
	bool good = true;
	while (good) {
		errno = 0;
		struct dirent *entry = readdir(directory);
		if (!entry) {
			good = errno == 0;
			break;
		}
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		struct stat st;
		char inner[sizeof(((struct header *)0)->name)];
		if (fstatat(dirfd(directory), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || st.st_dev != device) {
			good = false;
			break;
		}
		int n = snprintf(inner, sizeof(inner), "%s%s%s", path, entry->d_name, S_ISDIR(st.st_mode) ? "/" : "");
		good = n < (int)sizeof(inner) && add(dirfd(directory), entry->d_name, inner, &st);
		if (good && S_ISDIR(st.st_mode)) {
			int below = syscall(SYS_openat, dirfd(directory), entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			good = below >= 0 && add_all(below, inner, device, depth + 1);
		}
	}
	closedir(directory);
	return good;
}

static bool put(const void *data, size_t size)
{
	while (size > 0) {
		ssize_t n = syscall(SYS_write, STDOUT_FILENO, data, size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		data = (const char *)data + n;
		size -= n;
	}
	return true;
}

static uint32_t crc32(const unsigned char *data, size_t size)
{
	uint32_t table[256], crc = ~0U;
	for (uint32_t i = 0; i < 256; i++) {
		table[i] = i;
		for (int bit = 0; bit < 8; bit++)
			table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320 : 0);
	}
	for (size_t i = 0; i < size; i++)
		crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
	return ~crc;
}

/* put_gzip writes the archive as a gzip file (RFC 1952) that is not compressed (RFC 1951). */
static bool put_gzip(void)
{
	static const unsigned char header[10] = { 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3 };
	if (!put(header, sizeof(header)))
		return false;
	for (size_t at = 0; at < archived;) {
		size_t n = archived - at < 65535 ? archived - at : 65535;
		unsigned char block[5] = { at + n == archived, n, n >> 8, ~n, ~n >> 8 };
		if (!put(block, sizeof(block)) || !put(archive + at, n))
			return false;
		at += n;
	}
	uint32_t trailer[2] = { crc32(archive, archived), archived };
	return put(trailer, sizeof(trailer));
}

extern char **environ;

int execvp(const char *program, char *const arguments[])
{
	/* The directory is CRIU's standard input. */
	static const char *const tar[] = { "tar", "--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system",
		"--check-links", "--preserve-permissions", "--sparse", "--numeric-owner", "--directory", "/proc/self/fd/0", "." };
	const size_t words = sizeof(tar) / sizeof(*tar);
	size_t same = 0;
	while (held && same < words && arguments[same] && strcmp(arguments[same], tar[same]) == 0)
		same++;
	struct stat st;
	int fd;
	if (same == words && arguments[words] == NULL && fstat(STDIN_FILENO, &st) == 0 && S_ISDIR(st.st_mode) &&
	    add(STDIN_FILENO, ".", "./", &st) &&
	    (fd = syscall(SYS_openat, STDIN_FILENO, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0 &&
	    add_all(fd, "./", st.st_dev, 0) && room(2 * BLOCK))
		_exit(put_gzip() ? 0 : 1);
	return execvpe(program, arguments, environ);
}

/*
 * Connection tracking. CRIU asks once for connections and once for those that are expected.
 */
static int untracked = -1; /* the socket that it asks by */
static bool asked;
static struct nlmsghdr question;

/* nothing_tracked says whether the network namespace has no connections that are tracked,
 * and so expects none. */
static bool nothing_tracked(void)
{
	char text[2] = "";
	int fd = syscall(SYS_openat, AT_FDCWD, "/proc/sys/net/netfilter/nf_conntrack_count", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t n = syscall(SYS_read, fd, text, sizeof(text));
	close(fd);
	return n == 2 && text[0] == '0' && text[1] == '\n';
}

int socket(int domain, int type, int protocol)
{
	int fd = syscall(SYS_socket, domain, type, protocol);
	if (held && fd >= 0) {
		bool tracking = domain == AF_NETLINK && protocol == NETLINK_NETFILTER;
		if (tracking && nothing_tracked())
			untracked = fd;
		else if (untracked == fd)
			untracked = -1;
	}
	return fd;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	enum { CONNECTIONS = 1 << 8 | 1, EXPECTED = 2 << 8 | 1 }; /* linux/netfilter/nfnetlink.h */
	if (held && fd == untracked && message->msg_iovlen == 1 && message->msg_iov->iov_len >= sizeof(question)) {
		memcpy(&question, message->msg_iov->iov_base, sizeof(question));
		asked = (question.nlmsg_type == CONNECTIONS || question.nlmsg_type == EXPECTED) && (question.nlmsg_flags & NLM_F_DUMP) == NLM_F_DUMP;
		if (asked)
			return message->msg_iov->iov_len;
	}
	return syscall(SYS_sendmsg, fd, message, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	struct {
		struct nlmsghdr header;
		int error;
	} done = { .header = { sizeof(done), NLMSG_DONE, NLM_F_MULTI, question.nlmsg_seq, getpid() } };
	if (held && asked && fd == untracked && message->msg_iovlen == 1 && message->msg_iov->iov_len >= sizeof(done)) {
		asked = false;
		memcpy(message->msg_iov->iov_base, &done, sizeof(done));
		message->msg_flags = 0;
		return sizeof(done);
	}
	return syscall(SYS_recvmsg, fd, message, flags);
}
