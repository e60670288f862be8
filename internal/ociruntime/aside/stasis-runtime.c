/* stasis-runtime is the OCI runtime of the handler "stasis". It becomes the real one,
 * with the command line as it came, where nothing of Stasis is asked for; else it becomes
 * stasis-restore beside it, which knows everything. Under another name it is CRIU's action
 * script (internal/engine/criu/freezehook.go).
 *
 * Every container of every Pod waits for it, several times. So it does no more than
 * look, and it is no Go program: the start of one takes longer than all that is done
 * here. What it is not sure about, and every error, it leaves to stasis-restore.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define FULL "stasis-restore"
/* criu.FreezeHookName and criu.HookSocketEnv; the variables by which CRIU tells an action
 * script the stage and the container's first process (criu(8)). */
#define FREEZE_HOOK "stasis-freeze-hook"
#define HOOK_SOCKET "STASIS_FREEZE_SOCKET"
#define STAGE "CRTOOLS_SCRIPT_ACTION"
#define FIRST "CRTOOLS_INIT_PID"
/* How long the restoring process may be silent. */
#ifndef PATIENCE_SECONDS
#define PATIENCE_SECONDS 30
#endif
/* ociruntime.MarkerName: there is one in the real runtime's state directory of each
 * container of a restored Pod. */
#define MARKER "stasis.json"
/* criu.RestorePrefix: so begin the names of what is in the agent's run directory from
 * before a container's restore begins until it has ended in good order. */
#define RESTORE_PREFIX "freeze-"
/* nodeapi.LookCommand: a command that no other runtime has. */
#define LOOK "stasis-look"

#define SPACE " \t\r\n"

static bool same(const char *a, const char *b) { return strcmp(a, b) == 0; }

/* put writes a file's name. One that is too long becomes one that no file has. */
__attribute__((format(printf, 2, 3))) static char *put(char name[PATH_MAX], const char *format, ...)
{
	va_list args;

	va_start(args, format);
	if (vsnprintf(name, PATH_MAX, format, args) >= PATH_MAX)
		strcpy(name, "/dev/null/too-long");
	va_end(args);
	return name;
}

/* read_file reads a whole file into text, of size bytes, and puts a NUL behind it. It
 * returns the file's length, or -1: a file that does not fit is an error too. */
