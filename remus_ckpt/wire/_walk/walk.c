#include "walk.h"

#include <string.h>

#include "../../codec/_kernels/crc32c.h"

enum {
    DATA = 4,
    COMMIT = 5,
    ACK = 6,
    HEADER = REMUS_HEADER, /* bytes of a frame's header (session.md §2.1) */
    MOST_ENTRIES = 1024,
    COMPRESSED_DATA = -12,
    PAGE = 4096,
};

/* CRC-32C of a frame's header or payload (session.md §2.1). */
uint32_t remus_crc32c(const uint8_t *at, size_t size)
{
    return ~(REMUS_CRC_RUNS() ? remus_crc_fast(~0u, at, size) : remus_crc_plain(~0u, at, size));
}

/* Little-endian integers, whatever the machine. */

static uint64_t little(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    for (int i = bytes - 1; i >= 0; i--)
        value = value << 8 | at[i];
    return value;
}

/* A frame's header: 1 if it is one of that type without flags, with a right checksum. */
static int is_head(const uint8_t *at, int type, uint64_t *length, uint32_t *crc)
{
    if (at[0] != type || at[1] || at[2] || at[3] || remus_crc32c(at, 12) != little(at + 12, 4))
        return 0;
    *length = little(at + 4, 4);
    *crc = (uint32_t)little(at + 8, 4);
    return *length > 0;
}

size_t remus_wanted(const uint8_t *at, size_t size, uint64_t most_data)
{
    uint64_t length, commit;
    uint32_t crc;
    if (size < HEADER)
        return size && at[0] != DATA ? 0 : HEADER;
    if (!is_head(at, DATA, &length, &crc) || length > most_data)
        return 0;
    const size_t second = HEADER + (size_t)length;
    if (size < second + HEADER)
        return second + HEADER;
    if (!is_head(at + second, COMMIT, &commit, &crc) || commit > 1024)
        return 0;
    return second + HEADER + (size_t)commit;
}

/* A cursor over msgpack. Each function moves on and returns 1, or returns 0; nothing is read at or past `end`. */

typedef struct {
    const uint8_t *at, *end;
} cursor;

static int take(cursor *c, const void *bytes, size_t size)
{
    if ((size_t)(c->end - c->at) < size || memcmp(c->at, bytes, size))
        return 0;
    c->at += size;
    return 1;
}

/* A text of up to 31 characters. */
static int text(cursor *c, const char *value)
{
    const size_t size = strlen(value);
    const uint8_t head = (uint8_t)(0xa0 | size);
    return take(c, &head, 1) && take(c, value, size);
}

static int number(cursor *c, uint64_t *value)
{
    if (c->at == c->end)
        return 0;
    const uint8_t tag = *c->at++;
    if (tag < 0x80) {
        *value = tag;
        return 1;
    }
    if (tag < 0xcc || tag > 0xcf)
        return 0;
    const int bytes = 1 << (tag - 0xcc);
    if (c->end - c->at < bytes)
        return 0;
    *value = 0;
    for (int i = 0; i < bytes; i++)
        *value = *value << 8 | *c->at++;
    return *value >> 63 == 0;
}

/* [epoch, 32 bytes] */
static int position(cursor *c, uint64_t *epoch, const uint8_t **digest)
{
    if (!take(c, "\x92", 1) || !number(c, epoch) || !take(c, "\xc4\x20", 2) || c->end - c->at < REMUS_DIGEST)
        return 0;
    *digest = c->at;
    c->at += REMUS_DIGEST;
    return 1;
}

static int binary(cursor *c, const uint8_t **data, size_t *size)
{
    if (c->at == c->end)
        return 0;
    const uint8_t tag = *c->at++;
    if (tag < 0xc4 || tag > 0xc6)
        return 0;
    const int bytes = 1 << (tag - 0xc4);
    if (c->end - c->at < bytes)
        return 0;
    *size = 0;
    for (int i = 0; i < bytes; i++)
        *size = *size << 8 | *c->at++;
    if ((size_t)(c->end - c->at) < *size)
        return 0;
    *data = c->at;
    c->at += *size;
    return 1;
}

