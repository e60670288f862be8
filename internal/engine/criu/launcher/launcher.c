/* The program that is called criu on a node: it starts CRIU with the libraries beside it
 * instead of the host's, wherever the tree has been copied to (hack/criu.sh). It is no
 * shell script, for it is waited for at each restore, twice: the OCI runtime first asks
 * CRIU for its version. */
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef LINKER
#define LINKER "ld-linux-x86-64.so.2" /* its name in PREFIX/lib */
#endif

/* Libraries that Stasis asks for by a variable, each PREFIX/lib/stasis-NAME.so. */
static const struct { const char *variable, *name; } libraries[] = {
	/* To restore a container whose Pod's System V shared memory is there. */
	{"STASIS_JOIN_SHM", "joinshm"},
	/* To capture processes without their memory. */
	{"STASIS_NO_PAGES", "nopages"},
	/* To have it wait until the Pod stands still. */
	{"STASIS_AHEAD", "ahead"},
	/* To capture each connection at one moment. */
	{"STASIS_QUEUES", "queues"},
	/* To fill small file systems without tar and gzip. */
	{"STASIS_REFILL", "refill"},
};

enum { LIBRARIES = sizeof libraries / sizeof *libraries };

static char prefix[PATH_MAX];

/* join returns a text as printf makes it. */
__attribute__((format(printf, 1, 2))) static char *join(const char *format, ...)
{
	char *text;
	va_list args;

	va_start(args, format);
	if (vasprintf(&text, format, args) < 0) {
		perror("criu: launcher");
		exit(1);
	}
	va_end(args);
	return text;
}

static const char *preloaded(void)
{
	const char *list = "";

	for (int i = 0; i < LIBRARIES; i++) {
		const char *value = getenv(libraries[i].variable);
		if (value && *value)
			list = join("%s%s%s/lib/stasis-%s.so", list, *list ? ":" : "", prefix, libraries[i].name);
	}
	return list;
}

int main(int argc, char **argv)
{
	char **args = calloc(argc + 12, sizeof *args), **arg = args;
	const char *home = getenv("STASIS_CRIU_HOME");
	ssize_t length = readlink("/proc/self/exe", prefix, sizeof prefix - 1);
	const char *wanted;

	if (!args || length < 0) {
		perror(args ? "criu: launcher: read /proc/self/exe" : "criu: launcher");
		return 1;
	}
	for (int i = 0; i < 2; i++) { /* PREFIX/bin/criu */
		char *slash = strrchr(prefix, '/');
		if (slash)
			*slash = '\0';
	}
	wanted = preloaded();
	*arg++ = join("%s/lib/" LINKER, prefix);
	*arg++ = "--inhibit-cache";
	*arg++ = "--library-path";
	*arg++ = join("%s/lib", prefix);
	if (*wanted) {
		*arg++ = "--preload";
		*arg++ = (char *)wanted;
	}
	*arg++ = "--argv0";
	*arg++ = "criu";
	*arg++ = join("%s/libexec/criu", prefix);
	for (int i = 1; i < argc; i++)
		*arg++ = argv[i];
	/* Plugins of another CRIU that the host may have must not be loaded. */
	if (setenv("CRIU_LIBS_DIR", join("%s/lib/plugins", prefix), 1) < 0 ||
	    /* Where CRIU looks for .criu/default.conf (criu(8)), whoever starts it. Stasis adds to
	     * that file for one capture. */
	    setenv("HOME", home && *home ? home : join("%s/etc", prefix), 1) < 0 ||
	    /* A write past the limit of file sizes then fails instead of ending CRIU: that is how
	     * Stasis has it give up in good order. */
	    signal(SIGXFSZ, SIG_IGN) == SIG_ERR) {
		perror("criu: launcher");
		return 1;
	}
	execv(*args, args);
	fprintf(stderr, "criu: launcher: run %s: %m\n", *args);
	return 1;
}
