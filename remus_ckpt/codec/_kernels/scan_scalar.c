#include "isa_scalar.h"
#include "scan.h"

INLINE int page_differs(const uint8_t *now, const uint8_t *ref)
{
    return memcmp(now, ref, REMUS_PAGE) != 0;
}

INLINE int page_is_filled(const uint8_t *page)
{
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        uint64_t any = 0;
        for (size_t j = i; j < i + GROUP; j += 8)
            any |= load64(page + j);
        if (any)
            return 1;
    }
    return 0;
}

INLINE int whole_page_differs(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    uint64_t differ = 0;
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        __builtin_prefetch(next_now + i);
        __builtin_prefetch(next_ref + i);
        for (size_t j = i; j < i + GROUP; j += 8)
            differ |= load64(now + j) ^ load64(ref + j);
    }
    return differ != 0;
}

INLINE void page_stream(const uint8_t *from, uint8_t *to, const uint8_t *next)
{
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP)
        __builtin_prefetch(next + i);
    memcpy(to, from, REMUS_PAGE);
}

INLINE void stream_end(void)
{
}

SCAN(scalar)
