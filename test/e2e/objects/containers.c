// What the configuration of a container brings about.
#include "objects.h"

#include <fcntl.h>
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
	need(ok(tcgetsid(0)) == 1, "it is the terminal of another session");
	need(ttyname(0), "it has no name");
}

const struct object containers[] = {
	{"read-only-root", "restricted", none, verify_read_only_root},
	{"image-volume", "plain", set_up_image_volume, verify_image_volume},
	{"container-terminal", "terminal", set_up_container_terminal, verify_container_terminal},
	{0},
};
