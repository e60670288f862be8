/*
 * A library that CRIU is started with (ld.so(8), --preload) to restore a container of
 * a Pod whose System V shared memory (sysvipc(7)) has been brought back by another one.
 *
 * CRIU restores a container as if it were alone: it creates every segment of the IPC
 * namespace, under the ID that it had, and fills it. Here the segment is found instead,
 * and what CRIU fills is memory that nobody looks at: the other container may run
 * already. What the processes themselves attach, later, is the segment; that is done by
 * system calls of CRIU's own, which no library sees.
 *
 * A segment that is not there any more is created after all.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST = 4096 };

/* Segments that were found, and where CRIU believes to have attached one. */
static int found[MOST];
static int founds;
static struct { void *address; size_t size; } scratch;

/* wanted returns the ID that the next segment is to have (proc(5),
 * /proc/sys/kernel/shm_next_id), or -1. */
static int wanted(void)
{
	char text[16] = "";
	int fd = open("/proc/sys/kernel/shm_next_id", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, text, sizeof(text) - 1);
	close(fd);
	return n > 0 ? atoi(text) : -1;
}

/* forget takes the wish for an ID back: nothing will be created. It cannot be unset, only
 * be used up; by a segment that goes at once. */
static int forget(void)
{
	int id = syscall(SYS_shmget, IPC_PRIVATE, 4096, IPC_CREAT | 0600);
	return id < 0 ? -1 : syscall(SYS_shmctl, id, IPC_RMID, NULL);
}

int shmget(key_t key, size_t size, int flags)
{
	struct shmid_ds segment;
	int id = wanted();
	if ((flags & IPC_CREAT) && (flags & IPC_EXCL) && id >= 0 &&
	    syscall(SYS_shmctl, id, IPC_STAT, &segment) == 0 &&
	    segment.shm_segsz == size && segment.shm_perm.__key == key) {
		if (founds == MOST) {
			errno = ENOSPC;
			return -1;
		}
		if (forget() < 0)
			return -1;
		found[founds++] = id;
		return id;
	}
	return syscall(SYS_shmget, key, size, flags);
}

void *shmat(int id, const void *address, int flags)
{
	for (int i = 0; i < founds; i++) {
		struct shmid_ds segment;
		if (found[i] != id || address != NULL || scratch.address != NULL)
			continue;
		if (syscall(SYS_shmctl, id, IPC_STAT, &segment) < 0)
			return (void *)-1;
		void *memory = mmap(NULL, segment.shm_segsz, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (memory == MAP_FAILED)
			return (void *)-1;
		scratch.address = memory;
		scratch.size = segment.shm_segsz;
		return memory;
	}
	return (void *)syscall(SYS_shmat, id, address, flags);
}

int shmdt(const void *address)
{
	if (address != NULL && address == scratch.address) {
		scratch.address = NULL;
		return munmap((void *)address, scratch.size);
	}
	return syscall(SYS_shmdt, address);
}
