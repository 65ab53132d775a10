/* What every kernel offers, and the table of those that this build holds.
 *
 * Pointers and lengths come in, a count or an error comes out; nothing here knows Python. The callers have validated:
 * page numbers are within range, and an output has room for n times the largest page of its codec.
 */
#ifndef REMUS_KERNELS_H
#define REMUS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define REMUS_PAGE 4096
#define REMUS_DELTA_MAX (6 + REMUS_PAGE)  /* specs/delta.md: the full form */
#define REMUS_RLE_MAX (REMUS_PAGE + 9)    /* specs/rle.md: all words changed, in nine runs */
#define REMUS_XBZRLE_MAX (3 + REMUS_PAGE) /* specs/xbzrle.md: a raw frame */

#if defined(__x86_64__) && defined(__GNUC__)
#define REMUS_X86 1
#include "cpu.h"
#else
#define REMUS_X86 0
#endif

/* A batch of pages to encode. Page i is pages[index[i]] (or pages[i]), its reference is reference[slots[i]] (or
 * reference[i]); slot -1 has none. The pages may be written by others all the while; nobody writes the rest. */
typedef struct {
    const uint8_t *pages;
    const int64_t *index; /* or NULL */
    uint8_t *reference;   /* written only if update */
    const int64_t *slots; /* or NULL */
    const uint8_t *full;  /* or NULL: pages whose flag is set travel full */
    size_t n;
    int update;
} remus_batch;

/* Returns the bytes written to out. */
typedef size_t (*remus_encode_fn)(const remus_batch *batch, uint8_t *out);

/* Returns the bytes that n pages take, or ~offset of the first fault, which is negative. */
typedef int64_t (*remus_check_fn)(const uint8_t *data, size_t size, size_t n);

/* Applies n pages that check has passed: it neither fails nor reads or writes out of place then. */
typedef void (*remus_apply_fn)(const uint8_t *data, size_t size, uint8_t *pages, const int64_t *index, size_t n);

typedef struct {
    remus_encode_fn encode;
    remus_check_fn check;
    remus_apply_fn apply;
} remus_codec;

/* Pages for a QEMU stream, through a cache of what the receiver holds (specs/qemu-ram.md §10). Page i is
 * pages[index[i]] (or pages[i]); others may write them all the while. */
typedef struct {
    const uint8_t *pages;
    const int64_t *index;   /* or NULL */
    const int64_t *numbers; /* of the pages in their block */
    size_t n;
    int64_t first;  /* the number of the block's first page among all blocks' */
    uint8_t *cache; /* slots pages */
    int64_t *held;  /* the page in each slot, counted among all blocks'; -1: none */
    int64_t *ages;  /* the round in which it was last used */
    size_t slots;   /* a power of two, or 0 */
    int64_t age;    /* of this round */
    int encodes;    /* or only fill the cache */
    int64_t *counts;
} remus_sending;

enum {
    REMUS_SENT_ZERO,
    REMUS_SENT_PLAIN, /* whole, since nothing is encoded */
    REMUS_SENT_MISS,  /* whole, since the cache had not got it */
    REMUS_SENT_SAME,  /* not sent, since the receiver has it */
    REMUS_SENT_XBZRLE,
    REMUS_SENT_OVERFLOW, /* whole, since encoded it would take more */
    REMUS_SENT_BYTES,    /* of the encoded pages, with the three bytes in front of each */
    REMUS_SENT_COUNTS
};

#define REMUS_LIFETIME 2 /* rounds for which a page stays in the cache unused; QEMU's CACHED_PAGE_LIFETIME */
#define REMUS_RECORD_MAX (8 + REMUS_XBZRLE_MAX)
#define REMUS_SLACK 128 /* an encoder may write this far behind what it reports */
enum { RAM_ZERO = 0x02, RAM_PAGE = 0x08, RAM_CONTINUE = 0x20, RAM_XBZRLE = 0x40 };

enum { REMUS_DELTA, REMUS_RLE, REMUS_XBZRLE, REMUS_XBZRLE_FOLD, REMUS_CODECS };

/* One instruction set. */
typedef struct {
    const char *name;
    const char *needs;    /* CPU features, separated by blanks */
    int (*runs)(void);    /* can this machine run it? */
    remus_codec codecs[REMUS_CODECS];
    /* The numbers of the pages that differ, ascending, into found[n]; returns how many. */
    size_t (*dirty)(const uint8_t *memory, const uint8_t *shadow, size_t n, int64_t *found);
    /* The numbers of the pages that are not zeros, likewise. */
    size_t (*filled)(const uint8_t *pages, size_t n, int64_t *found);
    /* How many pages differ, every byte of all of them read: the limit that encoders are measured against. */
    size_t (*compare)(const uint8_t *memory, const uint8_t *shadow, size_t n);
    void (*gather)(const uint8_t *memory, const int64_t *index, size_t n, uint8_t *out);
    void (*scatter)(const uint8_t *pages, const int64_t *index, size_t n, uint8_t *memory);
    /* Records to out, which has room for n of REMUS_RECORD_MAX and REMUS_SLACK; returns how many bytes. */
    size_t (*send)(const remus_sending *sending, uint8_t *out);
} remus_kernel;

extern const remus_kernel *const remus_kernels[]; /* slowest first, then NULL */
extern const size_t remus_max_page[REMUS_CODECS];

#define REMUS_DECLARE(isa)                                                                                       \
    size_t remus_delta_encode_##isa(const remus_batch *, uint8_t *);                                             \
    int64_t remus_delta_check_##isa(const uint8_t *, size_t, size_t);                                            \
    void remus_delta_apply_##isa(const uint8_t *, size_t, uint8_t *, const int64_t *, size_t);                   \
    size_t remus_rle_encode_##isa(const remus_batch *, uint8_t *);                                               \
    void remus_rle_apply_##isa(const uint8_t *, size_t, uint8_t *, const int64_t *, size_t);                     \
    size_t remus_xbzrle_encode_##isa(const remus_batch *, uint8_t *);                                            \
    size_t remus_xbzrle_fold_encode_##isa(const remus_batch *, uint8_t *);                                       \
    void remus_xbzrle_apply_##isa(const uint8_t *, size_t, uint8_t *, const int64_t *, size_t);                  \
    size_t remus_dirty_##isa(const uint8_t *, const uint8_t *, size_t, int64_t *);                               \
    size_t remus_filled_##isa(const uint8_t *, size_t, int64_t *);                                               \
    size_t remus_compare_##isa(const uint8_t *, const uint8_t *, size_t);                                        \
    void remus_gather_##isa(const uint8_t *, const int64_t *, size_t, uint8_t *);                                \
    void remus_scatter_##isa(const uint8_t *, const int64_t *, size_t, uint8_t *);                               \
    size_t remus_xbzrle_send_##isa(const remus_sending *, uint8_t *);

REMUS_DECLARE(scalar)
#if REMUS_X86
REMUS_DECLARE(avx2)
REMUS_DECLARE(avx512)
#endif
/* To walk markers is a chain of loads, which wider registers do not shorten: one function serves all. */
int64_t remus_rle_check(const uint8_t *data, size_t size, size_t n);
int64_t remus_xbzrle_check(const uint8_t *data, size_t size, size_t n);

#endif
