/*
 * A library that CRIU is started with (ld.so(8), --preload) to restore a container. CRIU
 * has tar and gzip fill each tmpfs that the container has of its own: two programs' starts
 * for some devices in /dev, next to nothing elsewhere. Those it fills itself whose archive
 * is as ahead.c writes it: small, not compressed, and plain.
 *
 * An archive is somebody's who could make a checkpoint. It is looked through whole before
 * anything is made of it; names are plain and lead nowhere but below the directory, which
 * openat2(2) sees to. What is otherwise, and what does not work, is left to tar, which
 * begins anew.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { BLOCK = 512, MOST = 256 << 10, NAME = 100 };

/* The archive, without what gzip has around it. */
static unsigned char archive[MOST];
static size_t archived;

struct header { /* tar(5) */
	char name[NAME], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, target[NAME];
	char magic[6], version[2], uname[32], gname[32], major[8], minor[8], prefix[155], unused[12];
};
_Static_assert(sizeof(struct header) == BLOCK, "a header is a block");

/* entry is what a header says, with names that end. */
struct entry {
	char name[NAME + 1], target[NAME + 1]; /* the name without "./" and a last slash */
	char type;
	mode_t mode;
	uid_t uid;
	gid_t gid;
	dev_t device;
	struct timespec times[2];
	const unsigned char *content;
	size_t size;
};

/* get reads a file from its present offset on, which stays. It returns what there is of
 * size bytes, or -1. */
static ssize_t get(int fd, void *data, size_t size)
{
	off_t at = lseek(fd, 0, SEEK_CUR);
	size_t length = 0;
	ssize_t n = at < 0 ? -1 : 1;

	while (n > 0 && length < size) {
		n = pread(fd, (char *)data + length, size - length, at + length);
		if (n > 0)
			length += n;
		else if (n < 0 && errno == EINTR)
			n = 1;
	}
	return n < 0 ? -1 : (ssize_t)length;
}

/* unwrap reads a gzip file (RFC 1952) whose blocks are stored as they are (RFC 1951). What
 * it is has been verified as a file of the checkpoint: its checksum, at which tar would look, is not looked at. */
static bool unwrap(int fd)
{
	static const unsigned char begin[10] = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3};
	static unsigned char file[MOST + 128];
	ssize_t length = get(fd, file, sizeof file);
	size_t at = sizeof begin;
	bool last = false;

	if (length < (ssize_t)sizeof begin || length == sizeof file || memcmp(file, begin, sizeof begin) != 0)
		return false;
	for (archived = 0; !last;) {
		if (length - at < 5)
			return false;
		size_t size = file[at + 1] | file[at + 2] << 8, inverse = file[at + 3] | file[at + 4] << 8;
		if (file[at] > 1 || (size ^ inverse) != 0xffff)
			return false;
		last = file[at];
		at += 5;
		if (size > length - at || size > sizeof archive - archived)
			return false;
		memcpy(archive + archived, file + at, size);
		archived += size;
		at += size;
	}
	return length - at == 8;
}

/* number reads octal digits up to a NUL or a space. */
static bool number(const char *field, size_t size, uint64_t *value)
{
	size_t i = 0;

	for (*value = 0; i < size && field[i] >= '0' && field[i] <= '7'; i++)
		*value = *value << 3 | (field[i] - '0');
	return i > 0 && i < size && (field[i] == '\0' || field[i] == ' ');
}

/* plain says whether a name leads down step by step: nothing in it is empty, "." or "..". */
static bool plain(const char *name)
{
	while (*name) {
		size_t n = strcspn(name, "/");
		if (n == 0 || (n <= 2 && strncmp(name, "..", n) == 0))
			return false;
		name += n;
		if (*name && !*++name)
			return false;
	}
	return true;
}

/* read_entry reads the entry at an offset of the archive, and moves that to the next one. */
static bool read_entry(size_t *at, struct entry *e)
{
	struct header h;
	uint64_t mode, uid, gid, size, mtime, checksum, major = 0, minor = 0, sum = 0;
	char name[NAME + 1] = "";

	if (archived - *at < sizeof h)
		return false;
	memcpy(&h, archive + *at, sizeof h);
	*at += sizeof h;
	if (memcmp(h.magic, "ustar", 6) != 0 || memcmp(h.version, "00", 2) != 0 || h.prefix[0] || !number(h.mode, sizeof h.mode, &mode) ||
	    !number(h.uid, sizeof h.uid, &uid) || !number(h.gid, sizeof h.gid, &gid) || !number(h.size, sizeof h.size, &size) ||
	    !number(h.mtime, sizeof h.mtime, &mtime) || !number(h.checksum, sizeof h.checksum, &checksum))
		return false;
	memset(h.checksum, ' ', sizeof h.checksum);
	for (size_t i = 0; i < sizeof h; i++)
		sum += ((const unsigned char *)&h)[i];
	if (sum != checksum || mode > 07777)
		return false;
	memset(e, 0, sizeof *e);
	e->type = h.type;
	e->mode = mode;
	e->uid = uid;
	e->gid = gid;
	e->times[0].tv_nsec = UTIME_OMIT; /* read, it was not */
	e->times[1].tv_sec = mtime;
	memcpy(e->target, h.target, NAME);
	memcpy(name, h.name, NAME);
	size_t length = strlen(name);
	if (strncmp(name, "./", 2) != 0 || (name[length - 1] == '/') != (e->type == '5'))
		return false;
	if (e->type == '5')
		name[length - 1] = '\0';
	if (length > 2)
		strcpy(e->name, name + 2);
	if (!plain(e->name) || (e->name[0] == '\0' && e->type != '5') || (size && e->type != '0'))
		return false;
	switch (e->type) {
	case '0':
		if (size > archived - *at)
			return false;
		e->content = archive + *at;
		e->size = size;
		*at += (size + BLOCK - 1) / BLOCK * BLOCK;
		return *at <= archived;
	case '2':
		return e->target[0] != '\0';
	case '3':
	case '4':
		if (!number(h.major, sizeof h.major, &major) || !number(h.minor, sizeof h.minor, &minor))
			return false;
		e->device = makedev(major, minor);
		return true;
	case '5':
	case '6':
		return true;
	}
	return false;
}

