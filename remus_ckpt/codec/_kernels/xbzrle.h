/* The xbzrle codec over the primitives of one instruction set (specs/xbzrle.md). Included after isa_*.h. */

#define FRAME 3

INLINE uint8_t *ISA(xbzrle_full)(const uint8_t *now, uint8_t *ref, uint8_t *out)
{
    out[0] = 2;
    out[1] = REMUS_PAGE >> 8;
    out[2] = REMUS_PAGE & 0xff;
    copy_page(now, out + FRAME, ref);
    return out + REMUS_XBZRLE_MAX;
}

/* Where the runs of changed bytes begin and end, in turn; the changed groups are copied to snap. Returns how many,
 * and in *changed the number of bytes in the runs.
 * Bounds: at most 4,096 positions, and behind them the last group may write 64. */
INLINE size_t ISA(xbzrle_edges)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint64_t dirty, int update, int fold,
                                uint8_t *snap, uint16_t *edges, size_t *changed)
{
    uint64_t masks[GROUPS + 1];
    if (fold) {
        /* A fold looks one byte ahead. */
        memset(masks, 0, sizeof masks);
        for (uint64_t rest = dirty; rest; rest &= rest - 1) {
            const unsigned g = lowest_bit(rest), at = g * GROUP;
            masks[g] = take_bytes(now + at, ref + at, update, snap + at);
        }
    }
    size_t n = 0, bytes = 0;
    unsigned behind = 0; /* the group behind the last one looked at */
    uint64_t open = 0;   /* does a run reach up to it? */
    for (uint64_t rest = dirty; rest; rest &= rest - 1) {
        const unsigned g = lowest_bit(rest), at = g * GROUP;
        uint64_t mask;
        __builtin_prefetch(next_now + at);
        if (fold) {
            const uint64_t before = g ? masks[g - 1] >> 63 : 0, after = masks[g + 1] << 63;
            mask = masks[g] | ((masks[g] << 1 | before) & (masks[g] >> 1 | after)); /* §3.3 */
        } else {
            mask = take_bytes(now + at, ref + at, update, snap + at);
        }
        const uint64_t touches = open & (g == behind);
        edges[n] = (uint16_t)(behind * GROUP);
        n += open & !touches;
        n += flatten_bytes(mask ^ (mask << 1 | touches), at, edges + n);
        bytes += (size_t)__builtin_popcountll(mask);
        open = mask >> 63;
        behind = g + 1;
    }
    edges[n] = (uint16_t)(behind * GROUP);
    *changed = bytes;
    return n + open;
}

/* ULEB128 of a number below 2^14, its first byte the lowest; *bytes is 1 or 2. */
INLINE uint32_t ISA(xbzrle_length)(unsigned number, unsigned *bytes)
{
    const unsigned two = number > 0x7f;
    *bytes = 1 + two;
    return (number & 0x7f) | two << 7 | (number & 0x3f80) << 1;
}

/* Would the page take more than 4,096 bytes? QEMU also gives up where two bytes are missing before a length. Before
 * the lengths of a run, that run would not fit either; so it matters behind the last run alone, where a gap follows. */
INLINE int ISA(xbzrle_overflows)(const uint16_t *edges, size_t n, size_t changed)
{
    size_t size = changed + n;
    unsigned reached = 0;
    if (size + n <= REMUS_PAGE - 2)
        return 0; /* even if every length took two bytes */
    for (size_t i = 0; i < n; i += 2) {
        size += (edges[i] - reached > 0x7f) + (edges[i + 1] - edges[i] > 0x7f);
        reached = edges[i + 1];
    }
    return size > REMUS_PAGE || (reached < REMUS_PAGE && size > REMUS_PAGE - 2);
}

/* Runs of changed bytes, to `out`. `dense` expects short gaps: it branches on them,
 * which is faster where the branch can be foretold.
 * Bounds: the page does not overflow, and at most a chunk is written past what is counted. */
INLINE uint8_t *ISA(xbzrle_runs)(const uint16_t *edges, size_t n, const uint8_t *snap, int dense, uint8_t *out)
{
    unsigned reached = 0;
    for (size_t i = 0; i < n; i += 2) {
        const unsigned start = edges[i], end = edges[i + 1], bytes = end - start, gap = start - reached;
        uint32_t lengths;
        unsigned head = 2;
        reached = end;
        if (dense && __builtin_expect((gap | bytes) < 0x80, 1)) {
            lengths = gap | bytes << 8;
        } else {
            unsigned run_bytes;
            lengths = ISA(xbzrle_length)(gap, &head);
            lengths |= ISA(xbzrle_length)(bytes, &run_bytes) << 8 * head;
            head += run_bytes;
        }
        put_32(out, lengths);
        copy_short(out + head, snap + start);
        if (__builtin_expect(bytes > SHORT, 0))
            for (unsigned j = SHORT; j < bytes; j += CHUNK)
                copy_chunk(out + head + j, snap + start + j);
        out += head + bytes;
    }
    return out;
}