/* The record (stream.md §9.2), from its magic to its digest. */
static int record(const uint8_t *at, const uint8_t *end, const remus_expected *expected, remus_checkpoint *found)
{
    cursor c = {at, end};
    uint64_t version, epoch_before, epoch_after;
    if (!take(&c, "\x89REMUSck", 8) || c.at == c.end)
        return 0;
    const int keys = *c.at++ - 0x80;
    if (!text(&c, "version") || !number(&c, &version) || !text(&c, "epoch") || !number(&c, &found->epoch)
        || !text(&c, "time_ns") || (version != 1 && version != 2))
        return 0;
    found->has_time = !take(&c, "\xc0", 1);
    if ((found->has_time && !number(&c, &found->time_ns)) || !text(&c, "codec"))
        return 0;
    found->is_delta = text(&c, "delta");
    if ((!found->is_delta && !text(&c, "rle")) || !text(&c, "before") || !position(&c, &epoch_before, &found->before)
        || !text(&c, "after") || !position(&c, &epoch_after, &found->after) || !text(&c, "device_state")
        || !binary(&c, &found->device_state, &found->device_state_size))
        return 0;
    found->is_blake3 = 0;
    if (version == 2) {
        if (!text(&c, "digest"))
            return 0;
        found->is_blake3 = text(&c, "blake3");
        if (!found->is_blake3 && !text(&c, "sha256"))
            return 0;
    }
    found->memory_bytes = 0;
    const int extra = keys - (version == 2 ? 8 : 7);
    if (extra == 1) {
        const uint64_t most = expected->p2m_size * PAGE;
        if (!text(&c, "memory_bytes") || !number(&c, &found->memory_bytes) || found->memory_bytes > most
            || found->memory_bytes <= most - PAGE)
            return 0;
    } else if (extra) {
        return 0;
    }
    return c.at == c.end && epoch_after == found->epoch && epoch_before + 1 == found->epoch;
}

static int begun(const remus_progress *walked)
{
    return walked->batches && walked->chunks && walked->encoded == walked->pages;
}

int remus_stream(const uint8_t *at, size_t size, const remus_expected *expected, remus_progress *walked,
                 remus_checkpoint *found)
{
    static const char signature[] = "RemusDeviceModelState";
    static const uint8_t zeros[28];
    enum { SIGNATURE = sizeof signature - 1, TAIL = 4 + sizeof zeros + SIGNATURE + 4 };
    const size_t word = (size_t)expected->word;
    for (;;) {
        const uint8_t *here = at + walked->place;
        const size_t left = size - walked->place;
        if (left < 4)
            return REMUS_MORE;
        const int32_t chunk = (int32_t)little(here, 4);
        if (!chunk)
            break;
        if (chunk > 0) {
            const size_t count = (size_t)chunk;
            if (chunk > MOST_ENTRIES || expected->pfn_room - walked->pages < count)
                return REMUS_NONE;
            if ((left - 4) / word < count)
                return REMUS_MORE;
            for (size_t i = 0; i < count; i++) {
                const uint64_t entry = little(here + 4 + i * word, (int)word);
                if (entry >= expected->p2m_size)
                    return REMUS_NONE;
                expected->pfns[walked->pages + i] = (int64_t)entry;
            }
            walked->pages += count;
            walked->batches++;
            walked->place += 4 + count * word;
        } else if (chunk == COMPRESSED_DATA) {
            if (walked->encoded == walked->pages || walked->chunks == expected->chunk_room)
                return REMUS_NONE;
            if (left < 4 + word)
                return REMUS_MORE;
            const uint64_t length = little(here + 4, (int)word);
            if (!length || length > expected->most_data)
                return REMUS_NONE;
            if (length > left - 4 - word)
                return REMUS_MORE;
            int64_t *const one = expected->chunks + 3 * walked->chunks++;
            one[0] = (int64_t)(walked->place + 4 + word);
            one[1] = (int64_t)length;
            one[2] = (int64_t)(walked->pages - walked->encoded);
            walked->encoded = walked->pages;
            walked->place += 4 + word + (size_t)length;
        } else {
            return REMUS_NONE;
        }
    }
    if (!begun(walked))
        return REMUS_NONE;
    const uint8_t *const tail = at + walked->place;
    const size_t left = size - walked->place;
    if (left < TAIL)
        return REMUS_MORE;
    const uint64_t rest = little(tail + TAIL - 4, 4);
    if (memcmp(tail + 4, zeros, sizeof zeros) || memcmp(tail + 4 + sizeof zeros, signature, SIGNATURE)
        || rest < REMUS_DIGEST || rest > expected->most_data || left - TAIL > rest)
        return REMUS_NONE;
    if (left - TAIL < rest)
        return REMUS_MORE;
    found->walked = *walked;
    found->data = 0;
    found->data_size = found->end = size;
    found->tail = walked->place + 4;
    found->record = walked->place + TAIL;
    return record(tail + TAIL, at + size - REMUS_DIGEST, expected, found) ? REMUS_WHOLE : REMUS_NONE;
}