/* ended says whether the archive ends at an offset: with blocks of zeros. */
static bool ended(size_t at)
{
	for (size_t i = at; i < archived; i++)
		if (archive[i])
			return false;
	return archived - at >= 2 * BLOCK;
}

/* below opens something below a directory, to which no link leads. */
static int below(int directory, const char *name, int flags)
{
	struct open_how how = {.flags = flags | O_NOFOLLOW | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV};

	return syscall(SYS_openat2, directory, *name ? name : ".", &how, sizeof how);
}

/* attributes gives what has just been made the owner, mode and time that it had. */
static bool attributes(int parent, const char *name, const struct entry *e)
{
	return fchownat(parent, name, e->uid, e->gid, AT_SYMLINK_NOFOLLOW) == 0 &&
	       (e->type == '2' || fchmodat(parent, name, e->mode, 0) == 0) && utimensat(parent, name, e->times, AT_SYMLINK_NOFOLLOW) == 0;
}

static bool make_file(int parent, const char *name, const struct entry *e)
{
	int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	size_t written = 0;
	bool good = fd >= 0;

	while (good && written < e->size) {
		ssize_t n = write(fd, e->content + written, e->size - written);
		if (n > 0)
			written += n;
		else
			good = n < 0 && errno == EINTR;
	}
	return fd >= 0 && close(fd) == 0 && good;
}

/* make makes an entry that is not the directory itself. */
static bool make(int directory, const struct entry *e)
{
	char path[NAME + 1];
	const char *name = e->name;
	int parent;
	bool good = false;

	strcpy(path, e->name);
	char *slash = strrchr(path, '/');
	if (slash) {
		*slash = '\0';
		name = e->name + (slash + 1 - path);
	}
	parent = below(directory, slash ? path : "", O_RDONLY | O_DIRECTORY);
	if (parent < 0)
		return false;
	switch (e->type) {
	case '0':
		good = make_file(parent, name, e);
		break;
	case '2':
		good = symlinkat(e->target, parent, name) == 0;
		break;
	case '3':
		good = mknodat(parent, name, S_IFCHR | 0600, e->device) == 0;
		break;
	case '4':
		good = mknodat(parent, name, S_IFBLK | 0600, e->device) == 0;
		break;
	case '5':
		good = mkdirat(parent, name, 0700) == 0;
		break;
	case '6':
		good = mknodat(parent, name, S_IFIFO | 0600, 0) == 0;
		break;
	}
	/* A directory's come when all is in it. */
	good = good && (e->type == '5' || attributes(parent, name, e));
	close(parent);
	return good;
}

/* finish gives a directory its attributes. */
static bool finish(int directory, const struct entry *e)
{
	int fd = below(directory, e->name, O_RDONLY | O_DIRECTORY);
	bool good = fd >= 0 && fchown(fd, e->uid, e->gid) == 0 && fchmod(fd, e->mode) == 0 && futimens(fd, e->times) == 0;

	if (fd >= 0)
		close(fd);
	return good;
}

/* refill fills a directory from the archive that is a file. */
static bool refill(int fd, const char *name)
{
	struct entry e;
	size_t at = 0;
	int directory;
	bool good = true;

	if (!unwrap(fd))
		return false;
	while (!ended(at))
		if (!read_entry(&at, &e))
			return false;
	directory = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (directory < 0)
		return false;
	for (at = 0; good && !ended(at);)
		good = read_entry(&at, &e) && (e.name[0] == '\0' || make(directory, &e));
	for (at = 0; good && !ended(at);)
		good = read_entry(&at, &e) && (e.type != '5' || finish(directory, &e));
	close(directory);
	return good;
}

extern char **environ;

int execvp(const char *program, char *const arguments[])
{
	/* The archive is the standard input; the last argument is the directory. */
	static const char *const tar[] = {"tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"};
	const size_t words = sizeof tar / sizeof *tar;
	size_t same = 0;

	while (same < words && arguments[same] && strcmp(arguments[same], tar[same]) == 0)
		same++;
	if (same == words && arguments[words] && !arguments[words + 1] && refill(STDIN_FILENO, arguments[words]))
		_exit(0);
	return execvpe(program, arguments, environ);
}
