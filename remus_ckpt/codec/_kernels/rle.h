/* The rle codec over the primitives of one instruction set (specs/rle.md). Included after isa_*.h. */

#define RLE_WORDS 1024
#define RLE_RUN 127

INLINE uint8_t *ISA(rle_full)(const uint8_t *now, uint8_t *ref, uint8_t *out)
{
    out[0] = 0x80;
    copy_page(now, out + 1, ref);
    return out + REMUS_RLE_MAX - 8;
}

/* Where the runs of changed words begin and end, in turn; the changed groups are copied to snap. §3.1
 * Bounds: a run is at least one word long and is followed by a gap, so at most 1,024 positions; behind them the last
 * group may write 64. */
INLINE size_t ISA(rle_edges)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, uint64_t dirty, int update, uint8_t *snap,
                             uint16_t *edges)
{
    size_t n = 0;
    unsigned behind = 0, open = 0; /* the group behind the last one looked at; does a run reach up to it? */
    while (dirty) {
        const unsigned g = lowest_bit(dirty), at = g * GROUP;
        __builtin_prefetch(next_now + at);
        dirty &= dirty - 1;
        const unsigned mask = take_words(now + at, ref + at, update, snap + at);
        const unsigned touches = open & (g == behind);
        edges[n] = (uint16_t)(behind * 16);
        n += open & !touches;
        n += flatten_words((mask ^ (mask << 1 | touches)) & 0xffff, g * 16, edges + n);
        open = mask >> 15;
        behind = g + 1;
    }
    edges[n] = (uint16_t)(behind * 16);
    return n + open;
}

/* Skip `words` < 1,024. Writes nine bytes, counts at most nine: full markers of 127 words and the rest. */
INLINE uint8_t *ISA(rle_skip)(uint8_t *out, unsigned words)
{
    const unsigned markers = words * 33027u >> 22; /* words / 127, for words up to 1,024 */
    const unsigned rest = words - markers * RLE_RUN;
    memset(out, 0xff, 8);
    out[markers] = (uint8_t)(0x80 | rest);
    return out + markers + (rest != 0);
}

/* The runs of a page. `dense` expects gaps of at most 127 words: it branches on them, which is faster where the branch
 * can be foretold.
 * Bounds: a page counts at most 4,105 bytes, and at most eight bytes or a chunk are written past what is counted. */
INLINE uint8_t *ISA(rle_runs)(const uint16_t *edges, size_t n, const uint8_t *snap, int dense, uint8_t *out)
{
    unsigned reached = 0;
    for (size_t i = 0; i < n; i += 2) {
        const unsigned start = edges[i], end = edges[i + 1], gap = start - reached;
        const uint8_t *from = snap + start * 4;
        unsigned words = end - start;
        reached = end;
        if (dense && __builtin_expect(gap - 1 < RLE_RUN, 1))
            *out++ = (uint8_t)(0x80 | gap);
        else
            out = ISA(rle_skip)(out, gap);
        if (__builtin_expect(words <= SHORT / 4, 1)) {
            *out = (uint8_t)words;
            copy_short(out + 1, from);
            out += 1 + words * 4;
            continue;
        }
        while (words) {
            const unsigned run = words < RLE_RUN ? words : RLE_RUN;
            *out++ = (uint8_t)run;
            for (unsigned j = 0; j < run * 4; j += CHUNK)
                copy_chunk(out + j, from + j);
            out += run * 4;
            from += run * 4;
            words -= run;
        }
    }
    return ISA(rle_skip)(out, RLE_WORDS - reached);
}

INLINE uint8_t *ISA(rle_page)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                              int update, uint8_t *out)
{
    uint16_t edges[RLE_WORDS + 64];
    uint8_t snap[REMUS_PAGE + CHUNK]; /* copies read up to a chunk past a run */
    const uint64_t dirty = dirty_groups(now, ref, next_now, next_ref);
    size_t n = 0;
    if (dirty)
        n = ISA(rle_edges)(now, ref, next_now, dirty, update, snap, edges);
    if (n == 0) {
        *out = 0x00; /* §3.2 */
        return out + 1;
    }
    return n >= 64 ? ISA(rle_runs)(edges, n, snap, 1, out) : ISA(rle_runs)(edges, n, snap, 0, out);
}

#define RLE_ENCODE(isa)                                                                                          \
    TARGET size_t remus_rle_encode_##isa(const remus_batch *batch, uint8_t *out)                                 \
    {                                                                                                            \
        return encode_batch(batch, out, REMUS_RLE_MAX, ISA(rle_page), ISA(rle_full));                            \
    }

/* After a check that passed: only what the markers say is read, and a page is never left. */
#define RLE_APPLY(isa)                                                                                           \
    TARGET void remus_rle_apply_##isa(const uint8_t *data, size_t size, uint8_t *pages, const int64_t *index,    \
                                      size_t n)                                                                  \
    {                                                                                                            \
        (void)size;                                                                                              \
        const uint8_t *before = data;                                                                            \
        for (size_t i = 0; i < n; i++) {                                                                         \
            uint8_t *page = pages + page_at(index, i);                                                           \
            prefetch_target(pages, index, i + 1, n, (size_t)(data - before));                                    \
            before = data;                                                                                       \
            uint8_t *const end = page + REMUS_PAGE;                                                              \
            if (*data == 0x00) {                                                                                 \
                data++;                                                                                          \
                continue;                                                                                        \
            }                                                                                                    \
            if (*data == 0x80) {                                                                                 \
                copy_page(data + 1, page, NULL);                                                                 \
                data += 1 + REMUS_PAGE;                                                                          \
                continue;                                                                                        \
            }                                                                                                    \
            while (page < end) {                                                                                 \
                const size_t bytes = (size_t)(*data & 0x7f) * 4;                                                 \
                if (*data++ < 0x80) {                                                                            \
                    copy_exact(page, data, bytes);                                                               \
                    data += bytes;                                                                               \
                }                                                                                                \
                page += bytes;                                                                                   \
            }                                                                                                    \
        }                                                                                                        \
    }
