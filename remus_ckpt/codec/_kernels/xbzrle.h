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

/* Is it certain that the page overflows? Each run takes its bytes and two lengths of at least a byte. For pages all of
 * whose groups changed: where the first of them have bytes enough that did not, the answer is no, soon. */
INLINE int ISA(xbzrle_is_dense)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now)
{
    uint8_t unused[GROUP];
    size_t bytes = 0, runs = 0;
    uint64_t open = 0; /* does a run reach up to this group? */
    for (unsigned g = 0; g < GROUPS; g++) {
        const unsigned at = g * GROUP;
        __builtin_prefetch(next_now + at);
        const uint64_t mask = take_bytes(now + at, ref + at, 0, unused);
        bytes += (size_t)__builtin_popcountll(mask);
        runs += (size_t)__builtin_popcountll(mask & ~(mask << 1 | open));
        open = mask >> 63;
        if (g == 7 && bytes < 15 * 8 * GROUP / 16)
            return 0;
    }
    return bytes + 2 * runs > REMUS_PAGE;
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

/* Returns the end of the frame, or NULL if the page overflows: then only the reference may have changed. */
INLINE uint8_t *ISA(xbzrle_changed)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                                    int update, int fold, uint8_t *frame)
{
    uint16_t edges[REMUS_PAGE + 64 + 1];
    uint8_t snap[REMUS_PAGE + CHUNK]; /* copies read up to a chunk past a run */
    uint8_t *const body = frame + FRAME, *out;
    const uint64_t dirty = dirty_groups(now, ref, next_now, next_ref);
    size_t n = 0, changed = 0;
    if (!fold && dirty == ~(uint64_t)0 && ISA(xbzrle_is_dense)(now, ref, next_now))
        return NULL; /* a fold could save it */
    if (dirty)
        n = ISA(xbzrle_edges)(now, ref, next_now, dirty, update, fold, snap, edges, &changed);
    if (n == 0) {
        frame[0] = frame[1] = frame[2] = 0;
        return body;
    }
    if (ISA(xbzrle_overflows)(edges, n, changed))
        return NULL;
    out = n >= 192 ? ISA(xbzrle_runs)(edges, n, snap, 1, body) : ISA(xbzrle_runs)(edges, n, snap, 0, body);
    frame[0] = 1;
    frame[1] = (uint8_t)((out - body) >> 8);
    frame[2] = (uint8_t)(out - body);
    return out;
}

INLINE uint8_t *ISA(xbzrle_page)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now, const uint8_t *next_ref,
                                 int update, uint8_t *out)
{
    uint8_t *const stop = ISA(xbzrle_changed)(now, ref, next_now, next_ref, update, 0, out);
    return stop ? stop : ISA(xbzrle_full)(now, update ? ref : NULL, out);
}

