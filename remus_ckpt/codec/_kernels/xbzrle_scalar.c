#include "isa_scalar.h"
#include "xbzrle.h"

XBZRLE_ENCODE(scalar)
XBZRLE_APPLY(scalar)

/* specs/xbzrle.md §4.1: a length at `at`, which moves behind it; -1 where none stands. */
static inline int take_number(const uint8_t *data, size_t *at, size_t end)
{
    if (*at >= end)
        return -1;
    const int low = data[*at];
    if (low < 0x80) {
        *at += 1;
        return low;
    }
    if (end - *at < 2 || data[*at + 1] >= 0x80)
        return -1;
    *at += 2;
    return (low & 0x7f) | data[*at - 1] << 7;
}

/* specs/xbzrle.md §4, §5. Bounds: a frame lies within size before its body is looked at; a length is read only before
 * `end`, the end of its frame, and a run is compared with what is left of frame and page. */
int64_t remus_xbzrle_check(const uint8_t *data, size_t size, size_t n)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (size - at < FRAME)
            return ~(int64_t)at;
        const unsigned kind = data[at];
        const size_t bytes = (size_t)data[at + 1] << 8 | data[at + 2], body = at + FRAME;
        const int fits = kind == 0   ? bytes == 0
                         : kind == 1 ? bytes >= 3 && bytes <= REMUS_PAGE
                         : kind == 2 ? bytes == REMUS_PAGE
                                     : 0;
        if (!fits || bytes > size - body)
            return ~(int64_t)at;
        const size_t end = body + bytes;
        at = body;
        if (kind == 2)
            at = end;
        for (size_t target = 0; at < end;) {
            size_t here = at;
            const int gap = take_number(data, &at, end);
            if (gap < 0 || (gap == 0 && here != body))
                return ~(int64_t)here;
            target += (size_t)gap;
            here = at;
            const int run = take_number(data, &at, end);
            if (run <= 0 || target + (size_t)run > REMUS_PAGE || (size_t)run > end - at)
                return ~(int64_t)here;
            target += (size_t)run;
            at += (size_t)run;
        }
    }
    return (int64_t)at;
}
