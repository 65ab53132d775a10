/* What an x86-64 CPU has, and its operating system lets be used: it must save the registers. The CPU is asked here, since
 * what __builtin_cpu_supports looks at stays empty where the compiler's library does not fill it, as Zig's does not.
 */
#ifndef REMUS_CPU_H
#define REMUS_CPU_H

#include <cpuid.h>

/* name, register of leaf 1 or 7, bit, bits of XCR0 that the registers need (SSE is part of x86-64) */
#define REMUS_CPU_FEATURES(X)                                                                                    \
    X(sse42, ecx1, 20, 0)                                                                                        \
    X(popcnt, ecx1, 23, 0)                                                                                       \
    X(bmi, ebx7, 3, 6)                                                                                           \
    X(bmi2, ebx7, 8, 6)                                                                                          \
    X(avx2, ebx7, 5, 6)                                                                                          \
    X(avx512f, ebx7, 16, 0xe6)                                                                                   \
    X(avx512bw, ebx7, 30, 0xe6)                                                                                  \
    X(avx512vl, ebx7, 31, 0xe6)                                                                                  \
    X(avx512vbmi2, ecx7, 6, 0xe6)

#define REMUS_CPU_NUMBER(name, from, bit, needs) REMUS_NUMBER_##name,
enum { REMUS_CPU_FEATURES(REMUS_CPU_NUMBER) REMUS_CPU_ASKED };
#undef REMUS_CPU_NUMBER

/* A bit for each feature, and REMUS_CPU_ASKED. To ask takes long in a virtual machine, so it is done once. */
static inline unsigned remus_cpu(void)
{
    static unsigned known;
    unsigned found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (found)
        return found;
    unsigned eax, ebx, ecx1 = 0, ebx7 = 0, ecx7 = 0, edx, saved = 0;
    __get_cpuid(1, &eax, &ebx, &ecx1, &edx);
    if (!__get_cpuid_count(7, 0, &eax, &ebx7, &ecx7, &edx))
        ebx7 = ecx7 = 0;
    if (ecx1 >> 27 & 1) /* OSXSAVE */
        __asm__("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
#define REMUS_CPU_FOUND(name, from, bit, needs) \
    found |= (unsigned)(((from) >> (bit) & 1) && (saved & (needs)) == (needs)) << REMUS_NUMBER_##name;
    REMUS_CPU_FEATURES(REMUS_CPU_FOUND)
#undef REMUS_CPU_FOUND
    found |= 1u << REMUS_CPU_ASKED;
    __atomic_store_n(&known, found, __ATOMIC_RELAXED);
    return found;
}

#define REMUS_CPU_HAS(name) ((int)(remus_cpu() >> REMUS_NUMBER_##name & 1))

#endif