INLINE uint8_t *ISA(xbzrle_fold_page)(const uint8_t *now, uint8_t *ref, const uint8_t *next_now,
                                      const uint8_t *next_ref, int update, uint8_t *out)
{
    uint8_t *const stop = ISA(xbzrle_changed)(now, ref, next_now, next_ref, update, 1, out);
    return stop ? stop : ISA(xbzrle_full)(now, update ? ref : NULL, out);
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

/* The word of one record of QEMU's section `ram` (specs/qemu-ram.md §4), its highest byte first on every host. */
INLINE uint8_t *ISA(ram_word)(uint8_t *out, int64_t number, unsigned flag)
{
    uint64_t word = (uint64_t)number * REMUS_PAGE | flag | RAM_CONTINUE;
#if __BYTE_ORDER__ != __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    memcpy(out, &word, 8);
    return out + 8;
}

/* Mostly the first group decides. */
INLINE int ISA(is_blank)(const uint8_t *page)
{
    for (size_t i = 0; i < REMUS_PAGE; i += GROUP) {
        uint64_t any = 0;
        for (size_t j = i; j < i + GROUP; j += 8) {
            uint64_t x;
            memcpy(&x, page + j, 8);
            any |= x;
        }
        if (any)
            return 0;
    }
    return 1;
}

/* What the cache has for a page. */
typedef struct {
    uint8_t *place; /* where the page may be kept, NULL without a cache */
    int hits;       /* it is there */
    int takes;      /* it is, or goes there now */
} ISA(cached);

INLINE ISA(cached) ISA(look_up)(const remus_sending *s, int64_t number)
{
    if (s->slots == 0)
        return (ISA(cached)){NULL, 0, 0};
    const size_t slot = (size_t)number & (s->slots - 1);
    const int hits = s->held[slot] == number;
    const int takes = hits || s->held[slot] < 0 || s->ages[slot] + REMUS_LIFETIME <= s->age;
    if (takes) {
        s->held[slot] = number;
        s->ages[slot] = s->age;
    }
    return (ISA(cached)){s->cache + slot * REMUS_PAGE, hits, takes};
}

/* specs/qemu-ram.md §10.
 * Bounds: a record takes at most 8 + REMUS_XBZRLE_MAX bytes, and SLACK is left behind the last. */
#define XBZRLE_SEND(isa)                                                                                         \
    TARGET size_t remus_xbzrle_send_##isa(const remus_sending *s, uint8_t *out)                                  \
    {                                                                                                            \
        uint8_t *at = out;                                                                                       \
        for (size_t i = 0; i < s->n; i++) {                                                                      \
            const size_t later = i + 1 < s->n ? i + 1 : i;                                                       \
            const int64_t number = number_at(s->numbers, i);                                                     \
            const uint8_t *const now = s->pages + page_at(s->index, i);                                          \
            const uint8_t *const next_now = s->pages + page_at(s->index, later);                                 \
            const ISA(cached) cached = ISA(look_up)(s, s->first + number);                                       \
            if (ISA(is_blank)(now)) {                                                                            \
                at = ISA(ram_word)(at, number, RAM_ZERO);                                                        \
                *at++ = 0;                                                                                       \
                if (cached.takes)                                                                                \
                    memset(cached.place, 0, REMUS_PAGE);                                                         \
                s->counts[REMUS_SENT_ZERO]++;                                                                    \
                continue;                                                                                        \
            }                                                                                                    \
            if (!s->encodes || !cached.hits) {                                                                   \
                at = ISA(ram_word)(at, number, RAM_PAGE);                                                        \
                prefetch_bytes(next_now, REMUS_PAGE);                                                            \
                copy_page(now, at, cached.takes ? cached.place : NULL);                                          \
                at += REMUS_PAGE;                                                                                \
                s->counts[s->encodes ? REMUS_SENT_MISS : REMUS_SENT_PLAIN]++;                                    \
                continue;                                                                                        \
            }                                                                                                    \
            const size_t next_slot = (size_t)(s->first + number_at(s->numbers, later)) & (s->slots - 1);         \
            uint8_t *const frame = ISA(ram_word)(at, number, RAM_XBZRLE);                                        \
            uint8_t *const stop = ISA(xbzrle_changed)(now, cached.place, next_now,                               \
                                                      s->cache + next_slot * REMUS_PAGE, 1, 0, frame);           \
            if (!stop) {                                                                                         \
                copy_page(now, ISA(ram_word)(at, number, RAM_PAGE), cached.place);                               \
                at = frame + REMUS_PAGE;                                                                         \
                s->counts[REMUS_SENT_OVERFLOW]++;                                                                \
            } else if (frame[0] == 0) {                                                                          \
                s->counts[REMUS_SENT_SAME]++; /* nothing goes out */                                             \
            } else {                                                                                             \
                s->counts[REMUS_SENT_XBZRLE]++;                                                                  \
                s->counts[REMUS_SENT_BYTES] += stop - frame;                                                     \
                at = stop;                                                                                       \
            }                                                                                                    \
        }                                                                                                        \
        return (size_t)(at - out);                                                                               \
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
