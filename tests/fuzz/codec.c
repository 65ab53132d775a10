/* A libFuzzer target: one codec, every kernel of this build, the same input; they must agree, and AddressSanitizer and
 * UBSan must have nothing to say. Built once per codec, with CODEC and, for a second encoder of the codec, CODEC_2.
 *
 * The first byte of an input says what the rest is:
 *   even  encoded pages, as a peer could send them; the first byte / 2, modulo 8, is how many
 *   odd   edits that make the pages to encode: four bytes each, where (two), how many bytes, what they are xored with
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define PAGES 3

#define REQUIRE(what)                                                                                            \
    do {                                                                                                         \
        if (!(what)) {                                                                                           \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, kernel->name, #what);                 \
            abort();                                                                                             \
        }                                                                                                        \
    } while (0)

/* Of exactly that size, so that the sanitizer guards its ends; never NULL. */
static uint8_t *copy_of(const void *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy)
        abort();
    if (size)
        memcpy(copy, data, size);
    return copy;
}

static void fill(uint8_t *pages, size_t size)
{
    uint32_t x = 1;
    for (size_t i = 0; i < size; i++) {
        x = x * 1664525 + 1013904223;
        pages[i] = (uint8_t)(x >> 24);
    }
}

static void decode(const uint8_t *input, size_t size, size_t n)
{
    static const int64_t twice[8] = {0, 1, 1, 2, 0, 0, 2, 1};
    static uint8_t before[PAGES * REMUS_PAGE];
    const remus_kernel *kernel = remus_kernels[0];
    uint8_t *data = copy_of(input, size), *expected = copy_of(before, sizeof before);
    fill(before, sizeof before);
    const int64_t taken = kernel->codecs[CODEC].check(data, size, n);
    REQUIRE(taken <= (int64_t)size && ~taken <= (int64_t)size);
    for (int k = 0; (kernel = remus_kernels[k]) != NULL; k++) {
        if (!kernel->runs())
            continue;
        REQUIRE(kernel->codecs[CODEC].check(data, size, n) == taken);
        if (taken < 0)
            continue;
        uint8_t *pages = copy_of(before, sizeof before);
        uint8_t *exact = copy_of(data, (size_t)taken);
        kernel->codecs[CODEC].apply(exact, (size_t)taken, pages, twice, n);
        if (k == 0)
            memcpy(expected, pages, sizeof before);
        REQUIRE(memcmp(pages, expected, sizeof before) == 0);
        free(exact);
        free(pages);
    }
    free(expected);
    free(data);
}

static void encode(int codec, const uint8_t *input, size_t size)
{
    static uint8_t before[PAGES * REMUS_PAGE];
    const size_t room = PAGES * remus_max_page[codec];
    uint8_t flags[PAGES] = {0, 0, 0};
    fill(before, sizeof before);
    uint8_t *now = copy_of(before, sizeof before), *expected = NULL;
    size_t written = 0;
    for (; size >= 4; input += 4, size -= 4) {
        const size_t start = ((size_t)input[0] << 8 | input[1]) % sizeof before;
        size_t length = input[2] < 0xf0 ? input[2] : 257 * (size_t)(input[2] - 0xef);
        if (length > sizeof before - start)
            length = sizeof before - start;
        for (size_t i = 0; i < length; i++)
            now[start + i] ^= input[3];
        if (input[2] == 0)
            flags[start / REMUS_PAGE] = input[3] & 1;
    }
    const remus_kernel *kernel;
    for (int k = 0; (kernel = remus_kernels[k]) != NULL; k++) {
        if (!kernel->runs())
            continue;
        for (int update = 0; update < 2; update++) {
            uint8_t *reference = copy_of(before, sizeof before), *pages = copy_of(before, sizeof before);
            uint8_t *out = malloc(room);
            const remus_batch batch = {now, NULL, reference, NULL, flags, PAGES, update};
            const size_t bytes = kernel->codecs[codec].encode(&batch, out);
            if (!expected) {
                expected = copy_of(out, bytes);
                written = bytes;
            }
            REQUIRE(bytes == written && memcmp(out, expected, bytes) == 0);
            REQUIRE(memcmp(reference, update ? now : before, sizeof before) == 0);
            REQUIRE(kernel->codecs[codec].check(expected, written, PAGES) == (int64_t)written);
            kernel->codecs[codec].apply(expected, written, pages, NULL, PAGES);
            REQUIRE(memcmp(pages, now, sizeof before) == 0);
            free(out);
            free(pages);
            free(reference);
        }
    }
    free(expected);
    free(now);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    if (data[0] % 2 == 0) {
        decode(data + 1, size - 1, data[0] / 2 % 8);
    } else {
        encode(CODEC, data + 1, size - 1);
#ifdef CODEC_2
        encode(CODEC_2, data + 1, size - 1);
#endif
    }
    return 0;
}
