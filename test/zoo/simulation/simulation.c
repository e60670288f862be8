/*
 * Three bodies under gravity, integrated by two threads that pass the state to each
 * other: one steps in x87 registers (long double), rounding down, the other in SSE
 * registers (double), rounding up. A rounding mode, register or bit that comes back
 * differently shows in all that follows.
 *
 *   simulation          runs, and writes each thousandth state to /tmp/curve
 *   simulation state    prints what was written
 */
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define BODIES 3
#define STEPS_A_TURN 500

static long double px[BODIES][2] = { { 0.97000436L, -0.24308753L }, { -0.97000436L, 0.24308753L }, { 0, 0 } };
static long double vx[BODIES][2] = { { 0.466203685L, 0.43236573L }, { 0.466203685L, 0.43236573L }, { -0.93240737L, -0.86473146L } };
static pthread_barrier_t turn;
static uint64_t chain = 14695981039346656037ull;

#define STEP(TYPE, DT, SQRT)                                                            \
	do {                                                                            \
		TYPE p[BODIES][2], v[BODIES][2];                                        \
		for (int i = 0; i < BODIES; i++)                                        \
			for (int k = 0; k < 2; k++) {                                   \
				p[i][k] = px[i][k];                                     \
				v[i][k] = vx[i][k];                                     \
			}                                                               \
		for (int n = 0; n < STEPS_A_TURN; n++) {                                \
			for (int i = 0; i < BODIES; i++)                                \
				for (int j = 0; j < BODIES; j++) {                      \
					if (i == j)                                     \
						continue;                               \
					TYPE dx = p[j][0] - p[i][0], dy = p[j][1] - p[i][1]; \
					TYPE d = dx * dx + dy * dy + (TYPE)1e-6;        \
					TYPE f = (DT) / (d * SQRT(d));                  \
					v[i][0] += dx * f;                              \
					v[i][1] += dy * f;                              \
				}                                                       \
			for (int i = 0; i < BODIES; i++)                                \
				for (int k = 0; k < 2; k++)                             \
					p[i][k] += v[i][k] * (DT);                      \
		}                                                                       \
		for (int i = 0; i < BODIES; i++)                                        \
			for (int k = 0; k < 2; k++) {                                   \
				px[i][k] = p[i][k];                                     \
				vx[i][k] = v[i][k];                                     \
			}                                                               \
	} while (0)

static void *in_sse(void *unused)
{
	(void)unused;
	fesetround(FE_UPWARD);
	for (;;) {
		pthread_barrier_wait(&turn);
		STEP(double, 1e-4, sqrt);
		pthread_barrier_wait(&turn);
	}
	return NULL;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int state(void)
{
	char line[256];
	long steps = 0;
	FILE *f = fopen("/tmp/curve", "r");
	if (!f)
		die("/tmp/curve");
	while (fgets(line, sizeof line, f)) {
		if (!strchr(line, '\n'))
			break; /* in the making */
		sscanf(line, "curve=%ld", &steps);
		fputs(line, stdout);
	}
	printf("steps=%ld\n", steps);
	return steps > 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
	uint64_t nonce;
	pthread_t other;
	FILE *f;

	if (argc == 2 && !strcmp(argv[1], "state"))
		return state();
	if (getrandom(&nonce, sizeof nonce, 0) != sizeof nonce)
		die("getrandom");
	f = fopen("/tmp/curve", "w");
	if (!f)
		die("/tmp/curve");
	setlinebuf(f);
	fprintf(f, "nonce=%016llx\n", (unsigned long long)nonce);
	pthread_barrier_init(&turn, NULL, 2);
	if (pthread_create(&other, NULL, in_sse, NULL))
		die("pthread_create");
	fesetround(FE_DOWNWARD);
	for (long steps = 0;;) {
		STEP(long double, 1e-4L, sqrtl);
		pthread_barrier_wait(&turn); /* the other's turn */
		pthread_barrier_wait(&turn);
		steps += 2 * STEPS_A_TURN;
		for (int i = 0; i < BODIES; i++)
			for (int k = 0; k < 2; k++) {
				unsigned char bits[2][10];
				memcpy(bits[0], &px[i][k], 10);
				memcpy(bits[1], &vx[i][k], 10);
				for (int b = 0; b < 20; b++)
					chain = (chain ^ bits[b / 10][b % 10]) * 1099511628211ull;
			}
		if (fegetround() != FE_DOWNWARD)
			fprintf(f, "wrong=the rounding mode is %d\n", fegetround());
		if (steps % 20000 == 0)
			fprintf(f, "curve=%ld %016llx\n", steps, (unsigned long long)chain);
		usleep(1000);
	}
}
