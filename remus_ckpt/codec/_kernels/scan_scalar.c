#include "isa_scalar.h"
#include "scan.h"

INLINE int page_differs(const uint8_t *now, const uint8_t *ref)
{
    return memcmp(now, ref, REMUS_PAGE) != 0;
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
