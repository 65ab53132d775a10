/* A whole checkpoint in a session's bytes: a DATA frame with the stream's bytes of one checkpoint, and its COMMIT frame
 * (specs/session.md §2, §3.5; specs/stream.md §5, §6, §9).
 *
 * Only the plain form is recognised, the one that our own sender makes: each COMPRESSED_DATA has the pages of the batches
 * since the one before it. Bytes that are anything else, or that break any
 * rule, are none; the parsers in Python then say what they are. Nothing is read past `size`, and nothing written past
 * the rooms that are given. No Python, no allocation, no I/O.
 */
#ifndef REMUS_WALK_H
#define REMUS_WALK_H

#include <stddef.h>
#include <stdint.h>

enum { REMUS_DIGEST = 32 };

/* What is expected of the stream, and where the places of its parts go. */
typedef struct {
    int word;           /* 4 or 8 */
    int has_checksums;  /* whether an uncompressed DATA frame has one */
    uint64_t p2m_size;  /* pages of memory */
    uint64_t most_data; /* of the payload of the DATA frame */
    int64_t *pfns;      /* room for the numbers of the pages … */
    size_t pfn_room;    /* … as many */
    int64_t *chunks;    /* room for the chunks with encoded pages: offset, bytes and pages of each … */
    size_t chunk_room;  /* … as many */
} remus_expected;

/* How far a walk over the stream's bytes has come. All zeros: it has not begun. */
typedef struct {
    size_t place; /* all before it has been walked */
    size_t pages, batches, chunks;
    size_t encoded; /* pages whose chunk has come */
} remus_progress;

typedef struct {
    remus_progress walked;
    size_t data, data_size; /* the stream's bytes: offset and size */
    size_t end;             /* the first byte behind the COMMIT frame */
    size_t tail, record;    /* offsets in the stream's bytes */
    int is_blake3, is_delta, has_time;
    uint64_t epoch, time_ns, memory_bytes; /* memory_bytes: 0 if not stated */
    const uint8_t *before, *after;         /* digests; the epoch before is one less */
    const uint8_t *device_state;
    size_t device_state_size;
} remus_checkpoint;

/* How many bytes of a DATA frame and the COMMIT frame behind it, as far as their headers tell: 0 if the first frame is no
 * plain DATA, or the size of what must be there before more can be told. */
size_t remus_wanted(const uint8_t *at, size_t size, uint64_t most_data);

enum { REMUS_NONE, REMUS_MORE, REMUS_WHOLE };

/* The stream's bytes of a checkpoint in the plain form, as far as they have come: REMUS_WHOLE if they are all there, and
 * nothing behind them; REMUS_MORE if nothing is wrong with them so far; else REMUS_NONE. Call it again with the same
 * bytes, and more: what has been walked is not walked again. */
int remus_stream(const uint8_t *at, size_t size, const remus_expected *expected, remus_progress *walked,
                 remus_checkpoint *found);

/* 1 if the bytes begin with a whole checkpoint in the plain form, else 0. */
int remus_walk(const uint8_t *at, size_t size, const remus_expected *expected, remus_checkpoint *found);

/* The size of the ACK frame for a durable checkpoint that the bytes begin with, in the form that our own backup gives it
 * (session.md §3.6); 0 if they begin with anything else. */
size_t remus_durable(const uint8_t *at, size_t size, uint64_t *epoch, const uint8_t **digest);

/* What is composed is laid out here; each returns how many bytes it takes, at most REMUS_FRAMES. */
enum { REMUS_FRAMES = 256, REMUS_HEADER = 16 };

/* The header of a plain DATA frame (session.md §2.1), and behind it a COMMIT frame (§3.5) for a checkpoint whose stream
 * took `stream_bytes`, of which `size` are the payload of that DATA frame, with this checksum. Epochs below 2^63. */
size_t remus_compose_end(uint8_t *out, uint32_t size, uint32_t crc, uint64_t epoch, const uint8_t *after,
                         const uint8_t *before, uint64_t stream_bytes, uint64_t pages);

/* The ACK frame for a durable checkpoint (§3.6). */
size_t remus_compose_durable(uint8_t *out, uint64_t epoch, const uint8_t *digest);

uint32_t remus_crc32c(const uint8_t *at, size_t size);

#endif
