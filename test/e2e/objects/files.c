// What is held of files: descriptors, locks, and what lies in a directory tree.
#include "objects.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int fd, other;

static void set_up_file_position(void) {
	put("numbers", "0123456789");
	fd = ok(open("numbers", O_RDWR | O_APPEND | O_NONBLOCK));
	ok(lseek(fd, 4, SEEK_SET));
	other = ok(fcntl(fd, F_DUPFD_CLOEXEC, 500));
}

static void verify_file_position(void) {
	need(ok(lseek(fd, 0, SEEK_CUR)) == 4, "it is not where it was");
	int flags = ok(fcntl(fd, F_GETFL));
	need((flags & O_ACCMODE) == O_RDWR && flags & O_APPEND && flags & O_NONBLOCK, "its flags are %o", flags);
	need(other == 500 && ok(fcntl(other, F_GETFD)) == FD_CLOEXEC && ok(fcntl(fd, F_GETFD)) == 0, "close-on-exec is not as it was");
	ok(lseek(fd, 7, SEEK_SET));
	need(ok(lseek(other, 0, SEEK_CUR)) == 7, "the duplicate has a position of its own");
	ok(lseek(fd, 4, SEEK_SET));
}

static void set_up_directory(void) {
	ok(mkdir("inside", 0700));
	put("inside/file", "found");
	fd = ok(open("inside", O_RDONLY | O_DIRECTORY));
	other = ok(open("inside", O_PATH));
}

static void verify_directory(void) {
	int file = ok(openat(fd, "file", O_RDONLY));
	hold(file, "found");
	ok(close(file));
	file = ok(openat(other, "file", O_RDONLY));
	hold(file, "found");
	ok(close(file));
}

static void set_up_deleted_file(void) {
	put("gone", "no name, but here");
	fd = ok(open("gone", O_RDWR));
	ok(unlink("gone"));
}

static void verify_deleted_file(void) {
	struct stat st;
	hold(fd, "no name, but here");
	ok(fstat(fd, &st));
	need(st.st_nlink == 0 && access("gone", F_OK) != 0, "it has a name");
}

// A database's temporary files are as large as this.
enum { LARGE = 24 << 20 };

static void set_up_large_deleted_file(void) {
	static char block[1 << 20];
	fd = ok(open("gone", O_CREAT | O_RDWR, 0600));
	for (int i = 0; i < LARGE >> 20; i++) {
		memset(block, 'a' + i, sizeof block);
		ok(write(fd, block, sizeof block));
	}
	ok(unlink("gone"));
}

static void verify_large_deleted_file(void) {
	static char block[1 << 20];
	for (int i = 0; i < LARGE >> 20; i++) {
		need(ok(pread(fd, block, sizeof block, (off_t)i << 20)) == sizeof block, "it is shorter");
		for (size_t j = 0; j < sizeof block; j++) need(block[j] == 'a' + i, "byte %zu of block %d is %d", j, i, block[j]);
	}
}

static void set_up_nameless_file(void) {
	fd = ok(open(".", O_TMPFILE | O_RDWR, 0600));
	ok(write(fd, "never had a name", 16));
}

static void verify_nameless_file(void) { hold(fd, "never had a name"); }

static void set_up_deleted_link(void) {
	put("first", "of two names");
	ok(link("first", "second"));
	fd = ok(open("first", O_RDWR));
	ok(unlink("first"));
}

static void verify_deleted_link(void) {
	struct stat held, named;
	hold(fd, "of two names");
	ok(fstat(fd, &held));
	ok(stat("second", &named));
	need(held.st_ino == named.st_ino, "it is another file than the one of the remaining name");
	need(held.st_nlink == 1, "it has %d names", (int)held.st_nlink);
}

static void set_up_deleted_directory(void) {
	ok(mkdir("gone", 0700));
	fd = ok(open("gone", O_RDONLY | O_DIRECTORY));
	ok(rmdir("gone"));
}

static void verify_deleted_directory(void) {
	struct stat st;
	ok(fstat(fd, &st));
	need(S_ISDIR(st.st_mode) && access("gone", F_OK) != 0, "it is not as it was");
}

static void set_up_flock(void) {
	put("locked", "");
	fd = ok(open("locked", O_RDWR));
	ok(flock(fd, LOCK_EX));
}

static void verify_flock(void) {
	int again = ok(open("locked", O_RDWR));
	need(flock(again, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "another could lock it");
	ok(close(again));
	ok(flock(fd, LOCK_SH | LOCK_NB));
	ok(flock(fd, LOCK_EX | LOCK_NB));
}

static void set_up_record_lock(void) {
	put("locked", "0123456789");
	fd = ok(open("locked", O_RDWR));
	struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 2, .l_len = 3};
	ok(fcntl(fd, F_SETLK, &l));
}

