// What the configuration of a container brings about.
#include "objects.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

static void none(void) {}

static void verify_read_only_root(void) {
	need(open("/refused", O_CREAT | O_WRONLY, 0644) == -1 && errno == EROFS, "its root can be written to");
	is("/image/kept", "kept\n");
}

// The image has a VOLUME /volume, which the container runtime fills from the image.
static void set_up_image_volume(void) {
	is("/volume/seed", "of the image\n");
	put("/volume/written", "by the source");
	ok(unlink("/volume/removed"));
}

static void verify_image_volume(void) {
	is("/volume/seed", "of the image\n");
	is("/volume/written", "by the source");
	need(access("/volume/removed", F_OK) != 0, "the removed file is back");
}

// input notes what somebody typed.
static void input(void) {
	char text[64];
	struct pollfd p = {.fd = 0, .events = POLLIN};
	if (ok(poll(&p, 1, 0)) == 0) return;
	ssize_t n = ok(read(0, text, sizeof text));
	while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--;
	note("%.*s", (int)n, text);
}

static void verify_input(void) {
	need(!isatty(0), "it is a terminal");
	input();
}

static struct termios then;

static void set_up_container_terminal(void) {
	need(isatty(0) && isatty(1), "its standard input is no terminal");
	ok(tcgetattr(0, &then));
	then.c_lflag &= ~ECHO;
	ok(tcsetattr(0, TCSANOW, &then));
}

static void verify_container_terminal(void) {
	struct termios t;
	need(isatty(0) && isatty(1), "its standard input is no terminal");
	ok(tcgetattr(0, &t));
	need(t.c_lflag == then.c_lflag && t.c_iflag == then.c_iflag, "its modes are others");
	need(ttyname(0), "it has no name");
	input();
}

// Which controllers hold a process is the restored Pod's: whoever asks compares.
static void verify_cgroup(void) {
	char line[1024];
	FILE *cgroups = fopen("/proc/self/cgroup", "r");
	need(cgroups, "no /proc/self/cgroup");
	while (fgets(line, sizeof line, cgroups))
		if (strstr(line, ":memory:") || strncmp(line, "0::", 3) == 0) {
			line[strcspn(line, "\n")] = 0;
			note("%.400s", line);
			if (strstr(line, ":memory:")) break;
		}
	fclose(cgroups);
}

const struct object containers[] = {
	{"read-only-root", "restricted", none, verify_read_only_root},
	{"image-volume", "plain", set_up_image_volume, verify_image_volume},
	{"cgroup", "", none, verify_cgroup},
	{"standard-input", "plain", none, verify_input},
	{"container-terminal", "terminal", set_up_container_terminal, verify_container_terminal},
	{0},
};
