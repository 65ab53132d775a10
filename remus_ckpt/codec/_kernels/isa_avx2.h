/* The primitives for AVX2. */
#ifndef REMUS_ISA_H
#define REMUS_ISA_H

#define TARGET __attribute__((target("avx2,bmi,bmi2,popcnt")))
#include <immintrin.h>

#include "page.h"

#define ISA(name) name##_avx2
#define CHUNK 32 /* bytes that copy_chunk moves */

#define READ_ONCE_VECTOR(v) __asm__ volatile("" : "+x"(v))

INLINE __m256i load(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

INLINE void store(uint8_t *to, __m256i v)
{
    _mm256_storeu_si256((__m256i *)to, v);
}

INLINE void copy_chunk(uint8_t *to, const uint8_t *from)
{
    store(to, load(from));
}

#define SHORT 32 /* bytes that copy_short moves */

INLINE void copy_short(uint8_t *to, const uint8_t *from)
{
    store(to, load(from));
}

/* Exactly n bytes: moves of a power of two, the last one laid back over the one before it. */
INLINE void copy_exact(uint8_t *to, const uint8_t *from, size_t n)
{
    if (n >= 32) {
        for (size_t i = 0; i + 32 < n; i += 32)
            store(to + i, load(from + i));
        store(to + n - 32, load(from + n - 32));
    } else if (n >= 16) {
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + n - 16));
        _mm_storeu_si128((__m128i *)to, a);
        _mm_storeu_si128((__m128i *)(to + n - 16), b);
    } else if (n >= 4) {
        uint64_t a, b;
        if (n >= 8) {
            memcpy(&a, from, 8);
            memcpy(&b, from + n - 8, 8);
            memcpy(to, &a, 8);
            memcpy(to + n - 8, &b, 8);
        } else {
            memcpy(&a, from, 4);
            memcpy(&b, from + n - 4, 4);
            memcpy(to, &a, 4);
            memcpy(to + n - 4, &b, 4);
        }
    } else if (n) {
        to[n - 1] = from[n - 1];
        to[n / 2] = from[n / 2];
        to[0] = from[0];
    }
}

INLINE void copy_page(const uint8_t *now, uint8_t *to, uint8_t *ref)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 32) {
        __m256i v = load(now + i);
        READ_ONCE_VECTOR(v);
        store(to + i, v);
        if (ref)
            store(ref + i, v);
    }
}

INLINE unsigned differing_words(__m256i a, __m256i b)
{
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))) ^ 0xff;
}

/* A bit for each group that differs. Prefetches next_ref, and next_now where nothing differs. */
INLINE uint64_t dirty_groups(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    uint64_t dirty = 0;
#pragma GCC unroll 4
    for (unsigned g = 0; g < GROUPS; g++) {
        const unsigned at = g * GROUP;
        __builtin_prefetch(next_ref + at);
        const __m256i differ = _mm256_or_si256(_mm256_xor_si256(load(now + at), load(ref + at)),
                                               _mm256_xor_si256(load(now + at + 32), load(ref + at + 32)));
        const uint64_t bit = !_mm256_testz_si256(differ, differ);
        prefetch_unless(bit, now, next_now, at);
        dirty = dirty >> 1 | bit << 63;
    }
    return dirty;
}

INLINE uint64_t take_bytes(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    __m256i a = load(now), b = load(now + 32);
    READ_ONCE_VECTOR(a);
    READ_ONCE_VECTOR(b);
    uint32_t low = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, load(ref)));
    uint32_t high = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, load(ref + 32)));
    store(snap, a);
    store(snap + 32, b);
    if (update) {
        store(ref, a);
        store(ref + 32, b);
    }
    return ~((uint64_t)high << 32 | low);
}

INLINE unsigned take_words(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    __m256i a = load(now), b = load(now + 32);
    READ_ONCE_VECTOR(a);
    READ_ONCE_VECTOR(b);
    unsigned mask = differing_words(a, load(ref)) | differing_words(b, load(ref + 32)) << 8;
    store(snap, a);
    store(snap + 32, b);
    if (update) {
        store(ref, a);
        store(ref + 32, b);
    }
    return mask;
}

/* base + the number of each bit that is set, to positions; at most 64 are written, rounded up to eight. */
INLINE size_t flatten(uint64_t bits, unsigned base, uint16_t *positions)
{
    const size_t n = (size_t)__builtin_popcountll(bits);
    for (size_t i = 0; i < n; i += 8) {
        /* Past the last bit this writes base + 64, which the next ones overwrite: no branch for each bit. */
        for (size_t j = 0; j < 8; j++) {
            positions[i + j] = (uint16_t)(base + _tzcnt_u64(bits));
            bits = _blsr_u64(bits);
        }
    }
    return n;
}

#define flatten_bytes flatten
#define flatten_words flatten

#endif
