#include "ram.h"

#include <string.h>

enum { ZERO = 0x02, PAGE = 0x08, CONTINUE = 0x20, XBZRLE = 0x40, WORD = 8, FRAME = 3 };

static uint64_t word_at(const uint8_t *data)
{
    uint64_t word = 0;
    for (int i = 0; i < WORD; i++)
        word = word << 8 | data[i];
    return word;
}

/* Bounds: `size - at` is what is left, and every step is compared with it before its bytes are looked at. */
size_t remus_scan_ram(const uint8_t *data, size_t size, const remus_block *block, remus_found *found)
{
    const uint64_t flag_bits = block->page_size - 1;
    uint64_t least = 0; /* the first address that may come */
    size_t at = 0;
    memset(found, 0, sizeof *found);
    for (size_t records = 0; records < block->room && size - at >= WORD; records++) {
        const uint64_t word = word_at(data + at), address = word & ~flag_bits;
        const unsigned flags = (unsigned)(word & flag_bits);
        size_t body = at + WORD, end;
        if (address < least || address >= block->block_size)
            break;
        if (!(flags & CONTINUE)) {
            if (size - body < 1 + block->name_size || data[body] != block->name_size
                || memcmp(data + body + 1, block->name, block->name_size))
                break;
            body += 1 + block->name_size;
        }
        const int64_t number = (int64_t)(address / block->page_size);
        switch (flags & ~(unsigned)CONTINUE) {
        case PAGE:
            if (size - body < block->page_size)
                return at;
            end = body + block->page_size;
            block->full[found->full] = number;
            block->places[found->full++] = (int64_t)body;
            break;
        case ZERO:
            if (size - body < 1)
                return at;
            end = body + 1;
            block->zero[found->zero] = number;
            block->fills[found->zero++] = data[body];
            break;
        case XBZRLE: {
            if (size - body < FRAME)
                return at;
            const size_t length = (size_t)data[body + 1] << 8 | data[body + 2];
            if (data[body] != 1 || length > block->page_size || size - body - FRAME < length)
                return at;
            end = body + FRAME + length;
            block->encoded[found->encoded] = number;
            block->frame_at[found->encoded++] = (int64_t)body;
            memcpy(block->frames + found->frames, data + body, end - body);
            found->frames += end - body;
            break;
        }
        default:
            return at;
        }
        at = end;
        least = address + block->page_size;
    }
    return at;
}
