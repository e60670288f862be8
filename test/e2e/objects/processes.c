// What belongs to a process and to its relations.
#include "objects.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void idle(void) {}

enum { THREADS = 8 };

static struct {
	pthread_mutex_t mutex;
	pthread_cond_t wake;
	int rounds, answered;
	pid_t tid[THREADS];
} team = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static __thread int own; // of each thread

static void *work(void *arg) {
	long i = (long)arg;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + i);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	own = 100 + i;
	pthread_mutex_lock(&team.mutex);
	team.tid[i] = gettid();
	team.answered++;
	for (int seen = 0;;) {
		while (team.rounds == seen) pthread_cond_wait(&team.wake, &team.mutex);
		seen = team.rounds;
		pthread_sigmask(SIG_BLOCK, NULL, &set);
		if (own == 100 + i && team.tid[i] == gettid() && sigismember(&set, SIGRTMIN + i) && !sigismember(&set, SIGRTMIN + i + 1)) team.answered++;
	}
	return NULL;
}

static void all_answer(void) {
	for (int i = 0; i < 10000; i++) {
		pthread_mutex_lock(&team.mutex);
		int answered = team.answered;
		pthread_mutex_unlock(&team.mutex);
		if (answered == THREADS) return;
		usleep(1000);
	}
	failed("%d of %d threads answer", team.answered, THREADS);
}

static void set_up_threads(void) {
	for (long i = 0; i < THREADS; i++) {
		pthread_t t;
		need(pthread_create(&t, NULL, work, (void *)i) == 0, "pthread_create");
	}
	all_answer();
}

static void verify_threads(void) {
	pthread_mutex_lock(&team.mutex);
	team.answered = 0;
	team.rounds++;
	pthread_cond_broadcast(&team.wake);
	pthread_mutex_unlock(&team.mutex);
	all_answer();
}

static int led, member, alone, orphan;
static int ends[2];

static void lead(void) {
	setsid();
	if (write(ends[1], "s", 1) != 1) _exit(1);
}

static void leave_an_orphan(void) {
	int pid = fork();
	if (pid == 0) {
		prctl(PR_SET_NAME, "orphan");
		for (;;) pause();
	}
	if (write(ends[1], &pid, sizeof pid) != sizeof pid) _exit(1);
	_exit(0);
}

static void set_up_groups(void) {
	ok(prctl(PR_SET_CHILD_SUBREAPER, 1));
	ok(pipe(ends));
	char byte;
	led = start(lead);
	ok(read(ends[0], &byte, 1));
	alone = start(idle);
	ok(setpgid(alone, alone));
	member = start(idle);
	ok(setpgid(member, alone));
	int between = start(leave_an_orphan);
	ok(read(ends[0], &orphan, sizeof orphan));
	ok(waitpid(between, NULL, 0));
}

static void verify_groups(void) {
	need(ok(getsid(led)) == led && ok(getpgid(led)) == led, "the session has another leader");
	need(ok(getpgid(alone)) == alone && ok(getpgid(member)) == alone, "the process group is another");
	need(ok(getsid(alone)) == getsid(0), "the group is in another session");
	int subreaper = 0;
	ok(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
	need(subreaper == 1, "it adopts orphans no more");
	need(waitpid(orphan, NULL, WNOHANG) == 0, "its adopted child is not its child: %s", strerror(errno));
}

static int dead;

static void end(void) { _exit(7); }

static void set_up_zombie(void) {
	dead = start(end);
	siginfo_t info;
	ok(waitid(P_PID, dead, &info, WEXITED | WNOWAIT));
}

static void verify_zombie(void) {
	siginfo_t info = {0};
	ok(waitid(P_PID, dead, &info, WEXITED | WNOWAIT | WNOHANG));
	need(info.si_pid == dead && info.si_code == CLD_EXITED && info.si_status == 7, "process %d has ended with %d", info.si_pid, info.si_status);
}

static void queue_signals(void) {
	for (int i = 1; i <= 3; i++) ok(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 10 * i}));
	ok(kill(getpid(), SIGUSR2));
	ok(syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1));
}

static void set_up_pending(void) {
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	ok(sigprocmask(SIG_BLOCK, &set, NULL));
	queue_signals();
}

