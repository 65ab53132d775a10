/* A libFuzzer target: the walk over a whole checkpoint. AddressSanitizer and UBSan must have nothing to say, and what is
 * found must lie within the bytes and the rooms. With -DSTANDALONE it needs no libFuzzer: walk ROUNDS FILE... changes the
 * files' bytes at random places.
 *
 * The first byte of an input says by which word, with how many pages and with how much room the rest is walked.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "walk.h"

#define REQUIRE(what)                                                                                            \
    do {                                                                                                         \
        if (!(what)) {                                                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what);                                   \
            abort();                                                                                             \
        }                                                                                                        \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

/* What was found lies within the bytes of the stream. */
static void examine(const remus_checkpoint *found, const remus_expected *expected)
{
    const remus_progress *walked = &found->walked;
    size_t pages = 0, behind = 0;
    REQUIRE(walked->pages <= expected->pfn_room && walked->chunks <= expected->chunk_room);
    REQUIRE(walked->batches && walked->chunks && walked->pages && walked->encoded == walked->pages);
    REQUIRE(found->tail < found->record && found->record < found->data_size);
    for (size_t i = 0; i < walked->pages; i++)
        REQUIRE(expected->pfns[i] >= 0 && (uint64_t)expected->pfns[i] < expected->p2m_size);
    for (size_t i = 0; i < walked->chunks; i++) {
        const int64_t *const one = expected->chunks + 3 * i;
        REQUIRE(one[0] > 0 && (size_t)one[0] > behind && one[1] > 0 && one[2] > 0);
        behind = (size_t)(one[0] + one[1]);
        pages += (size_t)one[2];
        REQUIRE(behind <= found->tail);
    }
    REQUIRE(pages == walked->pages);
}

/* The same, walked as it comes. whole: what the walk in one go has found; NULL if it is not known */
static void in_pieces(const uint8_t *data, size_t size, const remus_expected *expected, const remus_checkpoint *whole)
{
    remus_progress walked = {0};
    remus_checkpoint found;
    int how = REMUS_MORE;
    for (size_t come = size % 7; come < size && how == REMUS_MORE; come += 1 + come % 61) {
        uint8_t *part = malloc(come ? come : 1);
        REQUIRE(part);
        memcpy(part, data, come);
        how = remus_stream(part, come, expected, &walked, &found);
        REQUIRE(walked.place <= come && walked.encoded <= walked.pages && walked.pages <= expected->pfn_room);
        if (how == REMUS_WHOLE)
            examine(&found, expected);
        REQUIRE(!whole || how == REMUS_MORE);
        free(part);
    }
    if (how != REMUS_MORE)
        return;
    how = remus_stream(data, size, expected, &walked, &found);
    if (how == REMUS_WHOLE)
        examine(&found, expected);
    if (whole) {
        REQUIRE(how == REMUS_WHOLE && found.tail == whole->tail && found.record == whole->record);
        REQUIRE(!memcmp(&found.walked, &whole->walked, sizeof walked));
    }
}

/* What is composed stays within its room, and is what the walk takes it for. */
static void compose(const uint8_t *stream, const remus_checkpoint *was, const remus_expected *expected)
{
    const size_t size = was->data_size;
    uint8_t *const frames = malloc(REMUS_FRAMES), *const all = malloc(REMUS_FRAMES + size);
    remus_expected same = *expected;
    remus_checkpoint found;
    REQUIRE(frames && all);
    same.has_checksums = 0;
    const size_t composed = remus_compose_end(frames, (uint32_t)size, 0, was->epoch, was->after, was->before, size,
                                              was->walked.pages);
    REQUIRE(composed > 2 * REMUS_HEADER && composed <= REMUS_FRAMES);
    memcpy(all, frames, REMUS_HEADER);
    memcpy(all + REMUS_HEADER, stream, size);
    memcpy(all + REMUS_HEADER + size, frames + REMUS_HEADER, composed - REMUS_HEADER);
    REQUIRE(remus_walk(all, composed + size, &same, &found) && found.end == composed + size);
    free(all);
    free(frames);
}

