#include "kernels.h"

#if REMUS_X86
#include "delta.h"
#include "isa_avx512.h"

INLINE uint8_t *full(const uint8_t *now, uint8_t *ref, uint8_t *out)
{
    out = put_marker(out, DELTA_FULL_PAGE);
    copy_page(now, out, ref);
    return out + REMUS_PAGE;
}

/* As dirty_groups, and the number of words that differ. All of the next page is prefetched here: what follows is too
 * short to spread it. */
INLINE uint64_t dirty_words(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                            unsigned *words)
{
    uint64_t dirty = 0;
    unsigned count = 0;
#pragma GCC unroll 8
    for (unsigned g = 0; g < GROUPS; g++) {
        __builtin_prefetch(next_now + g * GROUP);
        __builtin_prefetch(next_ref + g * GROUP);
        const unsigned differ = _mm512_cmpneq_epi32_mask(load(now + g * GROUP), load(ref + g * GROUP));
        dirty = dirty >> 1 | (uint64_t)(differ != 0) << 63;
        count += (unsigned)__builtin_popcount(differ);
    }
    *words = count;
    return dirty;
}

/* Of sixteen offsets, held as dwords, and sixteen values: the three 16-bit units of each record. */
#define UNITS(record) 2 * (record), 32 + 2 * (record), 33 + 2 * (record)
static const uint16_t UNIT_ORDER[48] = {
    UNITS(0), UNITS(1), UNITS(2),  UNITS(3),  UNITS(4),  UNITS(5),  UNITS(6),  UNITS(7),
    UNITS(8), UNITS(9), UNITS(10), UNITS(11), UNITS(12), UNITS(13), UNITS(14), UNITS(15),
};

/* Bounds: a group writes 96 bytes; as at most one begins before the limit and ends behind it, SLACK covers them. */
INLINE uint8_t *page(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref, int update,
                     uint8_t *out)
{
    const __m512i first = _mm512_loadu_si512(UNIT_ORDER);
    const __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(UNIT_ORDER + 32)));
    const __m512i numbers = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    unsigned words;
    uint64_t dirty = dirty_words(now, ref, next_now, next_ref, &words);
    if (words > DELTA_WORDS)
        return full(now, update ? ref : NULL, out);
    uint8_t *at = put_marker(out, DELTA_BEGIN_PAGE);
    for (; dirty; dirty &= dirty - 1) {
        const unsigned offset = lowest_bit(dirty) * GROUP;
        __m512i v = load(now + offset);
        READ_ONCE_VECTOR(v);
        const __mmask16 mask = _mm512_cmpneq_epi32_mask(v, load(ref + offset));
        if (update)
            store(ref + offset, v);
        const __m512i values = _mm512_maskz_compress_epi32(mask, v);
        const __m512i offsets =
            _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(numbers, _mm512_set1_epi32((int)offset)));
        const unsigned count = (unsigned)__builtin_popcount(mask);
        store(at, _mm512_permutex2var_epi16(offsets, first, values));
        if (count > 10)
            _mm256_storeu_si256((__m256i *)(at + 64),
                                _mm512_castsi512_si256(_mm512_permutex2var_epi16(offsets, second, values)));
        at += DELTA_RECORD * count;
        /* A source that is being written may differ in more words now than when they were counted. */
        if (at > out + DELTA_LIMIT)
            return full(now, update ? ref : NULL, out);
    }
    return at;
}

TARGET size_t remus_delta_encode_avx512(const remus_batch *batch, uint8_t *out)
{
    return encode_batch(batch, out, REMUS_DELTA_MAX, page, full);
}

/* Ten records at a time while they are good; the last ones of a page one by one. */
TARGET int64_t remus_delta_check_avx512(const uint8_t *data, size_t size, size_t n)
{
    const __mmask32 lanes = 0x09249249; /* units 0, 3, 6 … 27: the offsets of ten records */
    const __m512i out_of_page = _mm512_set1_epi16((short)~0xffc);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const int kind = delta_open(data, size, &at);
        if (kind < 0)
            return ~(int64_t)at;
        if (kind == DELTA_IS_FULL)
            continue;
        /* The marker before the first record is negative, and so lower than any offset. */
        while (size - at >= 64) {
            const __m512i here = load(data + at), before = load(data + at - DELTA_RECORD);
            const __mmask32 behind = _mm512_mask_cmpgt_epi16_mask(lanes, here, before);
            const __mmask32 good = _mm512_mask_testn_epi16_mask(behind, here, out_of_page);
            at += DELTA_RECORD * (_tzcnt_u32(good ^ lanes) < 30 ? _tzcnt_u32(good ^ lanes) / 3 : 10);
            if (good != lanes)
                break;
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

DELTA_APPLY(avx512)
#endif