static ssize_t read_file(const char *name, char *text, size_t size)
{
	size_t length = 0;
	ssize_t got;
	int fd = open(name, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	do {
		got = read(fd, text + length, size - length);
		if (got > 0)
			length += got;
		if (length == size) {
			got = -1;
			errno = EFBIG;
		}
	} while (got > 0 || (got < 0 && errno == EINTR));
	close(fd); /* never sets ENOENT */
	text[got < 0 ? 0 : length] = '\0';
	return got < 0 ? -1 : (ssize_t)length;
}

/* exists says whether there is, or may be, a file of that name. */
static bool exists(const char *name)
{
	struct stat st;

	return lstat(name, &st) == 0 || errno != ENOENT;
}

/* What is read of a command line. */
struct invocation {
	const char *root;    /* --root */
	const char *command; /* "create", "start", …; NULL if there is none */
	const char *bundle;  /* --bundle of create */
	const char *id;      /* the first argument of the command that is no option; NULL if there is none */
};

/* An option that takes a value (runc(8), crun(1)), and where that goes. */
struct option {
	const char *name;
	const char **value;
};

/* skip_options goes past the options at arg, and returns the first argument that is none.
 * Those that are not in the list, which a NULL ends, take no value. */
static char **skip_options(char **arg, const struct option *known)
{
	const char *name;
	size_t length;

	while (*arg && (*arg)[0] == '-' && (*arg)[1] != '\0') {
		if (same(name = *arg++, "--"))
			return arg;
		name += strspn(name, "-");
		length = strcspn(name, "=");
		for (const struct option *o = known; o->name; o++) {
			if (strlen(o->name) != length || strncmp(o->name, name, length) != 0)
				continue;
			if (name[length] == '=')
				*o->value = name + length + 1;
			else if (*arg)
				*o->value = *arg++;
		}
	}
	return arg;
}

static struct invocation parse(char **arg)
{
	const char *ignored;
	struct invocation in = {.root = "/run/runc", .bundle = "."};
	const struct option global[] = {
		{"root", &in.root}, {"log", &ignored}, {"log-format", &ignored}, {"criu", &ignored},
		{"rootless", &ignored}, {"cgroup-manager", &ignored}, {NULL, NULL}};
	const struct option own[] = {
		{"bundle", &in.bundle}, {"b", &in.bundle}, {"pid-file", &ignored}, {"console-socket", &ignored},
		{"preserve-fds", &ignored}, {"process", &ignored}, {"p", &ignored}, {"user-log", &ignored}, {NULL, NULL}};

	arg = skip_options(arg, global);
	in.command = *arg;
	/* kill has a signal after the ID, and options may be anywhere. */
	while (*arg && *(arg = skip_options(arg + 1, own)))
		if (!in.id)
			in.id = *arg;
	return in;
}

/* What is read of etc/runtime.json. */
struct config {
	const char *runtime; /* the real runtime: a path, or a name found in PATH */
	const char *run_dir; /* where the agent's socket is */
};

/* token goes past a character of JSON and the white space behind it, if it is there. */
static bool token(char **at, char c)
{
	if (**at != c)
		return false;
	*at += 1 + strspn(*at + 1, SPACE);
	return true;
}

/* string goes past a JSON string without escapes that is not empty, and returns it; NULL
 * for all else. */
static char *string(char **at)
{
	char *text = *at + 1;
	size_t length = strcspn(text, "\"\\");

	if (**at != '"' || length == 0 || text[length] != '"')
		return NULL;
	*at = text + length;
	token(at, '"');
	text[length] = '\0';
	return text;
}

/* read_config says whether the configuration was understood; text has to stay. */
static bool read_config(const char *name, char *text, size_t size, struct config *config)
{
	char *at = text, *member, *value, *slash;
	ssize_t length = read_file(name, text, size);

	if (length < 0)
		return errno == ENOENT;
	at += strspn(at, SPACE);
	if (!token(&at, '{'))
		return false;
	do {
		if (!(member = string(&at)) || !token(&at, ':') || !(value = string(&at)))
			return false;
		if (same(member, "runtime")) {
			config->runtime = value;
		} else if (same(member, "socket") && (slash = strrchr(value, '/'))) {
			*slash = '\0';
			config->run_dir = value;
		} else {
			return false;
		}
	} while (token(&at, ','));
	return token(&at, '}') && at == text + length;
}

/* concerns says whether an OCI spec may have an annotation that Stasis acts upon: one that
 * asks for a restore, or would reach the engine past Stasis. Whoever reads JSON finds such
 * a name only where the text has it behind a quotation mark, or where it is spelled with
 * escapes; the escapes that Go's encoding/json writes itself for what is none (<, >, &,
 * U+2028, U+2029) spell none of its characters. */
static bool concerns(const char *text, size_t length)
{
	static const char *const names[] = {
		"\"org.criu.", "\"checkpoint.podstasis.dev/restore-from", "\"checkpoint.podstasis.dev/restore-ticket"};
	static const char *const harmless[] = {"u003c", "u003e", "u0026", "u2028", "u2029"};
	const char *end = text + length, *at = text;

	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (memmem(text, length, names[i], strlen(names[i])))
			return true;
	while ((at = memchr(at, '\\', end - at))) {
		/* There is a NUL at the end. */
		bool known = at[1] != '\0' && strchr("\"\\bfnrt", at[1]);
		for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
			known = known || strncmp(at + 1, harmless[i], strlen(harmless[i])) == 0;
		if (!known)
			return true;
		at += 2;
	}
	return false;
}

static bool ordinary_bundle(const char *dir)
{
	static char spec[4 << 20];
	char name[PATH_MAX];
	ssize_t length = read_file(put(name, "%s/config.json", *dir ? dir : "."), spec, sizeof spec);

	return length >= 0 && !concerns(spec, length);
}

/* restoring says whether a restore may be under way on this node, or may have been
 * interrupted. */
static bool restoring(const char *run_dir)
{
	struct dirent *entry;
	DIR *dir = opendir(run_dir);

	if (!dir)
		return errno != ENOENT;
	errno = 0;
	while ((entry = readdir(dir)))
		if (strncmp(entry->d_name, RESTORE_PREFIX, strlen(RESTORE_PREFIX)) == 0)
			return true;
	return errno != 0; /* the directory is closed by exec, as above */
}

/* ordinary says whether a command is for the real runtime, for sure. */
static bool ordinary(struct invocation in, struct config config)
{
	char marker[PATH_MAX];

	if (!in.command)
		return true;
	if (same(in.command, LOOK))
		return false;
	if (same(in.command, "create"))
		return ordinary_bundle(in.bundle);
	if (!same(in.command, "start") && !same(in.command, "kill") && !same(in.command, "delete"))
		return true;
	if (exists(put(marker, "%s/%s/%s", in.root, in.id ? in.id : "", MARKER)))
		return false;
	return !same(in.command, "delete") || !restoring(config.run_dir);
}

/* become becomes a program, found in PATH when its name has no slash: in directories that
 * do not depend on where it is called. It returns if it cannot. */
static void become(const char *program, char **argv)
{
	char file[PATH_MAX], *dir, *path = getenv("PATH");

	if (strchr(program, '/')) {
		argv[0] = (char *)program;
		execv(program, argv);
		return;
	}
	if (!path || !(path = strdup(path)))
		return;
	while ((dir = strsep(&path, ":")))
		if (dir[0] == '/') {
			argv[0] = put(file, "%s/%s", dir, program);
			execv(file, argv);
		}
}

/* ask_for_freeze tells the restoring process, at a socket, that the container's processes
 * are complete, and returns whether it has frozen them. */
static bool ask_for_freeze(int fd, const char *path)
{
	const struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
	const char *first = getenv(FIRST);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char answer[4096];
	size_t length = 0;
	ssize_t got;

	if (strlen(path) >= sizeof address.sun_path) {
		fprintf(stderr, FREEZE_HOOK ": the name of the restoring process' socket is too long: %s\n", path);
		return false;
	}
	strcpy(address.sun_path, path);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0 ||
	    connect(fd, (struct sockaddr *)&address, sizeof address) < 0 || dprintf(fd, "%s\n", first ? first : "") < 0) {
		fprintf(stderr, FREEZE_HOOK ": tell the restoring process at %s: %m\n", path);
		return false;
	}
	do {
		got = read(fd, answer + length, sizeof answer - 1 - length);
		if (got > 0)
			length += got;
	} while (got > 0 || (got < 0 && errno == EINTR));
	answer[length] = '\0';
	if (got < 0) {
		fprintf(stderr, FREEZE_HOOK ": wait for the restoring process at %s: %m\n", path);
		return false;
	}
	if (!same(answer, "frozen\n")) {
		fprintf(stderr, FREEZE_HOOK ": the restoring process could not freeze the container: %s\n", answer);
		return false;
	}
	return true;
}

