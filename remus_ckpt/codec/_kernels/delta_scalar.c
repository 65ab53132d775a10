#include "delta.h"
#include "isa_scalar.h"

INLINE uint8_t *full(const uint8_t *now, uint8_t *ref, uint8_t *out)
{
    out = put_marker(out, DELTA_FULL_PAGE);
    copy_page(now, out, ref);
    return out + REMUS_PAGE;
}

INLINE uint8_t *page(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref, int update,
                     uint8_t *out)
{
    uint64_t dirty = dirty_groups(now, ref, next_now, next_ref);
    uint8_t *at = put_marker(out, DELTA_BEGIN_PAGE);
    for (; dirty; dirty &= dirty - 1) {
        const unsigned first = lowest_bit(dirty) * GROUP;
        __builtin_prefetch(next_now + first);
        for (unsigned offset = first; offset < first + GROUP; offset += 4) {
            uint32_t word, old;
            memcpy(&word, now + offset, 4);
            READ_ONCE(word);
            memcpy(&old, ref + offset, 4);
            /* Always written, and counted only if the word changed. */
            at[0] = (uint8_t)offset;
            at[1] = (uint8_t)(offset >> 8);
            memcpy(at + 2, &word, 4);
            at += word != old ? DELTA_RECORD : 0;
            if (update)
                memcpy(ref + offset, &word, 4);
        }
        if (at > out + DELTA_LIMIT)
            return full(now, update ? ref : NULL, out);
    }
    return at;
}

size_t remus_delta_encode_scalar(const remus_batch *batch, uint8_t *out)
{
    return encode_batch(batch, out, REMUS_DELTA_MAX, page, full);
}

int64_t remus_delta_check_scalar(const uint8_t *data, size_t size, size_t n)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const int kind = delta_open(data, size, &at);
        if (kind < 0)
            return ~(int64_t)at;
        if (kind == DELTA_IS_FULL)
            continue;
        int last = -1;
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

DELTA_APPLY(scalar)
