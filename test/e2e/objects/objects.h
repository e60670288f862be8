// objects holds one of each kind of kernel object and checks, whenever it is asked,
// that it still is as it was set up. It is what the conformance tests checkpoint.
#ifndef OBJECTS_H
#define OBJECTS_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// object is one kind of kernel object. Each lives in a process of its own, so that
// what belongs to a process (its signals, limits, credentials) is no other's.
struct object {
	const char *name;
	const char *group; // the container that holds it, or "" for any
	void (*set_up)(void);
	void (*verify)(void); // leaves the object as it was
};

// failed gives up the step under way with a reason.
__attribute__((noreturn, format(printf, 1, 2))) void failed(const char *format, ...);

// note adds something to a good answer, for whoever asks.
__attribute__((format(printf, 1, 2))) void note(const char *format, ...);

// need gives up unless a condition holds; ok, unless a call returned no -1.
#define need(condition, ...)           \
	do {                               \
		if (!(condition)) failed(__VA_ARGS__); \
	} while (0)
#define ok(call) ok_(call, #call)
static inline long ok_(long result, const char *call) {
	if (result == -1) failed("%s: %s", call, strerror(errno));
	return result;
}

// start forks a process that runs work and is left alone; it ends with its parent.
int start(void (*work)(void));

// put writes a file, hold reads one and compares.
void put(const char *path, const char *content);
void hold(int fd, const char *content); // from its beginning, without moving
void is(const char *path, const char *content);
// comes waits until there is something to read.
void comes(int fd);
void nothing_comes(int fd);
// takes reads what lies ready, which must be this.
void takes(int fd, const char *content);

extern const struct object files[], events[], sockets[], processes[], memory[], containers[], refused[];

#endif
