#include "kernels.h"

#if REMUS_X86
#include "delta.h"
#include "isa_avx2.h"
#include "lanes.h"

INLINE uint8_t *full(const uint8_t *now, uint8_t *ref, uint8_t *out)
{
    out = put_marker(out, DELTA_FULL_PAGE);
    copy_page(now, out, ref);
    return out + REMUS_PAGE;
}

/* The records of eight words. Bounds: writes 48 bytes, counts those of the changed words. */
INLINE uint8_t *records(__m256i now, __m256i old, unsigned offset, uint8_t *out)
{
    /* In each half four offsets and four values, as dwords, become four records: sixteen bytes and eight. */
    const __m256i offsets_16 = _mm256_setr_epi8(
        0, 1, -1, -1, -1, -1, 4, 5, -1, -1, -1, -1, 8, 9, -1, -1, 0, 1, -1, -1, -1, -1, 4, 5, -1, -1, -1, -1, 8, 9, -1,
        -1);
    const __m256i values_16 = _mm256_setr_epi8(
        -1, -1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1, 8, 9, -1, -1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1, 8, 9);
    const __m256i offsets_8 = _mm256_setr_epi8(
        -1, -1, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
        -1, -1, -1, -1);
    const __m256i values_8 = _mm256_setr_epi8(
        10, 11, -1, -1, 12, 13, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, 10, 11, -1, -1, 12, 13, 14, 15, -1, -1, -1, -1,
        -1, -1, -1, -1);
    const unsigned mask = differing_words(now, old);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(LANES + mask)));
    const __m256i values = _mm256_permutevar8x32_epi32(now, lanes);
    const __m256i offsets = _mm256_add_epi32(_mm256_slli_epi32(lanes, 2), _mm256_set1_epi32((int)offset));
    const __m256i a = _mm256_or_si256(_mm256_shuffle_epi8(offsets, offsets_16), _mm256_shuffle_epi8(values, values_16));
    const __m256i b = _mm256_or_si256(_mm256_shuffle_epi8(offsets, offsets_8), _mm256_shuffle_epi8(values, values_8));
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(a));
    _mm_storel_epi64((__m128i *)(out + 16), _mm256_castsi256_si128(b));
    _mm_storeu_si128((__m128i *)(out + 24), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i *)(out + 40), _mm256_extracti128_si256(b, 1));
    return out + DELTA_RECORD * (unsigned)__builtin_popcount(mask);
}

/* Bounds: behind the limit at most one group is written, 96 bytes, which SLACK covers. */
INLINE uint8_t *page(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref, int update,
                     uint8_t *out)
{
    uint64_t dirty = dirty_groups(now, ref, next_now, next_ref);
    uint8_t *at = put_marker(out, DELTA_BEGIN_PAGE);
    for (; dirty; dirty &= dirty - 1) {
        const unsigned offset = lowest_bit(dirty) * GROUP;
        __builtin_prefetch(next_now + offset);
        __m256i a = load(now + offset), b = load(now + offset + 32);
        READ_ONCE_VECTOR(a);
        READ_ONCE_VECTOR(b);
        at = records(a, load(ref + offset), offset, at);
        at = records(b, load(ref + offset + 32), offset + 32, at);
        if (update) {
            store(ref + offset, a);
            store(ref + offset + 32, b);
        }
        if (at > out + DELTA_LIMIT)
            return full(now, update ? ref : NULL, out);
    }
    return at;
}

TARGET size_t remus_delta_encode_avx2(const remus_batch *batch, uint8_t *out)
{
    return encode_batch(batch, out, REMUS_DELTA_MAX, page, full);
}

/* Five records at a time while they and the one before them are whole; the last ones of a page one by one. */
TARGET int64_t remus_delta_check_avx2(const uint8_t *data, size_t size, size_t n)
{
    const __m256i out_of_page = _mm256_set1_epi16((short)~0xffc);
    uint32_t wanted = 0;
    for (unsigned i = 0; i < 5; i++)
        wanted |= 3u << DELTA_RECORD * i;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const int kind = delta_open(data, size, &at);
        if (kind < 0)
            return ~(int64_t)at;
        if (kind == DELTA_IS_FULL)
            continue;
        /* The marker before the first record is negative, and so lower than any offset. */
        while (size - at >= 32) {
            const __m256i here = load(data + at), before = load(data + at - DELTA_RECORD);
            const __m256i inside = _mm256_cmpeq_epi16(_mm256_and_si256(here, out_of_page), _mm256_setzero_si256());
            const __m256i good = _mm256_and_si256(inside, _mm256_cmpgt_epi16(here, before));
            if (((uint32_t)_mm256_movemask_epi8(good) & wanted) != wanted)
                break;
            at += 5 * DELTA_RECORD;
        }
        int last = delta_offset(data + at - DELTA_RECORD);
        for (;;) {
            const int fault = delta_step(data, size, &at, &last);
            if (fault == DELTA_AT_END)
                break;
            if (fault)
                return ~(int64_t)at;
        }
    }
    return (int64_t)at;
}

DELTA_APPLY(avx2)
#endif
