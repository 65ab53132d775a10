#include "kernels.h"

#if REMUS_X86
#include "isa_avx2.h"
#include "scan.h"

INLINE int page_differs(const uint8_t *now, const uint8_t *ref)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 256) {
        __m256i differ = _mm256_setzero_si256();
        for (size_t j = i; j < i + 256; j += 32)
            differ = _mm256_or_si256(differ, _mm256_xor_si256(load(now + j), load(ref + j)));
        if (!_mm256_testz_si256(differ, differ))
            return 1;
    }
    return 0;
}

INLINE int page_is_filled(const uint8_t *page)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 256) {
        __m256i any = _mm256_setzero_si256();
        for (size_t j = i; j < i + 256; j += 32)
            any = _mm256_or_si256(any, load(page + j));
        if (!_mm256_testz_si256(any, any))
            return 1;
    }
    return 0;
}

INLINE int whole_page_differs(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    __m256i differ = _mm256_setzero_si256();
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        __builtin_prefetch(next_now + i);
        __builtin_prefetch(next_ref + i);
        for (size_t j = i; j < i + GROUP; j += 32)
            differ = _mm256_or_si256(differ, _mm256_xor_si256(load(now + j), load(ref + j)));
    }
    return !_mm256_testz_si256(differ, differ);
}

/* Stores that go round the caches, as far as the target is aligned for them. */
INLINE void page_stream(const uint8_t *from, uint8_t *to, const uint8_t *next)
{
    const int aligned = ((uintptr_t)to & 31) == 0;
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        _mm_prefetch((const char *)next + i, _MM_HINT_T0);
        const __m256i a = load(from + i), b = load(from + i + 32);
        if (aligned) {
            _mm256_stream_si256((__m256i *)(void *)(to + i), a);
            _mm256_stream_si256((__m256i *)(void *)(to + i + 32), b);
        } else {
            store(to + i, a);
            store(to + i + 32, b);
        }
    }
}

INLINE void stream_end(void)
{
    _mm_sfence();
}

SCAN(avx2)
#endif