static void acknowledge(uint64_t epoch, const uint8_t *digest)
{
    uint64_t again;
    const uint8_t *there;
    uint8_t *const frame = malloc(REMUS_FRAMES);
    REQUIRE(frame);
    const size_t size = remus_compose_durable(frame, epoch, digest);
    REQUIRE(size <= REMUS_FRAMES && remus_durable(frame, size, &again, &there) == size);
    REQUIRE(again == epoch && !memcmp(there, digest, REMUS_DIGEST));
    free(frame);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (!size)
        return 0;
    const int how = *input++;
    size--;
    uint8_t *data = malloc(size ? size : 1); /* of exactly that size, so that the sanitizer guards its end */
    REQUIRE(data);
    if (size)
        memcpy(data, input, size);
    const size_t pfn_room = how & 16 ? 5 : 300, chunk_room = how & 32 ? 1 : 20;
    remus_expected expected = {
        .word = how & 1 ? 4 : 8,
        .has_checksums = how >> 1 & 1,
        .p2m_size = how & 4 ? 3 : 40,
        .most_data = how & 8 ? 100 : 1 << 19,
        .pfns = malloc(pfn_room * sizeof(int64_t)),
        .pfn_room = pfn_room,
        .chunks = malloc(chunk_room * 3 * sizeof(int64_t)),
        .chunk_room = chunk_room,
    };
    REQUIRE(expected.pfns && expected.chunks);
    remus_checkpoint found;
    memset(&found, 0xee, sizeof found);
    const size_t wanted = remus_wanted(data, size, expected.most_data);
    if (remus_walk(data, size, &expected, &found)) {
        REQUIRE(wanted == found.end && found.end <= size && found.data + found.data_size <= size);
        REQUIRE(found.data_size <= expected.most_data && found.record < found.data_size && found.tail < found.record);
        examine(&found, &expected);
        in_pieces(data + found.data, found.data_size, &expected, &found);
        REQUIRE(found.before >= data && found.before + REMUS_DIGEST <= data + size);
        REQUIRE(found.after >= data && found.after + REMUS_DIGEST <= data + size);
        REQUIRE(found.device_state >= data && found.device_state + found.device_state_size <= data + size);
        compose(data + found.data, &found, &expected);
        acknowledge(found.epoch, found.after);
    }
    /* Whatever the bytes are, a walk over the stream alone stays within them, however they come. */
    uint32_t length = 0;
    if (size > 16)
        memcpy(&length, data + 4, 4);
    if (size > 16 && length <= size - 16)
        in_pieces(data + 16, length, &expected, NULL);
    else
        in_pieces(data, size, &expected, NULL);
    uint64_t epoch;
    const uint8_t *digest;
    const size_t acked = remus_durable(data, size, &epoch, &digest);
    if (acked)
        REQUIRE(acked <= size && digest >= data && digest + REMUS_DIGEST <= data + size);
    free(expected.pfns);
    free(expected.chunks);
    free(data);
    return 0;
}

#ifdef STANDALONE

static uint32_t state = 1;

static uint32_t next(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

/* A header with a right checksum lets a changed length, or a changed payload, get further. */
static void mend(uint8_t *at, size_t size)
{
    for (size_t place = 0; size - place >= 16;) {
        uint32_t length, crc = remus_crc32c(at + place, 12);
        memcpy(&length, at + place + 4, 4);
        memcpy(at + place + 12, &crc, 4);
        if (length > size - place - 16)
            return;
        if (at[place] == 5 || next() % 2) {
            crc = remus_crc32c(at + place + 16, length);
            memcpy(at + place + 8, &crc, 4);
            crc = remus_crc32c(at + place, 12);
            memcpy(at + place + 12, &crc, 4);
        }
        place += 16 + length;
    }
}

int main(int count, char **words)
{
    static uint8_t original[1 << 16], changed[1 << 16];
    const long rounds = strtol(words[1], NULL, 10);
    for (int i = 2; i < count; i++) {
        FILE *file = fopen(words[i], "rb");
        REQUIRE(file);
        const size_t size = fread(original, 1, sizeof original, file);
        fclose(file);
        REQUIRE(size > 1);
        LLVMFuzzerTestOneInput(original, size);
        for (long round = 0; round < rounds; round++) {
            size_t length = size;
            memcpy(changed, original, size);
            for (uint32_t edits = 1 + next() % 3; edits; edits--)
                changed[next() % size] = next() % 2 ? (uint8_t)next() : (uint8_t)(1u << next() % 8);
            if (next() % 4 == 0)
                length = 1 + next() % size;
            else if (next() % 2)
                mend(changed + 1, size - 1);
            LLVMFuzzerTestOneInput(changed, length);
        }
    }
    return 0;
}

#endif
