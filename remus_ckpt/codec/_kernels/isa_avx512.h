/* The primitives for AVX-512 with BW, VL and VBMI2. */
#ifndef REMUS_ISA_H
#define REMUS_ISA_H

#define TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,popcnt")))
#include <immintrin.h>

#include "page.h"

#define ISA(name) name##_avx512
#define CHUNK 64 /* bytes that copy_chunk moves */

#define READ_ONCE_VECTOR(v) __asm__ volatile("" : "+v"(v))

INLINE __m512i load(const uint8_t *from)
{
    return _mm512_loadu_si512((const void *)from);
}

INLINE void store(uint8_t *to, __m512i v)
{
    _mm512_storeu_si512((void *)to, v);
}

INLINE void copy_chunk(uint8_t *to, const uint8_t *from)
{
    store(to, load(from));
}

#define SHORT 32 /* bytes that copy_short moves */

INLINE void copy_short(uint8_t *to, const uint8_t *from)
{
    _mm256_storeu_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
}

/* Exactly n bytes: what a mask leaves out is neither read nor written, and cannot fault. */
INLINE void copy_exact(uint8_t *to, const uint8_t *from, size_t n)
{
    for (; n > 64; n -= 64, to += 64, from += 64)
        store(to, load(from));
    __mmask64 mask = _bzhi_u64(~0ull, (unsigned)n);
    _mm512_mask_storeu_epi8(to, mask, _mm512_maskz_loadu_epi8(mask, from));
}

INLINE void copy_page(const uint8_t *now, uint8_t *to, uint8_t *ref)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 64) {
        __m512i v = load(now + i);
        READ_ONCE_VECTOR(v);
        store(to + i, v);
        if (ref)
            store(ref + i, v);
    }
}

/* A bit for each group that differs. Prefetches next_ref, and next_now where nothing differs. */
INLINE uint64_t dirty_groups(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    uint64_t dirty = 0;
#pragma GCC unroll 8
    for (unsigned g = 0; g < GROUPS; g++) {
        const unsigned at = g * GROUP;
        __builtin_prefetch(next_ref + at);
        const uint64_t bit = _mm512_cmpneq_epi64_mask(load(now + at), load(ref + at)) != 0;
        prefetch_unless(bit, now, next_now, at);
        dirty = dirty >> 1 | bit << 63;
    }
    return dirty;
}

INLINE uint64_t take_bytes(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    __m512i v = load(now);
    READ_ONCE_VECTOR(v);
    uint64_t mask = _mm512_cmpneq_epi8_mask(v, load(ref));
    store(snap, v);
    if (update)
        store(ref, v);
    return mask;
}

INLINE unsigned take_words(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    __m512i v = load(now);
    READ_ONCE_VECTOR(v);
    unsigned mask = _mm512_cmpneq_epi32_mask(v, load(ref));
    store(snap, v);
    if (update)
        store(ref, v);
    return mask;
}

/* base + the number of each bit that is set, to positions; always 32 or 64 are written. */
INLINE size_t flatten_bytes(uint64_t bits, unsigned base, uint16_t *positions)
{
    const __m512i numbers = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36,
        35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
        6, 5, 4, 3, 2, 1, 0);
    const size_t n = (size_t)__builtin_popcountll(bits);
    __m512i packed = _mm512_maskz_compress_epi8(bits, numbers), bases = _mm512_set1_epi16((short)base);
    _mm512_storeu_si512(positions,
                        _mm512_add_epi16(bases, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed))));
    if (n > 32)
        _mm512_storeu_si512(positions + 32,
                            _mm512_add_epi16(bases, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(packed, 1))));
    return n;
}

INLINE size_t flatten_words(uint64_t bits, unsigned base, uint16_t *positions)
{
    const __m256i numbers = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m256i all = _mm256_add_epi16(numbers, _mm256_set1_epi16((short)base));
    _mm256_storeu_si256((__m256i *)positions, _mm256_maskz_compress_epi16((__mmask16)bits, all));
    return (size_t)__builtin_popcountll(bits);
}

#endif