static void verify_record_lock(void) {
	int pid = ok(fork());
	if (pid == 0) {
		struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
		_exit(!(fcntl(fd, F_GETLK, &l) == 0 && l.l_type == F_WRLCK && l.l_start == 2 && l.l_len == 3 && l.l_pid == getppid()));
	}
	int status;
	ok(waitpid(pid, &status, 0));
	need(status == 0, "another process does not find the lock");
}

static void set_up_description_lock(void) {
	put("locked", "0123456789");
	fd = ok(open("locked", O_RDWR));
	struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 4, .l_len = 2};
	ok(fcntl(fd, F_OFD_SETLK, &l));
}

static void verify_description_lock(void) {
	int again = ok(open("locked", O_RDWR));
	struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	ok(fcntl(again, F_OFD_GETLK, &l));
	ok(close(again));
	need(l.l_type == F_WRLCK && l.l_start == 4 && l.l_len == 2, "another descriptor does not find the lock");
	l = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
	ok(fcntl(fd, F_OFD_GETLK, &l));
	need(l.l_type == F_UNLCK, "its own descriptor is locked out");
}

static void set_up_lease(void) {
	put("leased", "");
	fd = ok(open("leased", O_RDONLY));
	ok(fcntl(fd, F_SETLEASE, F_RDLCK));
}

static void verify_lease(void) { need(ok(fcntl(fd, F_GETLEASE)) == F_RDLCK, "the lease is gone"); }

static void set_up_fifo(void) {
	ok(mkfifo("fifo", 0622));
	ok(chmod("fifo", 0622));
	fd = ok(open("fifo", O_RDONLY | O_NONBLOCK));
	other = ok(open("fifo", O_WRONLY));
	ok(write(other, "in the fifo", 11));
}

static void verify_fifo(void) {
	struct stat st;
	ok(stat("fifo", &st));
	need(S_ISFIFO(st.st_mode) && (st.st_mode & 0777) == 0622, "its mode is %o", st.st_mode);
	takes(fd, "in the fifo");
	ok(write(other, "in the fifo", 11));
}

static void set_up_modes(void) {
	put("suid", "x");
	ok(chmod("suid", 04751));
	ok(mkdir("sticky", 0700));
	ok(chmod("sticky", 03770));
	ok(symlink("../nowhere", "symlink"));
	put("old", "old");
	struct timespec past[2] = {{1000000000, 123456789}, {1000000000, 123456789}};
	ok(utimensat(AT_FDCWD, "old", past, 0));
}

static void verify_modes(void) {
	struct stat st;
	ok(stat("suid", &st));
	need((st.st_mode & 07777) == 04751, "the set-user-ID file has mode %o", st.st_mode);
	ok(stat("sticky", &st));
	need((st.st_mode & 07777) == 03770, "the directory has mode %o", st.st_mode);
	ok(stat("old", &st));
	need(st.st_mtim.tv_sec == 1000000000 && st.st_mtim.tv_nsec == 123456789, "the old file was modified at %ld", (long)st.st_mtim.tv_sec);
	char target[32] = "";
	ok(readlink("symlink", target, sizeof target - 1));
	need(strcmp(target, "../nowhere") == 0, "the link leads to %s", target);
}

static void set_up_owner(void) {
	put("owned", "x");
	ok(chown("owned", 1234, 4321));
}

static void verify_owner(void) {
	struct stat st;
	ok(stat("owned", &st));
	need(st.st_uid == 1234 && st.st_gid == 4321, "it is %d:%d's", st.st_uid, st.st_gid);
}

static void set_up_xattr(void) {
	put("attributed", "x");
	ok(setxattr("attributed", "user.note", "kept\0too", 8, 0));
	ok(setxattr(".", "user.directory", "too", 3, 0));
}

static void verify_xattr(void) {
	char value[32];
	need(ok(getxattr("attributed", "user.note", value, sizeof value)) == 8 && memcmp(value, "kept\0too", 8) == 0, "the file's is another");
	need(ok(getxattr(".", "user.directory", value, sizeof value)) == 3 && memcmp(value, "too", 3) == 0, "the directory's is another");
}

static void set_up_file_capabilities(void) {
	// CAP_NET_BIND_SERVICE, permitted and effective (linux/capability.h, revision 2).
	static const uint32_t capability[5] = {0x02000001, 1 << 10, 0, 0, 0};
	put("capable", "x");
	ok(setxattr("capable", "security.capability", capability, sizeof capability, 0));
}

static void verify_file_capabilities(void) {
	uint32_t value[8];
	need(ok(getxattr("capable", "security.capability", value, sizeof value)) == 20 && value[0] == 0x02000001 && value[1] == 1 << 10, "they are others");
}

