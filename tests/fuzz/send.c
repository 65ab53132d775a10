/* A libFuzzer target: rounds of pages through every kernel's sender of QEMU records (specs/qemu-ram.md §10), and what a
 * receiver makes of them. Kernels must agree, the receiver must have what was sent, and AddressSanitizer and UBSan must
 * have nothing to say.
 *
 * The first byte of an input is the size of the cache: 0, or a power of two of slots. Then follow rounds: a byte with
 * the pages that are sent, a byte that counts edits, and these, four bytes each: where (two), how many bytes, and what
 * they are xored with; without a byte count, the page becomes zeros.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define PAGES 5
#define FIRST 3 /* the number of the block's first page among all */
#define MEMORY (PAGES * REMUS_PAGE)

#define REQUIRE(what)                                                                                            \
    do {                                                                                                         \
        if (!(what)) {                                                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what);                                   \
            abort();                                                                                             \
        }                                                                                                        \
    } while (0)

static void *room(size_t size)
{
    void *memory = calloc(size ? size : 1, 1);
    REQUIRE(memory);
    return memory;
}

/* Records as a receiver takes them. Returns how many pages came. */
static void receive(const remus_kernel *kernel, const uint8_t *data, size_t size, uint8_t *memory)
{
    const remus_codec *codec = &kernel->codecs[REMUS_XBZRLE];
    while (size) {
        uint64_t word = 0;
        REQUIRE(size >= 9);
        for (int i = 0; i < 8; i++)
            word = word << 8 | data[i];
        const int64_t number = (int64_t)(word / REMUS_PAGE);
        uint8_t *page = memory + number * REMUS_PAGE;
        size_t taken = 8;
        REQUIRE(number < PAGES);
        switch (word % REMUS_PAGE) {
        case RAM_ZERO | RAM_CONTINUE:
            memset(page, data[8], REMUS_PAGE);
            taken += 1;
            break;
        case RAM_PAGE | RAM_CONTINUE:
            REQUIRE(size >= 8 + REMUS_PAGE);
            memcpy(page, data + 8, REMUS_PAGE);
            taken += REMUS_PAGE;
            break;
        default: {
            REQUIRE(word % REMUS_PAGE == (RAM_XBZRLE | RAM_CONTINUE));
            const int64_t frame = codec->check(data + 8, size - 8, 1);
            REQUIRE(data[8] == 1 && frame > 0);
            codec->apply(data + 8, (size_t)frame, memory, &number, 1);
            taken += (size_t)frame;
        }
        }
        data += taken;
        size -= taken;
    }
}

/* All rounds with one kernel. Returns what was sent, and how much. */
static uint8_t *run(const remus_kernel *kernel, const uint8_t *input, size_t size, size_t *sent)
{
    const size_t slots = input[0] % 6 ? (size_t)1 << (input[0] % 6 - 1) : 0, most = PAGES * REMUS_RECORD_MAX + REMUS_SLACK;
    uint8_t *memory = room(MEMORY), *receiver = room(MEMORY), *cache = room(slots * REMUS_PAGE), *all = NULL;
    int64_t *held = room(slots * 8), *ages = room(slots * 8), counts[REMUS_SENT_COUNTS] = {0}, seen = 0;
    *sent = 0;
    for (size_t i = 0; i < slots; i++)
        held[i] = -1;
    input++, size--;
    for (int64_t age = 0; size >= 2; age++) {
        int64_t numbers[PAGES];
        size_t n = 0;
        uint8_t edits = input[1], *out = room(most);
        for (int64_t page = 0; page < PAGES; page++)
            if (age == 0 || input[0] >> page & 1)
                numbers[n++] = page;
        for (input += 2, size -= 2; edits && size >= 4; edits--, input += 4, size -= 4) {
            const size_t start = ((size_t)input[0] << 8 | input[1]) % MEMORY;
            size_t length = input[2] < 0xf0 ? input[2] : 257 * (size_t)(input[2] - 0xef);
            if (length == 0)
                memset(memory + start / REMUS_PAGE * REMUS_PAGE, 0, REMUS_PAGE);
            /* An odd value changes every other byte, so that pages overflow. */
            for (size_t i = 0; i < length && start + i < MEMORY; i += 1 + (input[3] & 1))
                memory[start + i] ^= input[3];
        }
        const remus_sending sending = {memory, numbers, numbers, n, FIRST, cache, held, ages, slots, age, age > 0, counts};
        const size_t bytes = kernel->send(&sending, out);
        REQUIRE(bytes <= n * REMUS_RECORD_MAX);
        uint8_t *exact = room(bytes);
        memcpy(exact, out, bytes);
        receive(kernel, exact, bytes, receiver);
        for (size_t i = 0; i < n; i++)
            REQUIRE(memcmp(receiver + numbers[i] * REMUS_PAGE, memory + numbers[i] * REMUS_PAGE, REMUS_PAGE) == 0);
        for (size_t i = 0; i < slots; i++)
            REQUIRE(held[i] < 0 || memcmp(cache + i * REMUS_PAGE, receiver + (held[i] - FIRST) * REMUS_PAGE, REMUS_PAGE) == 0);
        seen += (int64_t)n;
        all = realloc(all, *sent + bytes + 1);
        REQUIRE(all);
        memcpy(all + *sent, out, bytes);
        *sent += bytes;
        free(exact);
        free(out);
    }
    for (int i = 0; i < REMUS_SENT_BYTES; i++)
        seen -= counts[i];
    REQUIRE(seen == 0);
    free(memory), free(receiver), free(cache), free(held), free(ages);
    return all;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t *expected = NULL;
    size_t expected_bytes = 0;
    for (int k = 0; remus_kernels[k]; k++) {
        size_t bytes;
        if (!remus_kernels[k]->runs())
            continue;
        uint8_t *sent = run(remus_kernels[k], data, size, &bytes);
        if (k == 0) {
            expected = sent;
            expected_bytes = bytes;
            continue;
        }
        REQUIRE(bytes == expected_bytes && (bytes == 0 || memcmp(sent, expected, bytes) == 0));
        free(sent);
    }
    free(expected);
    return 0;
}