/* freeze_hook is what CRIU calls at each stage of a restore. CRIU lets the processes go when
 * it returns, whatever it returns. So it does not as long as nobody has frozen them:
 * criu.EndRestores ends it. */
static int freeze_hook(void)
{
	const char *stage = getenv(STAGE), *path = getenv(HOOK_SOCKET);
	int fd;

	if (!stage || !same(stage, "pre-resume"))
		return 0;
	signal(SIGPIPE, SIG_IGN);
	if (!path || !*path)
		fprintf(stderr, FREEZE_HOOK ": it is CRIU's action script in a restore by Stasis: no " HOOK_SOCKET "\n");
	else {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (ask_for_freeze(fd, path))
			return 0;
		close(fd); /* so that the other side knows that nobody waits for its answer */
	}
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	static char text[64 << 10], bin[PATH_MAX], file[PATH_MAX], full[PATH_MAX];
	static char *no_arguments[] = {"stasis-runtime", NULL};
	struct config config = {.runtime = "runc", .run_dir = "/run/stasis"};
	const char *called;

	if (argc == 0)
		argv = no_arguments;
	called = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	if (same(called, FREEZE_HOOK))
		return freeze_hook();

	/* Where it is installed: PREFIX/bin, also when it was replaced since it started. */
	if (readlink("/proc/self/exe", bin, sizeof bin - 1) < 0) {
		fprintf(stderr, "stasis-runtime: read /proc/self/exe: %m: is /proc mounted?\n");
		return 1;
	}
	*strrchr(bin, '/') = '\0';
	put(full, "%s/%s", bin, FULL);
	put(file, "%s/../etc/runtime.json", bin);
	/* Of what goes wrong here stasis-restore has more to say. */
	if (read_config(file, text, sizeof text, &config) && ordinary(parse(argv + 1), config))
		become(config.runtime, argv);
	argv[0] = full;
	execv(full, argv);
	fprintf(stderr, "stasis-runtime: run %s: %m: run stasis-agent install on this node\n", full);
	return 1;
}
