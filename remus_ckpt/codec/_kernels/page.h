/* What the kernels of all instruction sets share. Included by isa_*.h, which defines TARGET first. */
#ifndef REMUS_PAGE_H
#define REMUS_PAGE_H

#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline, unused)) TARGET

#define GROUP 64 /* bytes that are compared and brought up to date together */
#define GROUPS (REMUS_PAGE / GROUP)
#define SLACK REMUS_SLACK

/* After this the compiler knows nothing of where x came from, and so cannot read the source a second time: what goes
 * on the wire and what goes into the reference are one and the same register. */
#define READ_ONCE(x) __asm__ volatile("" : "+r"(x))

INLINE int64_t number_at(const int64_t *numbers, size_t i)
{
    int64_t number;
    memcpy(&number, numbers + i, sizeof number); /* the array may lie unaligned */
    return number;
}

INLINE size_t page_at(const int64_t *index, size_t i)
{
    return (size_t)(index ? number_at(index, i) : (int64_t)i) * REMUS_PAGE;
}

INLINE unsigned lowest_bit(uint64_t bits)
{
    return (unsigned)__builtin_ctzll(bits);
}

/* Prefetches 64 bytes of `next`; where `hot` is 1, of `now` in their place, which are at hand and cost nothing. Without
 * a branch: it could not be foretold.
 * A pass over the groups of a page that prefetches all of the next page keeps memory busy for that pass only. So it
 * leaves out the groups that differ, and whoever comes back to those prefetches them then. */
INLINE void prefetch_unless(uint64_t hot, const uint8_t *now, const uint8_t *next, size_t at)
{
    uintptr_t mask = 0 - (uintptr_t)hot;
    READ_ONCE(mask);
    __builtin_prefetch((const void *)((uintptr_t)next + (((uintptr_t)now - (uintptr_t)next) & mask) + at));
}

/* The lowest byte goes first, on every host. */
INLINE void put_32(uint8_t *out, uint32_t x)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap32(x);
#endif
    memcpy(out, &x, 4);
}

/* Encoded pages are walked from length to length, which no hardware foresees. Past the end of a buffer a prefetch does
 * no harm. */
INLINE void prefetch_bytes(const uint8_t *data, size_t size)
{
    for (size_t at = 0; at < size; at += GROUP)
        __builtin_prefetch((const void *)((uintptr_t)data + at));
}

/* Fetches page i, which is soon to be applied, if those before it took so many bytes that many of its lines are likely
 * to be written. Where pages change in a few words each, that would cost more than it saves. */
INLINE void prefetch_target(const uint8_t *pages, const int64_t *index, size_t i, size_t n, size_t bytes_before)
{
    if (bytes_before < REMUS_PAGE / 8 || i >= n)
        return;
    const uint8_t *page = pages + page_at(index, i);
    for (size_t at = 0; at < REMUS_PAGE; at += GROUP)
        __builtin_prefetch(page + at, 1);
}

/* Encodes a page that has a reference; next_* are the pages to prefetch. Returns the end of what it wrote. */
typedef uint8_t *(*page_fn)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                            int update, uint8_t *out);
/* Encodes a page in full; ref, unless NULL, is brought up to date. */
typedef uint8_t *(*full_fn)(const uint8_t *now, uint8_t *ref, uint8_t *out);

/* Bounds: all pages before the i-th took at most max bytes each, so at least max are left for it. An encoder writes at
 * most max + SLACK bytes; where fewer are left it works in `last`, and just what it reports is copied out. */
INLINE size_t encode_batch(const remus_batch *b, uint8_t *out, size_t max, page_fn page, full_fn full)
{
    uint8_t last[REMUS_PAGE + 16 + SLACK];
    uint8_t *at = out;
    const uint8_t *const end = out + b->n * max;
    for (size_t i = 0; i < b->n; i++) {
        const uint8_t *now = b->pages + page_at(b->index, i);
        const int64_t slot = b->slots ? number_at(b->slots, i) : (int64_t)i;
        uint8_t *to = (size_t)(end - at) >= max + SLACK ? at : last;
        const uint8_t *stop;
        if (slot < 0) {
            stop = full(now, NULL, to);
        } else {
            uint8_t *ref = b->reference + (size_t)slot * REMUS_PAGE;
            if (b->full && b->full[i]) {
                stop = full(now, b->update ? ref : NULL, to);
            } else {
                const uint8_t *next_now = now, *next_ref = ref;
                if (i + 1 < b->n) {
                    const int64_t next = b->slots ? number_at(b->slots, i + 1) : (int64_t)i + 1;
                    next_now = b->pages + page_at(b->index, i + 1);
                    next_ref = b->reference + (size_t)(next < 0 ? slot : next) * REMUS_PAGE;
                }
                /* Two pages ahead, one line: it is the address that takes long to find where pages are scattered. */
                if (i + 2 < b->n) {
                    const int64_t later = b->slots ? number_at(b->slots, i + 2) : (int64_t)i + 2;
                    __builtin_prefetch(b->pages + page_at(b->index, i + 2));
                    __builtin_prefetch(b->reference + (size_t)(later < 0 ? slot : later) * REMUS_PAGE);
                }
                stop = page(now, ref, next_now, next_ref, b->update, to);
            }
        }
        if (to == last)
            memcpy(at, last, (size_t)(stop - last));
        at += stop - to;
    }
    return (size_t)(at - out);
}

#endif
