// The first process of a Pod's sandbox. It holds the Pod's namespaces, collects what is
// orphaned when the Pod shares its process namespace, and ends when asked to.
#include <signal.h>
#include <stddef.h>
#include <sys/wait.h>

int main(void) {
	sigset_t awaited;
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGINT);
	sigaddset(&awaited, SIGTERM);
	sigaddset(&awaited, SIGCHLD);
	if (sigprocmask(SIG_BLOCK, &awaited, NULL) != 0)
		return 1;
	for (;;) {
		int got;
		if (sigwait(&awaited, &got) != 0)
			return 1;
		if (got != SIGCHLD)
			return 0;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
