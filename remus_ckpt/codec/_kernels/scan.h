/* The passes around the codecs, over the primitives of one instruction set. Included after isa_*.h.
 *
 * page_differs, page_is_filled, whole_page_differs, page_stream, stream_end: of the instruction set. */

#define SCAN(isa)                                                                                                \
    TARGET size_t remus_dirty_##isa(const uint8_t *memory, const uint8_t *shadow, size_t n, int64_t *found)      \
    {                                                                                                            \
        size_t count = 0;                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                                         \
            /* Always written: no branch that depends on the data but the one that leaves a page early. */       \
            const int64_t number = (int64_t)i;                                                                   \
            memcpy(found + count, &number, sizeof number);                                                       \
            count += page_differs(memory + i * REMUS_PAGE, shadow + i * REMUS_PAGE);                             \
        }                                                                                                        \
        return count;                                                                                            \
    }                                                                                                            \
    TARGET size_t remus_filled_##isa(const uint8_t *pages, size_t n, int64_t *found)                             \
    {                                                                                                            \
        size_t count = 0;                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const int64_t number = (int64_t)i;                                                                   \
            memcpy(found + count, &number, sizeof number);                                                       \
            count += page_is_filled(pages + i * REMUS_PAGE);                                                     \
        }                                                                                                        \
        return count;                                                                                            \
    }                                                                                                            \
    TARGET size_t remus_compare_##isa(const uint8_t *memory, const uint8_t *shadow, size_t n)                    \
    {                                                                                                            \
        size_t count = 0;                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const size_t at = i * REMUS_PAGE, next = at + (i + 1 < n ? REMUS_PAGE : 0);                          \
            count += whole_page_differs(memory + at, shadow + at, memory + next, shadow + next);                 \
        }                                                                                                        \
        return count;                                                                                            \
    }                                                                                                            \
    TARGET void remus_gather_##isa(const uint8_t *memory, const int64_t *index, size_t n, uint8_t *out)          \
    {                                                                                                            \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const uint8_t *next = memory + page_at(index, i + 1 < n ? i + 1 : i);                                \
            page_stream(memory + page_at(index, i), out + i * REMUS_PAGE, next);                           \
        }                                                                                                        \
        stream_end();                                                                                            \
    }                                                                                                            \
    TARGET void remus_scatter_##isa(const uint8_t *pages, const int64_t *index, size_t n, uint8_t *memory)       \
    {                                                                                                            \
        for (size_t i = 0; i < n; i++)                                                                           \
            page_stream(pages + i * REMUS_PAGE, memory + page_at(index, i),                                      \
                        pages + (i + 1 < n ? i + 1 : i) * REMUS_PAGE);                                     \
        stream_end();                                                                                            \
    }
