/* The delta codec: what its kernels share (specs/delta.md). */
#ifndef REMUS_DELTA_H
#define REMUS_DELTA_H

#include <string.h>

#include "kernels.h"

#define DELTA_BEGIN_PAGE (-100)
#define DELTA_FULL_PAGE (-101)
#define DELTA_RECORD 6
#define DELTA_WORDS 682 /* §3.2: with one more the records would be longer than the page */
#define DELTA_LIMIT (DELTA_RECORD * (1 + DELTA_WORDS))

enum { DELTA_IS_FULL = 1, DELTA_AT_END = 1 };

static inline __attribute__((always_inline)) uint8_t *put_marker(uint8_t *out, int marker)
{
    out[0] = (uint8_t)marker;
    out[1] = 0xff;
    memset(out + 2, 0, 4);
    return out + DELTA_RECORD;
}

static inline __attribute__((always_inline)) int delta_offset(const uint8_t *record)
{
    return (int16_t)((unsigned)record[1] << 8 | record[0]);
}

/* The record that opens a page, and the bytes of a full one. Moves `at` behind them and returns DELTA_IS_FULL or 0;
 * -1 for a fault at `at`. Bounds: nothing is read where fewer than six bytes are left. */
static inline __attribute__((always_inline)) int delta_open(const uint8_t *data, size_t size, size_t *at)
{
    uint32_t value;
    if (size - *at < DELTA_RECORD)
        return -1;
    const int marker = delta_offset(data + *at);
    memcpy(&value, data + *at + 2, 4);
    if ((marker != DELTA_BEGIN_PAGE && marker != DELTA_FULL_PAGE) || value != 0)
        return -1;
    if (marker == DELTA_FULL_PAGE) {
        if (size - *at < REMUS_DELTA_MAX)
            return -1;
        *at += REMUS_DELTA_MAX;
        return DELTA_IS_FULL;
    }
    *at += DELTA_RECORD;
    return 0;
}

/* One record within a page. Moves `at` behind it and returns 0; DELTA_AT_END if the page ends there, -1 for a fault. */
static inline __attribute__((always_inline)) int delta_step(const uint8_t *data, size_t size, size_t *at, int *last)
{
    if (size == *at)
        return DELTA_AT_END;
    if (size - *at < DELTA_RECORD)
        return -1;
    const int offset = delta_offset(data + *at);
    if (offset == DELTA_BEGIN_PAGE || offset == DELTA_FULL_PAGE)
        return DELTA_AT_END;
    if (offset <= *last || (offset & ~0xffc) != 0)
        return -1;
    *last = offset;
    *at += DELTA_RECORD;
    return 0;
}

/* After a check that passed: every offset lies within the page, and a page ends at a negative one or with the data. */
#define DELTA_APPLY(isa)                                                                                         \
    TARGET void remus_delta_apply_##isa(const uint8_t *data, size_t size, uint8_t *pages, const int64_t *index,  \
                                        size_t n)                                                                \
    {                                                                                                            \
        const uint8_t *const end = data + size;                                                                  \
        for (size_t i = 0; i < n; i++) {                                                                         \
            uint8_t *page = pages + page_at(index, i);                                                           \
            const int marker = delta_offset(data);                                                               \
            data += DELTA_RECORD;                                                                                \
            if (marker == DELTA_FULL_PAGE) {                                                                     \
                copy_page(data, page, NULL);                                                                     \
                data += REMUS_PAGE;                                                                              \
                continue;                                                                                        \
            }                                                                                                    \
            while (data < end) {                                                                                 \
                const int offset = delta_offset(data);                                                           \
                if (offset < 0)                                                                                  \
                    break;                                                                                       \
                memcpy(page + offset, data + 2, 4);                                                              \
                data += DELTA_RECORD;                                                                            \
            }                                                                                                    \
        }                                                                                                        \
    }

#endif
