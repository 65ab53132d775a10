#include "isa_scalar.h"
#include "rle.h"

RLE_ENCODE(scalar)
RLE_APPLY(scalar)

/* specs/rle.md §4. Bounds: `data[at]` is read only where at < size; every step is compared with what is left. */
int64_t remus_rle_check(const uint8_t *data, size_t size, size_t n)
{
    size_t at = 0, before = 0;
    for (size_t i = 0; i < n; i++) {
        /* The page after this one, if this one and it are as long as the one before. */
        prefetch_bytes(data + at + (at - before), at - before);
        before = at;
        if (at >= size)
            return ~(int64_t)at;
        if (data[at] == 0x00) {
            at++;
            continue;
        }
        if (data[at] == 0x80) {
            if (size - at < 1 + REMUS_PAGE)
                return ~(int64_t)at;
            at += 1 + REMUS_PAGE;
            continue;
        }
        unsigned left = RLE_WORDS;
        while (left) {
            if (at >= size)
                return ~(int64_t)at;
            const unsigned marker = data[at], words = marker & 0x7f;
            if (words == 0 || words > left)
                return ~(int64_t)at;
            left -= words;
            if (marker < 0x80) {
                if (size - at < 1 + 4 * words)
                    return ~(int64_t)at;
                at += 4 * words;
            }
            at++;
        }
    }
    return (int64_t)at;
}
