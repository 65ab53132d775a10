"""BLAKE3 in plain Python, written from its public specification alone (https://github.com/BLAKE3-team/BLAKE3-specs):
the hash of bytes, 32 bytes of it, without a key. Some 1 MB/s: for the plain decoder, and to check faster ones by."""

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
WORD_ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)  # table 2: the permutation after a round
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8  # table 3: the flags
ONES, CHUNK_BYTES, BLOCK_BYTES = 0xFFFFFFFF, 1024, 64
COLUMNS_AND_DIAGONALS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)


def compress(value: tuple[int, ...], block: bytes, counter: int, size: int, flags: int) -> tuple[int, ...]:
    """Section 2.2: the next chaining value, of eight words. block: 64 bytes, padded with zeros; size: without those."""
    state = [*value, *IV[:4], counter & ONES, counter >> 32, size, flags]
    words = [int.from_bytes(block[at : at + 4], "little") for at in range(0, BLOCK_BYTES, 4)]
    for _ in range(7):
        for number, (a, b, c, d) in enumerate(COLUMNS_AND_DIAGONALS):
            p, q, r, s = state[a], state[b], state[c], state[d]
            p = (p + q + words[2 * number]) & ONES
            s ^= p
            s = s >> 16 | s << 16 & ONES
            r = (r + s) & ONES
            q ^= r
            q = q >> 12 | q << 20 & ONES
            p = (p + q + words[2 * number + 1]) & ONES
            s ^= p
            s = s >> 8 | s << 24 & ONES
            r = (r + s) & ONES
            q ^= r
            state[a], state[b], state[c], state[d] = p, q >> 7 | q << 25 & ONES, r, s
        words = [words[at] for at in WORD_ORDER]
    return tuple(state[at] ^ state[at + 8] for at in range(8))


def of_chunk(data: bytes, counter: int, last: int) -> tuple[int, ...]:
    """Section 2.4: the chaining value of a chunk. last: ROOT if it is the only one, else 0"""
    value, ends = IV, range(BLOCK_BYTES, max(len(data), 1) + BLOCK_BYTES, BLOCK_BYTES)
    for end in ends:
        block = data[end - BLOCK_BYTES : end]
        flags = CHUNK_START * (end == ends[0]) | (CHUNK_END | last) * (end == ends[-1])
        value = compress(value, block.ljust(BLOCK_BYTES, b"\0"), counter, len(block), flags)
    return value


def blake3(buffer: bytes | bytearray | memoryview) -> bytes:
    """Section 2.1: chunks are the leaves of a tree whose left side is full."""
    data = bytes(buffer)
    count = max(-(-len(data) // CHUNK_BYTES), 1)

    def of_tree(first: int, stop: int, last: int) -> tuple[int, ...]:
        if stop - first == 1:
            return of_chunk(data[first * CHUNK_BYTES : stop * CHUNK_BYTES], first, last)
        middle = first + (1 << (stop - first - 1).bit_length() - 1)
        halves = of_tree(first, middle, 0) + of_tree(middle, stop, 0)
        return compress(IV, b"".join(word.to_bytes(4, "little") for word in halves), 0, BLOCK_BYTES, PARENT | last)

    return b"".join(word.to_bytes(4, "little") for word in of_tree(0, count, ROOT))