INLINE uint8_t *ISA(xbzrle_changed)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                                    int update, int fold, uint8_t *frame)
{
    uint16_t edges[REMUS_PAGE + 64 + 1];
    uint8_t snap[REMUS_PAGE + CHUNK]; /* copies read up to a chunk past a run */
    uint8_t *const body = frame + FRAME, *out;
    const uint64_t dirty = dirty_groups(now, ref, next_now, next_ref);
    size_t n = 0, changed = 0;
    if (dirty)
        n = ISA(xbzrle_edges)(now, ref, next_now, dirty, update, fold, snap, edges, &changed);
    if (n == 0) {
        frame[0] = frame[1] = frame[2] = 0;
        return body;
    }
    if (ISA(xbzrle_overflows)(edges, n, changed))
        return ISA(xbzrle_full)(now, update ? ref : NULL, frame);
    out = n >= 192 ? ISA(xbzrle_runs)(edges, n, snap, 1, body) : ISA(xbzrle_runs)(edges, n, snap, 0, body);
    frame[0] = 1;
    frame[1] = (uint8_t)((out - body) >> 8);
    frame[2] = (uint8_t)(out - body);
    return out;
}

INLINE uint8_t *ISA(xbzrle_page)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                                 int update, uint8_t *out)
{
    return ISA(xbzrle_changed)(now, ref, next_now, next_ref, update, 0, out);
}

INLINE uint8_t *ISA(xbzrle_fold_page)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now,
                                      const uint8_t *next_ref, int update, uint8_t *out)
{
    return ISA(xbzrle_changed)(now, ref, next_now, next_ref, update, 1, out);
}

#define XBZRLE_ENCODE(isa)                                                                                       \
    TARGET size_t remus_xbzrle_encode_##isa(const remus_batch *batch, uint8_t *out)                              \
    {                                                                                                            \
        return encode_batch(batch, out, REMUS_XBZRLE_MAX, ISA(xbzrle_page), ISA(xbzrle_full));                   \
    }                                                                                                            \
    TARGET size_t remus_xbzrle_fold_encode_##isa(const remus_batch *batch, uint8_t *out)                         \
    {                                                                                                            \
        return encode_batch(batch, out, REMUS_XBZRLE_MAX, ISA(xbzrle_fold_page), ISA(xbzrle_full));              \
    }

/* What is left of an encoded page, and where its next run belongs. */
typedef struct {
    const uint8_t *data, *end;
    uint8_t *page;
} ISA(xbzrle_walk);

INLINE unsigned ISA(xbzrle_number)(const uint8_t **data)
{
    unsigned number = *(*data)++;
    if (number >= 0x80)
        number = (number & 0x7f) | (unsigned)*(*data)++ << 7;
    return number;
}

INLINE void ISA(xbzrle_run)(ISA(xbzrle_walk) *walk)
{
    walk->page += ISA(xbzrle_number)(&walk->data);
    const unsigned bytes = ISA(xbzrle_number)(&walk->data);
    copy_exact(walk->page, walk->data, bytes);
    walk->page += bytes;
    walk->data += bytes;
}

/* Opens the frame at `data`; a raw one is copied, and nothing is left of it. Returns where the next one begins. */
INLINE const uint8_t *ISA(xbzrle_open)(const uint8_t *data, uint8_t *page, ISA(xbzrle_walk) *walk)
{
    const uint8_t *const end = data + FRAME + ((unsigned)data[1] << 8 | data[2]);
    if (data[0] == 2)
        copy_page(data + FRAME, page, NULL);
    *walk = (ISA(xbzrle_walk)){data[0] == 2 ? end : data + FRAME, end, page};
    return end;
}

/* After a check that passed: only what the frames say is read, and a page is never left.
 * Each length says where the next one stands, so a page is a chain of loads; two pages, if they are two, are walked at
 * once. */
#define XBZRLE_APPLY(isa)                                                                                        \
    TARGET void remus_xbzrle_apply_##isa(const uint8_t *data, size_t size, uint8_t *pages, const int64_t *index, \
                                         size_t n)                                                               \
    {                                                                                                            \
        (void)size;                                                                                              \
        for (size_t i = 0; i < n;) {                                                                             \
            ISA(xbzrle_walk) a, b = {NULL, NULL, NULL};                                                          \
            const uint8_t *const before = data;                                                                  \
            const size_t page = page_at(index, i++);                                                             \
            data = ISA(xbzrle_open)(data, pages + page, &a);                                                     \
            if (i < n && page_at(index, i) != page)                                                              \
                data = ISA(xbzrle_open)(data, pages + page_at(index, i++), &b);                                  \
            prefetch_target(pages, index, i, n, (size_t)(data - before) / 2);                                    \
            if (a.data < a.end)                                                                                  \
                prefetch_bytes(data, (size_t)(data - before));                                                   \
            prefetch_target(pages, index, i + 1, n, (size_t)(data - before) / 2);                                \
            while (a.data < a.end && b.data < b.end) {                                                           \
                ISA(xbzrle_run)(&a);                                                                             \
                ISA(xbzrle_run)(&b);                                                                             \
            }                                                                                                    \
            while (a.data < a.end)                                                                               \
                ISA(xbzrle_run)(&a);                                                                             \
            while (b.data < b.end)                                                                               \
                ISA(xbzrle_run)(&b);                                                                             \
        }                                                                                                        \
    }
