#include "kernels.h"

#if REMUS_X86
#include "isa_avx512.h"
#include "scan.h"

INLINE int page_differs(const uint8_t *now, const uint8_t *ref)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 512) {
        __m512i differ = _mm512_setzero_si512();
        for (size_t j = i; j < i + 512; j += 64)
            differ = _mm512_or_si512(differ, _mm512_xor_si512(load(now + j), load(ref + j)));
        if (_mm512_test_epi64_mask(differ, differ))
            return 1;
    }
    return 0;
}

INLINE int page_is_filled(const uint8_t *page)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 512) {
        __m512i any = _mm512_setzero_si512();
        for (size_t j = i; j < i + 512; j += 64)
            any = _mm512_or_si512(any, load(page + j));
        if (_mm512_test_epi64_mask(any, any))
            return 1;
    }
    return 0;
}

INLINE int whole_page_differs(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    __m512i differ = _mm512_setzero_si512();
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        __builtin_prefetch(next_now + i);
        __builtin_prefetch(next_ref + i);
        for (size_t j = i; j < i + GROUP; j += 64)
            differ = _mm512_or_si512(differ, _mm512_xor_si512(load(now + j), load(ref + j)));
    }
    return _mm512_test_epi64_mask(differ, differ) != 0;
}

/* Stores that go round the caches, as far as the target is aligned for them. */
INLINE void page_stream(const uint8_t *from, uint8_t *to, const uint8_t *next)
{
    const int aligned = ((uintptr_t)to & 63) == 0;
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        _mm_prefetch((const char *)next + i, _MM_HINT_T0);
        const __m512i v = load(from + i);
        if (aligned)
            _mm512_stream_si512((void *)(to + i), v);
        else
            store(to + i, v);
    }
}

INLINE void stream_end(void)
{
    _mm_sfence();
}

SCAN(avx512)
#endif