static void set_up_hard_links(void) {
	put("one", "linked");
	ok(link("one", "other"));
	ok(mkdir("below", 0755));
	ok(link("one", "below/third"));
}

static void verify_hard_links(void) {
	struct stat one, another, third;
	ok(stat("one", &one));
	ok(stat("other", &another));
	ok(stat("below/third", &third));
	need(one.st_ino == another.st_ino && one.st_ino == third.st_ino && one.st_nlink == 3, "they are %d files", (int)(4 - one.st_nlink));
	is("below/third", "linked");
}

enum { HOLE = 1 << 30 };

static void set_up_sparse_file(void) {
	fd = ok(open("sparse", O_CREAT | O_RDWR, 0644));
	ok(pwrite(fd, "begin", 5, 0));
	ok(pwrite(fd, "middle", 6, HOLE / 2));
	ok(ftruncate(fd, HOLE));
}

static void verify_sparse_file(void) {
	struct stat st;
	char text[8] = "";
	ok(stat("sparse", &st));
	need(st.st_size == HOLE, "it is of %lld bytes", (long long)st.st_size);
	need(st.st_blocks * 512LL < 1 << 20, "it takes up %lld bytes", st.st_blocks * 512LL);
	ok(pread(fd, text, 5, 0));
	need(strcmp(text, "begin") == 0, "it begins with %s", text);
	ok(pread(fd, text, 7, HOLE / 2));
	need(memcmp(text, "middle", 7) == 0, "in its middle is %s", text);
	ok(pread(fd, text, 1, HOLE - 1));
	need(text[0] == 0, "it ends with %d", text[0]);
}

enum { MANY = 10000 };

static void set_up_large_tree(void) {
	char name[64];
	for (int i = 0; i < MANY; i++) {
		snprintf(name, sizeof name, "%02d", i % 100);
		if (i < 100) ok(mkdir(name, 0755));
		snprintf(name, sizeof name, "%02d/%d", i % 100, i);
		put(name, name);
	}
}

static int counted;

static int count(const char *path, const struct stat *st, int type, struct FTW *where) {
	(void)where;
	if (type != FTW_F) return 0;
	counted++;
	return st->st_size == (off_t)strlen(path + 2) ? 0 : 1;
}

static void verify_large_tree(void) {
	counted = 0;
	need(nftw(".", count, 32, FTW_PHYS) == 0, "a file has another size");
	need(counted == MANY, "there are %d files", counted);
	is("37/4237", "37/4237");
}

// The image has /image (test/e2e/image).
static void set_up_image_files(void) {
	ok(unlink("/image/removed"));
	put("/image/changed", "changed");
	ok(chmod("/image/mode", 0600));
	ok(unlink("/image/directory/old"));
	ok(rmdir("/image/directory"));
	ok(mkdir("/image/directory", 0755));
	put("/image/directory/new", "new");
}

static void verify_image_files(void) {
	struct stat st;
	need(access("/image/removed", F_OK) != 0, "the removed file is back");
	need(access("/image/directory/old", F_OK) != 0, "the replaced directory shows what was in it");
	is("/image/directory/new", "new");
	is("/image/changed", "changed");
	is("/image/kept", "kept\n");
	ok(stat("/image/mode", &st));
	need((st.st_mode & 0777) == 0600, "the changed mode is %o", st.st_mode);
}

const struct object files[] = {
	{"file-position", "", set_up_file_position, verify_file_position},
	{"open-directory", "", set_up_directory, verify_directory},
	{"deleted-file", "", set_up_deleted_file, verify_deleted_file},
	{"large-deleted-file", "plain", set_up_large_deleted_file, verify_large_deleted_file},
	{"nameless-file", "", set_up_nameless_file, verify_nameless_file},
	{"deleted-link", "refused", set_up_deleted_link, verify_deleted_link},
	{"deleted-directory", "", set_up_deleted_directory, verify_deleted_directory},
	{"flock", "", set_up_flock, verify_flock},
	{"record-lock", "", set_up_record_lock, verify_record_lock},
	{"description-lock", "", set_up_description_lock, verify_description_lock},
	{"file-lease", "", set_up_lease, verify_lease},
	{"fifo", "", set_up_fifo, verify_fifo},
	{"modes-times-and-symlinks", "", set_up_modes, verify_modes},
	{"owner", "plain", set_up_owner, verify_owner},
	{"extended-attributes", "", set_up_xattr, verify_xattr},
	{"file-capabilities", "plain", set_up_file_capabilities, verify_file_capabilities},
	{"hard-links", "", set_up_hard_links, verify_hard_links},
	{"sparse-file", "", set_up_sparse_file, verify_sparse_file},
	{"ten-thousand-files", "plain", set_up_large_tree, verify_large_tree},
	{"files-of-the-image", "plain", set_up_image_files, verify_image_files},
	{0},
};
