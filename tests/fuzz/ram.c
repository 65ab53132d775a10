/* A libFuzzer target: the scan for page records of a QEMU stream (specs/qemu-ram.md §4.2) over any bytes. It keeps to its
 * rooms, which AddressSanitizer guards, and what it finds is what stands there.
 *
 * The first byte of an input says how large pages are and how many records there is room for; the rest is the stream.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ram.h"

#define REQUIRE(what)                                                                                            \
    do {                                                                                                         \
        if (!(what)) {                                                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what);                                   \
            abort();                                                                                             \
        }                                                                                                        \
    } while (0)

static void *room(size_t size)
{
    void *memory = malloc(size ? size : 1);
    REQUIRE(memory);
    return memory;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size == 0)
        return 0;
    const size_t n = 1 + input[0] / 4 % 16, page = (size_t)1024 << input[0] % 4, pages = 16;
    uint8_t *data = room(--size);
    if (size)
        memcpy(data, input + 1, size);
    const remus_block block = {page,           pages * page,   (const uint8_t *)"ram", 3,       n,
                               room(n * 8),    room(n * 8),    room(n * 8),            room(n), room(n * 8),
                               room(n * 8),    room(size)};
    remus_found found;
    const size_t taken = remus_scan_ram(data, size, &block, &found);
    REQUIRE(taken <= size && found.full + found.zero + found.encoded <= n && (taken > 0) == (found.full + found.zero + found.encoded > 0));
    size_t frames = 0, bodies = 0;
    int64_t last = -1;
    for (size_t i = 0; i < found.full; last = block.full[i++]) {
        REQUIRE(block.full[i] > last && block.full[i] < (int64_t)pages);
        REQUIRE(block.places[i] >= 8 && (size_t)block.places[i] + page <= taken);
        bodies += page;
    }
    last = -1;
    for (size_t i = 0; i < found.zero; last = block.zero[i++])
        REQUIRE(block.zero[i] > last && block.zero[i] < (int64_t)pages);
    last = -1;
    for (size_t i = 0; i < found.encoded; last = block.encoded[i++]) {
        const uint8_t *frame = data + block.frame_at[i];
        const size_t bytes = 3 + ((size_t)frame[1] << 8 | frame[2]);
        REQUIRE(block.encoded[i] > last && block.encoded[i] < (int64_t)pages);
        REQUIRE((size_t)block.frame_at[i] + bytes <= taken && memcmp(block.frames + frames, frame, bytes) == 0);
        frames += bytes;
    }
    REQUIRE(frames == found.frames);
    /* Each record has a word, and those that name the block four bytes more. */
    const size_t least = bodies + frames + found.zero + 8 * (found.full + found.zero + found.encoded);
    REQUIRE(taken >= least && (taken - least) % 4 == 0 && taken - least <= 4 * n);
    free(block.full), free(block.places), free(block.zero), free(block.fills), free(block.encoded);
    free(block.frame_at), free(block.frames), free(data);
    return 0;
}