static void verify_pending(void) {
	struct timespec none = {0};
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	for (int i = 1; i <= 3; i++) {
		if (sigtimedwait(&set, &info, &none) < 0) failed("the queued signal %d is gone", i);
		need(info.si_value.sival_int == 10 * i && info.si_code == SI_QUEUE, "the queued signal %d carries %d", i, info.si_value.sival_int);
	}
	for (int s = 0; s < 2; s++) {
		sigemptyset(&set);
		sigaddset(&set, s ? SIGUSR1 : SIGUSR2);
		if (sigtimedwait(&set, &info, &none) < 0) failed("the pending signal is gone");
	}
	queue_signals();
}

static volatile sig_atomic_t handled, on_stack;
static char stack[64 << 10];

static void handle(int signal, siginfo_t *info, void *context) {
	(void)signal, (void)context;
	char here;
	handled = info->si_value.sival_int;
	on_stack = &here >= stack && &here < stack + sizeof stack;
}

static void set_up_handlers(void) {
	stack_t alternative = {.ss_sp = stack, .ss_size = sizeof stack};
	ok(sigaltstack(&alternative, NULL));
	struct sigaction a = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
	sigaddset(&a.sa_mask, SIGHUP);
	ok(sigaction(SIGUSR1, &a, NULL));
	signal(SIGUSR2, SIG_IGN);
}

static void verify_handlers(void) {
	struct sigaction a;
	ok(sigaction(SIGUSR1, NULL, &a));
	need(a.sa_flags & SA_RESTART && sigismember(&a.sa_mask, SIGHUP) == 1, "the handler's flags are others");
	ok(sigaction(SIGUSR2, NULL, &a));
	need(a.sa_handler == SIG_IGN, "a signal is ignored no more");
	handled = on_stack = 0;
	ok(sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 42}));
	need(handled == 42 && on_stack, "the handler was not called, or not on its stack");
}

static volatile sig_atomic_t ticks;

static void tick(int signal) {
	(void)signal;
	ticks++;
}

static double now(clockid_t clock) {
	struct timespec t;
	ok(clock_gettime(clock, &t));
	return t.tv_sec + t.tv_nsec / 1e9;
}

static double began;
static timer_t hour, often;

static void set_up_interval_timers(void) {
	signal(SIGALRM, tick);
	struct itimerval t = {.it_value.tv_usec = 20000, .it_interval.tv_usec = 20000};
	ok(setitimer(ITIMER_REAL, &t, NULL));
	struct itimerval cpu = {.it_value.tv_sec = 3000};
	ok(setitimer(ITIMER_VIRTUAL, &cpu, NULL));
	ok(setitimer(ITIMER_PROF, &cpu, NULL));
}

static void verify_ticks(void) {
	int before = ticks;
	for (int i = 0; i < 2000 && ticks == before; i++) usleep(5000);
	need(ticks > before, "it does not tick any more");
}

static void verify_interval_timers(void) {
	struct itimerval t;
	verify_ticks();
	ok(getitimer(ITIMER_VIRTUAL, &t));
	need(t.it_value.tv_sec > 2900, "the virtual timer has %ld s left", (long)t.it_value.tv_sec);
	ok(getitimer(ITIMER_PROF, &t));
	need(t.it_value.tv_sec > 2900, "the profiling timer has %ld s left", (long)t.it_value.tv_sec);
}

static void set_up_posix_timers(void) {
	signal(SIGUSR1, tick);
	struct sigevent silent = {.sigev_notify = SIGEV_NONE};
	struct sigevent loud = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	ok(timer_create(CLOCK_MONOTONIC, &silent, &hour));
	ok(timer_create(CLOCK_REALTIME, &loud, &often));
	struct itimerspec t = {.it_value.tv_sec = 3600};
	ok(timer_settime(hour, 0, &t, NULL));
	began = now(CLOCK_MONOTONIC);
	struct itimerspec o = {.it_value.tv_nsec = 20000000, .it_interval.tv_nsec = 20000000};
	ok(timer_settime(often, 0, &o, NULL));
}

static void verify_posix_timers(void) {
	struct itimerspec t;
	verify_ticks();
	ok(timer_gettime(hour, &t));
	double passed = 3600 - t.it_value.tv_sec - t.it_value.tv_nsec / 1e9, wanted = now(CLOCK_MONOTONIC) - began;
	need(passed > wanted - 60 && passed < wanted + 1, "%.1f s of its hour have passed, %.1f s on the monotonic clock", passed, wanted);
}

