#include "isa_scalar.h"
#include "xbzrle.h"

XBZRLE_ENCODE(scalar)
XBZRLE_SEND(scalar)
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

/* What is left of an encoded page, and where its next run belongs. */
typedef struct {
    size_t at, body, end, target;
} walk;

/* §5: the frame at `at`. Bounds: it lies within size before its body is looked at. Returns its kind, or -1. */
static inline int open_frame(const uint8_t *data, size_t size, size_t at, walk *w)
{
    if (size - at < FRAME)
        return -1;
    const int kind = data[at];
    const size_t bytes = (size_t)data[at + 1] << 8 | data[at + 2];
    const int fits = kind == 0   ? bytes == 0
                     : kind == 1 ? bytes >= 3 && bytes <= REMUS_PAGE
                     : kind == 2 ? bytes == REMUS_PAGE
                                 : 0;
    if (!fits || bytes > size - at - FRAME)
        return -1;
    *w = (walk){at + FRAME, at + FRAME, at + FRAME + bytes, 0};
    if (kind == 2)
        w->at = w->end;
    return kind;
}

/* §4: one run. Bounds: a length is read only before the end of the frame, and a run is compared with what is left of
 * frame and page. Where it returns 0, w->at is the place of the fault, and no step may follow. */
static inline int step(const uint8_t *data, walk *w)
{
    size_t at = w->at;
    const int gap = take_number(data, &at, w->end);
    if (gap < 0 || (gap == 0 && w->at != w->body))
        return 0;
    const size_t target = w->target + (size_t)gap;
    w->at = at;
    const int run = take_number(data, &at, w->end);
    if (run <= 0 || target + (size_t)run > REMUS_PAGE || (size_t)run > w->end - at)
        return 0;
    w->target = target + (size_t)run;
    w->at = at + (size_t)run;
    return 1;
}

/* Each length says where the next one stands, so a page is a chain of loads: two pages are walked at once as long as
 * both are good. A fault of the second counts once all of the first is found to be good. */
int64_t remus_xbzrle_check(const uint8_t *data, size_t size, size_t n)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        walk a, b = {0, 0, 0, 0};
        if (open_frame(data, size, at, &a) < 0)
            return ~(int64_t)at;
        at = a.end;
        const int two = i + 1 < n && open_frame(data, size, at, &b) >= 0;
        /* The frames that follow are likely to be about as long as these; their reader comes by too late for the
         * hardware to see what it is after. */
        if (a.at < a.end)
            prefetch_bytes(data + (two ? b.end : at), (two ? b.end : at) - a.body);
        int good = 1;
        while (two && good && a.at < a.end && b.at < b.end) {
            if (!step(data, &a))
                return ~(int64_t)a.at;
            good = step(data, &b);
        }
        while (a.at < a.end)
            if (!step(data, &a))
                return ~(int64_t)a.at;
        if (!good)
            return ~(int64_t)b.at;
        if (two) {
            while (b.at < b.end)
                if (!step(data, &b))
                    return ~(int64_t)b.at;
            at = b.end;
            i++;
        }
    }
    return (int64_t)at;
}
