/* A program to be tracked from outside: it computes with the FPU, sleeps, waits and takes signals, and says in the end
 * whether all went as it should. Arguments: how many rounds (0: until standard input ends), a file to write to (mapped
 * shared), and which threads it has, as their first letters.
 *
 *     main thread   general, floating-point and vector registers that are live across a long loop (x87, SSE, AVX; SIMD,
 *                   SVE); rounding modes; a timer's signal a millisecond
 *     sleeper       nanosleep, whose rest must be 0
 *     reader        read from a pipe that the main thread writes to
 *     waiter        epoll_wait and poll, which must not say EINTR (epoll_wait may on arm64: decision 10)
 *     t             a thread that starts others
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 64, PAGE = 4096 };

static volatile sig_atomic_t ticks;
static volatile int over;
static int pipes[2], epoll;
static const char *volatile fault;
static volatile uint64_t *memory;

static void tick(int number) { (void)number; ticks++; }

static void blame(const char *what) { if (!fault) fault = what; }

static void *sleeper(void *unused)
{
    (void)unused;
    while (!over) {
        struct timespec rest = {0, 0}, want = {0, 3000000};
        if (nanosleep(&want, &rest) != 0) blame("nanosleep was ended");
    }
    return NULL;
}

static void *reader(void *unused)
{
    (void)unused;
    unsigned char next = 0, got;
    for (;;) {
        ssize_t n = read(pipes[0], &got, 1);
        if (n == 0) return NULL;
        if (n != 1) { blame("read was ended"); return NULL; }
        if (got != next++) blame("a byte was lost");
    }
}

#ifdef __aarch64__
enum { MAY_END_EPOLL = 1 };
#else
enum { MAY_END_EPOLL = 0 };
#endif

static void *waiter(void *unused)
{
    (void)unused;
    struct epoll_event event;
    while (!over) {
        if (epoll_wait(epoll, &event, 1, 4) != 0 && !(MAY_END_EPOLL && errno == EINTR)) blame("epoll_wait was ended");
        if (poll(NULL, 0, 3) != 0) blame("poll was ended");
    }
    return NULL;
}

static void *nothing(void *unused) { return unused; }

static void *starter(void *unused)
{
    (void)unused;
    pthread_t thread;
    while (!over)
        if (pthread_create(&thread, NULL, nothing, NULL) != 0 || pthread_join(thread, NULL) != 0) blame("no thread");
    return NULL;
}

/* Ten thousand turns of a loop that keeps everything in registers. What comes out is the same each time. */
#if defined(__aarch64__)
#include <sys/auxv.h>

static uint64_t registers(void)
{
    uint64_t out = 0;
    double one = 1.0 / 3.0;
    __asm__ volatile(
        "mov x9, #10000\n mov x0, #1\n mov x1, #2\n mov x7, #3\n mov x8, #5\n mov x16, #7\n mov x17, #11\n mov x28, #13\n"
        "mov x30, #17\n fmov d2, %d[one]\n fmov d0, %d[one]\n dup v1.2d, x0\n dup v8.2d, x1\n dup v15.2d, x16\n"
        "dup v31.2d, x17\n"
        "1:\n add x1, x1, x0\n ror x1, x1, #59\n eor x7, x7, x1\n add x0, x0, x8\n madd x16, x16, x28, x7\n"
        "add x17, x17, x16\n eor x30, x30, x17\n add x8, x8, x30\n eor x28, x28, #2\n fadd d0, d0, d0\n fmul d0, d0, d2\n"
        "fadd d0, d0, d2\n add v1.2d, v1.2d, v8.2d\n eor v15.16b, v15.16b, v1.16b\n add v8.2d, v8.2d, v15.2d\n"
        "eor v31.16b, v31.16b, v8.16b\n subs x9, x9, #1\n b.ne 1b\n"
        "fmov x9, d0\n eor %[out], x9, x0\n umov x9, v31.d[1]\n eor %[out], %[out], x9, ror #7\n umov x9, v15.d[0]\n"
        "eor %[out], %[out], x9, ror #13\n eor %[out], %[out], x1\n eor %[out], %[out], x7\n eor %[out], %[out], x8\n"
        "eor %[out], %[out], x16\n eor %[out], %[out], x17\n eor %[out], %[out], x28\n eor %[out], %[out], x30\n"
        : [out] "=&r"(out) : [one] "w"(one)
        : "x0", "x1", "x7", "x8", "x9", "x16", "x17", "x28", "x30", "v0", "v1", "v2", "v8", "v15", "v31", "memory", "cc");
    return out;
}

/* Nothing below the stack pointer is anybody's. */
static uint64_t red_zone(uint64_t seed) { return seed; }

