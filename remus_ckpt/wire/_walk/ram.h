/* Page records of a QEMU stream's section `ram` (specs/qemu-ram.md §4.2), as long as they are plain: of one block, in
 * ascending order, whole. The parser in Python takes up whatever this stops at, and is what refuses. No Python, no
 * allocation, no I/O. */
#ifndef REMUS_RAM_H
#define REMUS_RAM_H

#include <stddef.h>
#include <stdint.h>

/* The block, and rooms for what is found, each for `room` records. */
typedef struct {
    uint64_t page_size, block_size;
    const uint8_t *name;
    size_t name_size, room;
    int64_t *full, *places;      /* numbers of whole pages, and where their bytes are */
    int64_t *zero;               /* numbers of filled ones … */
    uint8_t *fills;              /* … and with what */
    int64_t *encoded, *frame_at; /* numbers of encoded ones, and where their frames are */
    uint8_t *frames;             /* the frames; as much room as there are bytes */
} remus_block;

typedef struct {
    size_t full, zero, encoded, frames; /* how many, and bytes of frames */
} remus_found;

/* Returns how many bytes the records take; nothing is read past `size`. */
size_t remus_scan_ram(const uint8_t *data, size_t size, const remus_block *block, remus_found *found);

#endif
