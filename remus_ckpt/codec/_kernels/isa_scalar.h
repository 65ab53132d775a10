/* The primitives in plain C. Masks count bytes in the order of memory, on little- and big-endian hosts alike. */
#ifndef REMUS_ISA_H
#define REMUS_ISA_H

#define TARGET
#include "page.h"

#define ISA(name) name##_scalar
#define CHUNK 16 /* bytes that copy_chunk moves */

INLINE uint64_t load64(const uint8_t *from)
{
    uint64_t x;
    memcpy(&x, from, 8);
    return x;
}

INLINE void copy_chunk(uint8_t *to, const uint8_t *from)
{
    memcpy(to, from, CHUNK);
}

#define SHORT 16 /* bytes that copy_short moves */

INLINE void copy_short(uint8_t *to, const uint8_t *from)
{
    memcpy(to, from, SHORT);
}

/* Exactly n bytes, none of them read or written twice but by overlapping moves. */
INLINE void copy_exact(uint8_t *to, const uint8_t *from, size_t n)
{
    memcpy(to, from, n);
}

/* One page, every byte of the source read once. */
INLINE void copy_page(const uint8_t *now, uint8_t *to, uint8_t *ref)
{
    for (size_t i = 0; i < REMUS_PAGE; i += 8) {
        uint64_t x = load64(now + i);
        READ_ONCE(x);
        memcpy(to + i, &x, 8);
        if (ref)
            memcpy(ref + i, &x, 8);
    }
}

/* A bit for each group that differs. Prefetches next_ref, and next_now where nothing differs. */
INLINE uint64_t dirty_groups(const uint8_t *now, const uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref)
{
    uint64_t dirty = 0;
    for (unsigned g = 0; g < GROUPS; g++) {
        uint64_t differ = 0;
        __builtin_prefetch(next_ref + g * GROUP);
        for (unsigned i = 0; i < GROUP; i += 8)
            differ |= load64(now + g * GROUP + i) ^ load64(ref + g * GROUP + i);
        const uint64_t bit = differ != 0;
        prefetch_unless(bit, now, next_now, g * GROUP);
        dirty = dirty >> 1 | bit << 63;
    }
    return dirty;
}

/* A bit for each byte of the group that changed; the group is copied to snap and, if update, to ref. */
INLINE uint64_t take_bytes(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    uint64_t mask = 0;
    for (unsigned i = 0; i < GROUP; i += 8) {
        uint64_t x = load64(now + i), differ;
        READ_ONCE(x);
        differ = x ^ load64(ref + i);
        memcpy(snap + i, &x, 8);
        if (update)
            memcpy(ref + i, &x, 8);
        /* The top bit of each byte that is not zero … */
        differ = (((differ & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | differ) & 0x8080808080808080;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        differ = __builtin_bswap64(differ);
#endif
        /* … gathered in the top byte, the first byte's lowest. */
        mask |= ((differ >> 7) * 0x0102040810204080 >> 56) << i;
    }
    return mask;
}

INLINE unsigned take_words(const uint8_t *now, uint8_t *ref, int update, uint8_t *snap)
{
    unsigned mask = 0;
    for (unsigned i = 0; i < GROUP; i += 4) {
        uint32_t x, old;
        memcpy(&x, now + i, 4);
        READ_ONCE(x);
        memcpy(&old, ref + i, 4);
        memcpy(snap + i, &x, 4);
        if (update)
            memcpy(ref + i, &x, 4);
        mask |= (unsigned)(x != old) << (i / 4);
    }
    return mask;
}

/* base + the number of each bit that is set, to positions; at most 64 are written. */
INLINE size_t flatten(uint64_t bits, unsigned base, uint16_t *positions)
{
    size_t n = 0;
    for (; bits; bits &= bits - 1)
        positions[n++] = (uint16_t)(base + lowest_bit(bits));
    return n;
}

#define flatten_bytes flatten
#define flatten_words flatten

#endif
