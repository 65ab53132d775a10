/* CRC-32C, reflected (specs/session.md §2.1), without the inversions before and after: by the instruction of the CPU
 * where it has one, and by a table. Pointers and lengths come in; nothing here knows Python.
 */
#ifndef REMUS_CRC32C_H
#define REMUS_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>

#include "cpu.h"
#if defined(__clang__)
/* For clang the instruction is a feature of its own; a GCC before 11 does not know its name. */
#define REMUS_CRC_TARGET __attribute__((target("sse4.2,crc32")))
#else
#define REMUS_CRC_TARGET __attribute__((target("sse4.2")))
#endif
#define REMUS_CRC_8(crc, word) _mm_crc32_u64(crc, word)
#define REMUS_CRC_1(crc, byte) _mm_crc32_u8(crc, byte)
#define REMUS_CRC_RUNS() REMUS_CPU_HAS(sse42)
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__)
#include <arm_acle.h>
#include <sys/auxv.h>
#if defined(__clang__)
#define REMUS_CRC_TARGET __attribute__((target("crc")))
#else
#define REMUS_CRC_TARGET __attribute__((target("+crc")))
#endif
#define REMUS_CRC_8(crc, word) __crc32cd(crc, word)
#define REMUS_CRC_1(crc, byte) __crc32cb(crc, byte)
#define REMUS_CRC_RUNS() (getauxval(AT_HWCAP) >> 7 & 1) /* HWCAP_CRC32 */
#endif

static inline uint32_t remus_crc_plain(uint32_t crc, const uint8_t *at, size_t size)
{
    static const uint32_t of_four_bits[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };
    for (size_t i = 0; i < size; i++) {
        crc ^= at[i];
        crc = crc >> 4 ^ of_four_bits[crc & 15];
        crc = crc >> 4 ^ of_four_bits[crc & 15];
    }
    return crc;
}

#ifdef REMUS_CRC_RUNS
REMUS_CRC_TARGET static inline uint32_t remus_crc_fast(uint32_t crc, const uint8_t *at, size_t size)
{
    for (; size >= 8; size -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        crc = (uint32_t)REMUS_CRC_8(crc, word);
    }
    for (; size; size--, at++)
        crc = REMUS_CRC_1(crc, *at);
    return crc;
}
#else
#define REMUS_CRC_RUNS() 0
#define remus_crc_fast remus_crc_plain
#endif

#endif