static double real_began, boot_began, mono_last, boot_last;

static void set_up_clocks(void) {
	mono_last = began = now(CLOCK_MONOTONIC);
	boot_last = boot_began = now(CLOCK_BOOTTIME);
	real_began = now(CLOCK_REALTIME);
}

// The kernel's answer, past the vDSO that the processes have mapped.
static double told(clockid_t clock) {
	struct timespec t;
	ok(syscall(SYS_clock_gettime, clock, &t));
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void verify_clocks(void) {
	static const clockid_t all[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME};
	for (int i = 0; i < 3; i++) {
		double vdso = now(all[i]), kernel = told(all[i]);
		need(kernel >= vdso && kernel < vdso + 1, "clock %d is %.3f by the vDSO and %.3f by the kernel", all[i], vdso, kernel);
	}
	double mono = now(CLOCK_MONOTONIC), boot = now(CLOCK_BOOTTIME), real = now(CLOCK_REALTIME);
	need(mono >= mono_last && boot >= boot_last, "a clock went back");
	need(real >= real_began, "the time of day went back");
	double m = mono - began, b = boot - boot_began, r = real - real_began;
	need(m - b < 1 && b - m < 1, "%.1f s have passed on CLOCK_MONOTONIC and %.1f s on CLOCK_BOOTTIME", m, b);
	mono_last = mono, boot_last = boot;
	note("%.2f %.2f", m, r);
}

static void set_up_umask_and_directory(void) {
	umask(027);
	ok(mkdir("deep", 0750));
	ok(chdir("deep"));
}

static void verify_umask_and_directory(void) {
	char directory[256];
	mode_t mask = umask(027);
	need(mask == 027, "the umask is %o", mask);
	need(getcwd(directory, sizeof directory) && strstr(directory, "/umask-and-directory/deep"), "the directory is %s", directory);
}

static void set_up_rlimits(void) {
	struct rlimit open = {777, 1024}, core = {0, 0}, stack = {1 << 20, 4 << 20}, processes = {5000, 6000};
	ok(setrlimit(RLIMIT_NOFILE, &open));
	ok(setrlimit(RLIMIT_CORE, &core));
	ok(setrlimit(RLIMIT_STACK, &stack));
	ok(setrlimit(RLIMIT_NPROC, &processes));
}

static void limit(int which, rlim_t soft, rlim_t hard) {
	struct rlimit l;
	ok(getrlimit(which, &l));
	need(l.rlim_cur == soft && l.rlim_max == hard, "limit %d is %llu, %llu", which, (unsigned long long)l.rlim_cur, (unsigned long long)l.rlim_max);
}

static void verify_rlimits(void) {
	limit(RLIMIT_NOFILE, 777, 1024);
	limit(RLIMIT_CORE, 0, 0);
	limit(RLIMIT_STACK, 1 << 20, 4 << 20);
	limit(RLIMIT_NPROC, 5000, 6000);
}

static void set_up_scheduling(void) {
	struct sched_param none = {0};
	ok(sched_setscheduler(0, SCHED_BATCH, &none));
	ok(setpriority(PRIO_PROCESS, 0, 7));
}

static void verify_scheduling(void) {
	need(ok(sched_getscheduler(0)) == SCHED_BATCH, "its policy is another");
	errno = 0;
	int nice = getpriority(PRIO_PROCESS, 0);
	need(errno == 0 && nice == 7, "its nice value is %d", nice);
}

static void set_up_attributes(void) {
	ok(prctl(PR_SET_NAME, "renamed"));
	ok(prctl(PR_SET_PDEATHSIG, SIGTERM));
	ok(setenv("SET_AT_RUN_TIME", "yes", 1));
}

static void verify_attributes(void) {
	char name[16] = "", line[512] = "";
	int signal = 0;
	ok(prctl(PR_GET_NAME, name));
	need(strcmp(name, "renamed") == 0, "its name is %s", name);
	ok(prctl(PR_GET_PDEATHSIG, &signal));
	need(signal == SIGTERM, "the signal at its parent's end is %d", signal);
	need(getenv("SET_AT_RUN_TIME"), "its environment is another");
	int fd = ok(open("/proc/self/cmdline", O_RDONLY));
	ok(read(fd, line, sizeof line - 1));
	ok(close(fd));
	need(strstr(line, "objects"), "its command line is %s", line);
	fd = ok(open("/proc/self/environ", O_RDONLY));
	memset(line, 0, sizeof line);
	ok(read(fd, line, sizeof line - 1));
	ok(close(fd));
	need(strstr(line, "PATH=") == line || strstr(line + strlen(line) + 1, "PATH="), "its first environment is not there");
}

static pthread_mutex_t *robust;

static void die_holding(void) {
	pthread_mutex_lock(robust);
	for (;;) pause();
}

static void set_up_robust_mutex(void) {
	robust = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_mutexattr_t a;
	pthread_mutexattr_init(&a);
	pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(robust, &a);
	led = start(die_holding);
	for (int i = 0; i < 10000 && pthread_mutex_trylock(robust) == 0; i++) {
		pthread_mutex_unlock(robust);
		usleep(1000);
	}
}

// What the kernel keeps for a robust mutex is the holder's list of them: when it
// ends, the next to lock is told.
static void verify_robust_mutex(void) {
	need(pthread_mutex_trylock(robust) == EBUSY, "nobody holds the mutex");
	ok(kill(led, SIGKILL));
	ok(waitpid(led, NULL, 0));
	int result = pthread_mutex_trylock(robust);
	need(result == EOWNERDEAD, "the end of its holder is not told: %s", strerror(result));
	pthread_mutex_consistent(robust);
	pthread_mutex_unlock(robust);
	led = start(die_holding);
	for (int i = 0; i < 10000 && pthread_mutex_trylock(robust) == 0; i++) {
		pthread_mutex_unlock(robust);
		usleep(1000);
	}
}

static char then[4096];

// privileges reads what a process may do.
static void privileges(char *into, size_t size) {
	char line[512];
	FILE *status = fopen("/proc/self/status", "r");
	need(status, "no /proc/self/status");
	into[0] = 0;
	while (fgets(line, sizeof line, status)) {
		static const char *const fields[] = {"Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp:", "Seccomp_filters:"};
		for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
			if (strncmp(line, fields[i], strlen(fields[i])) == 0) strncat(into, line, size - strlen(into) - 1);
	}
	fclose(status);
}

static void set_up_credentials(void) {
	privileges(then, sizeof then);
	if (getuid() == 0) {
		// Some of them are given up, for good.
		ok(prctl(PR_CAPBSET_DROP, 27 /* CAP_MKNOD */));
		ok(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		ok(setresgid(4321, 4321, 4321));
		ok(setresuid(1234, 1234, 0));
		privileges(then, sizeof then);
	}
}

static void verify_credentials(void) {
	char here[4096];
	privileges(here, sizeof here);
	need(strcmp(here, then) == 0, "they were %s and are %s", then, here);
	// So are those of a process that it starts.
	int pid = ok(fork());
	if (pid == 0) {
		privileges(here, sizeof here);
		_exit(strcmp(here, then) != 0);
	}
	int status;
	ok(waitpid(pid, &status, 0));
	need(status == 0, "a child's are others");
}

const struct object processes[] = {
	{"threads", "", set_up_threads, verify_threads},
	{"groups-sessions-and-orphans", "", set_up_groups, verify_groups},
	{"zombie", "", set_up_zombie, verify_zombie},
	{"pending-signals", "", set_up_pending, verify_pending},
	{"signal-handlers", "", set_up_handlers, verify_handlers},
	{"interval-timers", "", set_up_interval_timers, verify_interval_timers},
	{"posix-timers", "", set_up_posix_timers, verify_posix_timers},
	{"clocks", "", set_up_clocks, verify_clocks},
	{"umask-and-directory", "", set_up_umask_and_directory, verify_umask_and_directory},
	{"resource-limits", "", set_up_rlimits, verify_rlimits},
	{"scheduling", "", set_up_scheduling, verify_scheduling},
	{"name-environment-and-death-signal", "", set_up_attributes, verify_attributes},
	{"robust-mutex", "", set_up_robust_mutex, verify_robust_mutex},
	{"credentials", "", set_up_credentials, verify_credentials},
	{0},
};