static uint64_t wide(void)
{
    uint64_t out = 0;
    if (!(getauxval(AT_HWCAP) & HWCAP_SVE)) return 0;
    __asm__ volatile(
        ".arch_extension sve\n"
        "mov x9, #3000\n ptrue p0.d\n not p1.b, p0/z, p0.b\n ptrue p2.d, vl1\n dup z0.d, #3\n index z1.d, #1, #1\n"
        "1:\n add z0.d, z0.d, z1.d\n lsl z2.d, z0.d, #3\n eor z1.d, z1.d, z2.d\n add z1.d, p2/m, z1.d, z0.d\n"
        "add z1.d, p1/m, z1.d, z0.d\n subs x9, x9, #1\n b.ne 1b\n"
        "eorv d3, p0, z1.d\n fmov %[out], d3\n"
        : [out] "=r"(out) : : "x9", "v0", "v1", "v2", "v3", "cc");
    return out;
}
#else
static uint64_t registers(void)
{
    uint64_t out = 0, bits;
    double one = 1.0 / 3.0, x87;
    __asm__ volatile(
        "mov $10000, %%r15\n mov $1, %%r8\n mov $2, %%r9\n mov $3, %%r10\n mov $5, %%r12\n mov $7, %%r13\n mov $11, %%r14\n"
        "movq %[one], %%xmm0\n movq %%r8, %%xmm1\n movq %%r9, %%xmm8\n movq %%r13, %%xmm15\n fldl %[one]\n"
        "1:\n add %%r8, %%r9\n rol $5, %%r9\n xor %%r9, %%r10\n add %%r12, %%r8\n imul $31, %%r13\n add %%r10, %%r14\n"
        "addsd %%xmm0, %%xmm0\n mulsd %[one], %%xmm0\n addsd %[one], %%xmm0\n paddq %%xmm8, %%xmm1\n pxor %%xmm1, %%xmm15\n"
        "paddq %%xmm15, %%xmm8\n fadd %%st(0), %%st(0)\n fmull %[one]\n faddl %[one]\n"
        "dec %%r15\n jnz 1b\n"
        "fstpl %[x87]\n movq %%xmm0, %%rax\n xor %%rax, %[out]\n movq %%xmm1, %%rax\n xor %%rax, %[out]\n"
        "movq %%xmm8, %%rax\n rol $7, %%rax\n xor %%rax, %[out]\n movq %%xmm15, %%rax\n rol $13, %%rax\n xor %%rax, %[out]\n"
        "xor %%r9, %[out]\n xor %%r10, %[out]\n xor %%r13, %[out]\n xor %%r14, %[out]\n xor %%r8, %[out]\n"
        : [out] "+r"(out), [x87] "=m"(x87)
        : [one] "m"(one)
        : "rax", "r8", "r9", "r10", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm8", "xmm15", "st", "memory", "cc");
    memcpy(&bits, &x87, sizeof bits);
    return out ^ bits;
}

/* A leaf that keeps its values in the red zone. */
static uint64_t red_zone(uint64_t seed)
{
    __asm__ volatile(
        "mov %0, -8(%%rsp)\n mov %0, -128(%%rsp)\n mov $3000, %%rcx\n"
        "1:\n addq $3, -8(%%rsp)\n addq $5, -128(%%rsp)\n dec %%rcx\n jnz 1b\n"
        "mov -8(%%rsp), %0\n xor -128(%%rsp), %0\n"
        : "+r"(seed) : : "rcx", "memory", "cc");
    return seed;
}

#ifdef __AVX2__
#include <immintrin.h>
static uint64_t wide(void)
{
    __m256i a = _mm256_set1_epi64x(3), b = _mm256_set_epi64x(1, 2, 3, 4);
    for (int i = 0; i < 3000; i++) {
        a = _mm256_add_epi64(a, b);
        b = _mm256_xor_si256(b, _mm256_slli_epi64(a, 3));
        __asm__ volatile("" : "+x"(a), "+x"(b));
    }
    uint64_t out[4];
    _mm256_storeu_si256((__m256i *)out, b);
    return out[0] ^ out[1] ^ out[2] ^ out[3];
}
#else
static uint64_t wide(void) { return 0; }
#endif
#endif

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    long rounds = strtol(argv[1], NULL, 10);
    int file = open(argv[2], O_RDWR);
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return 2;
    close(file);

    sigset_t mask, now;
    sigemptyset(&mask);
    sigaddset(&mask, SIGALRM);
    sigaddset(&mask, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (pipe(pipes) != 0 || epoll < 0) return 2;
    pthread_t threads[8];
    int started = 0;
    for (const char *kind = argv[3]; *kind && started < 8; kind++)
        pthread_create(&threads[started++], NULL,
                       *kind == 's' ? sleeper : *kind == 'r' ? reader : *kind == 't' ? starter : waiter, NULL);
    struct pollfd input = {0, POLLIN, 0};
    sigdelset(&mask, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &(sigset_t){{1UL << (SIGALRM - 1)}}, NULL);
    struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval timer = {{0, 1000}, {0, 1000}};
    setitimer(ITIMER_REAL, &timer, NULL);
    fesetround(FE_UPWARD);

    uint64_t first = registers(), first_zone = red_zone(1), first_wide = wide();
    printf("ready\n");
    fflush(stdout);
    unsigned char byte = 0;
    for (long round = 0; rounds == 0 || round < rounds; round++) {
        if (registers() != first) blame("a register changed");
        if (red_zone(1) != first_zone) blame("the red zone changed");
        if (wide() != first_wide) blame("a wide register changed");
        if (fegetround() != FE_UPWARD) blame("the rounding mode changed");
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        if (memcmp(&now, &mask, 8) != 0) blame("the signal mask changed");
        if (strchr(argv[3], 'r') && round % 16 == 0 && write(pipes[1], &byte, 1) == 1) byte++;
        memory[(uint64_t)round % PAGES * (PAGE / 8)] = (uint64_t)round;
        if (fault) break;
        if (rounds == 0 && round % 16 == 0 && poll(&input, 1, 0) == 1) break;
    }
    over = 1;
    close(pipes[1]);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    if (!ticks) blame("no signal came");
    printf("%s\n", fault ? fault : "right");
    return fault != NULL;
}