int remus_walk(const uint8_t *at, size_t size, const remus_expected *expected, remus_checkpoint *found)
{
    uint64_t length, commit, epoch, epoch_before, stream_bytes, pages;
    uint32_t crc, commit_crc;
    const uint8_t *after, *before;
    if (size < HEADER || !is_head(at, DATA, &length, &crc) || length > expected->most_data
        || size - HEADER < length || size - HEADER - length < HEADER)
        return 0;
    const uint8_t *second = at + HEADER + length;
    if (!is_head(second, COMMIT, &commit, &commit_crc) || size - 2 * HEADER - length < commit)
        return 0;
    cursor c = {second + HEADER, second + HEADER + commit};
    if (remus_crc32c(c.at, (size_t)commit) != commit_crc
        || crc != (expected->has_checksums ? remus_crc32c(at + HEADER, (size_t)length) : 0))
        return 0;
    if (!take(&c, "\x84", 1) || !text(&c, "position") || !position(&c, &epoch, &after) || !text(&c, "before")
        || !position(&c, &epoch_before, &before) || !text(&c, "stream_bytes") || !number(&c, &stream_bytes)
        || !text(&c, "pages") || !number(&c, &pages) || c.at != c.end)
        return 0;
    remus_progress walked = {0};
    if (remus_stream(at + HEADER, (size_t)length, expected, &walked, found) != REMUS_WHOLE || stream_bytes != length
        || pages != walked.pages || epoch != found->epoch || epoch_before + 1 != epoch
        || memcmp(after, found->after, REMUS_DIGEST) || memcmp(before, found->before, REMUS_DIGEST))
        return 0;
    found->data = HEADER;
    found->end = 2 * HEADER + (size_t)length + (size_t)commit;
    return 1;
}

size_t remus_durable(const uint8_t *at, size_t size, uint64_t *epoch, const uint8_t **digest)
{
    uint64_t length;
    uint32_t crc;
    if (size < HEADER || !is_head(at, ACK, &length, &crc) || length > size - HEADER
        || remus_crc32c(at + HEADER, (size_t)length) != crc)
        return 0;
    cursor c = {at + HEADER, at + HEADER + length};
    if (!take(&c, "\x82", 1) || !text(&c, "level") || !text(&c, "durable") || !text(&c, "position")
        || !position(&c, epoch, digest) || c.at != c.end)
        return 0;
    return HEADER + (size_t)length;
}

/* What is composed. Bounds: the longest of these payloads has two positions of 44 bytes, two numbers of 9 and their keys,
 * which is less than REMUS_FRAMES with two headers. */

static uint8_t *put(uint8_t *at, const void *bytes, size_t size)
{
    memcpy(at, bytes, size);
    return at + size;
}

static uint8_t *put_little(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        *at++ = (uint8_t)(value >> 8 * i);
    return at;
}

static uint8_t *put_text(uint8_t *at, const char *value)
{
    const size_t size = strlen(value);
    *at++ = (uint8_t)(0xa0 | size);
    return put(at, value, size);
}

/* In as few bytes as msgpack has for it, as the library does. */
static uint8_t *put_number(uint8_t *at, uint64_t value)
{
    if (value < 0x80) {
        *at++ = (uint8_t)value;
        return at;
    }
    const int log = value >> 32 ? 3 : value >> 16 ? 2 : value >> 8 ? 1 : 0;
    *at++ = (uint8_t)(0xcc + log);
    for (int i = (1 << log) - 1; i >= 0; i--)
        *at++ = (uint8_t)(value >> 8 * i);
    return at;
}

static uint8_t *put_position(uint8_t *at, uint64_t epoch, const uint8_t *digest)
{
    *at++ = 0x92;
    at = put_number(at, epoch);
    at = put(at, "\xc4\x20", 2);
    return put(at, digest, REMUS_DIGEST);
}

static void put_head(uint8_t *at, uint8_t type, uint32_t length, uint32_t crc)
{
    const uint8_t kind[4] = {type, 0, 0, 0};
    put_little(put_little(put(at, kind, sizeof kind), length), crc);
    put_little(at + 12, remus_crc32c(at, 12));
}

size_t remus_compose_end(uint8_t *out, uint32_t size, uint32_t crc, uint64_t epoch, const uint8_t *after,
                         const uint8_t *before, uint64_t stream_bytes, uint64_t pages)
{
    uint8_t *const commit = out + HEADER, *const payload = commit + HEADER;
    put_head(out, DATA, size, crc);
    uint8_t *at = payload;
    *at++ = 0x84;
    at = put_position(put_text(at, "position"), epoch, after);
    at = put_position(put_text(at, "before"), epoch - 1, before);
    at = put_number(put_text(at, "stream_bytes"), stream_bytes);
    at = put_number(put_text(at, "pages"), pages);
    put_head(commit, COMMIT, (uint32_t)(at - payload), remus_crc32c(payload, (size_t)(at - payload)));
    return (size_t)(at - out);
}

size_t remus_compose_durable(uint8_t *out, uint64_t epoch, const uint8_t *digest)
{
    uint8_t *const payload = out + HEADER;
    uint8_t *at = payload;
    *at++ = 0x82;
    at = put_text(put_text(at, "level"), "durable");
    at = put_position(put_text(at, "position"), epoch, digest);
    put_head(out, ACK, (uint32_t)(at - payload), remus_crc32c(payload, (size_t)(at - payload)));
    return (size_t)(at - out);
}
