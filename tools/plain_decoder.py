#!/usr/bin/env python3
"""A plain decoder of the save stream, written from specs/ alone and in its order: the stream on standard input, one
line of JSON for each event on standard output (conformance.md §2, §3). "§" without a name is of stream.md."""
import bisect, hashlib, json, os, struct, sys
from plain_blake3 import blake3
PAGE, ONES, MIB, OWN = 4096, 0xFFFFFFFF, 1 << 20, b"\x89REMUSck"
LIMITS = dict(memory_bytes=65536 * MIB, checkpoint_bytes=16384 * MIB, checkpoint_entries=64 * MIB, vcpus=4096,  # §1.4
              compressed_chunk_bytes=64 * MIB, extended_info_bytes=MIB, xsave_bytes=65536, toolstack_bytes=16 * MIB,
              hvm_context_bytes=64 * MIB, device_state_bytes=256 * MIB, tmem_bytes=64 * MIB, file_header_bytes=16 * MIB)
FRONTS = {"xl": (b"Xen saved domain, xl format\n \0 \r", "<4I"), "xend": (b"LinuxGuestRecord", ">i"),  # §2: layout, in
          "libvirt": (b"libvirt-xml\n \0 \r", "<2I40x"), "xenserver": (b"XenSavedDomain\n", "")}  # which length is last
BLOCKS = {"vcpu": (5168, 2800), "extv": (0,), "xcnt": (4,)}  # §3.3
CHUNKS = {-1: ("enable_verify_mode", "<", ""), -9: ("last_checkpoint", "<", ""), -13: ("enable_compression", "<", ""),
          -7: ("tsc_info", "<IQII", "mode nsec khz incarnation")}  # §4.7, §4.5
CHUNKS |= {-id: ("parameter", "<IQ", "pad value") for id in (3, 4, 8, 10, 11, 14, 15, 16, 17, 19, 20, 21)}  # §4.3
KEYS = dict(version=int, epoch=int, time_ns=int | None, codec=str, before=list | None, after=list, device_state=bytes)
DIGESTS = {"sha256": lambda data: hashlib.sha256(data).digest(), "blake3": blake3}  # §9.4
SKIPPED = {0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}  # msgpack: bytes behind
class Refused(Exception):
    """offset, section, text, kind (conformance.md §3.3). A cut (§8.2) is an EOFError."""

def need(true, offset, section, text, kind="malformed"):
    if not true:
        raise Refused(offset, section, text, kind)
def limit(name, value, offset): need(value <= LIMITS[name], offset, "§1.4", f"{value} exceeds {name}", "limit")

class Decoder:
    def __init__(self, data, word=None, guest=None, codec=None, strict="0"):
        self.data, self.at, self.begun = memoryview(data), 0, 0  # begun: where the checkpoint begins
        self.word, self.guest, self.codec, self.strict = word, guest, codec, strict == "1"
        self.memory, self.vcpus, self.ours, self.position, self.codecs = {}, [0], None, None, set()
        self.round, self.armed, self.verify, self.last, self.encoded, self.digests = 0, *[False] * 4, DIGESTS
    def take(self, size):
        if size > len(self.data) - self.at: raise EOFError
        self.at += size
        return self.data[self.at - size : self.at]
    def number(self, size=4, signed=False, order="little"):  # §1.1
        return int.from_bytes(self.take(size), order, signed=signed)
    def sized(self, name, *how):  # a length, and so many bytes
        at, length = self.at, self.number(*how)
        need(0 <= length <= LIMITS[name], at, "§1.4", f"{name}: {length}", "limit" if length > 0 else "malformed")
        return self.take(length)
    def say(self, offset, event, **fields):
        print(json.dumps({"offset": offset, "event": event, **fields}))
    def deviation(self, true, offset, name, section):  # permissive.md
        need(not (true and self.strict), offset, section, name)
    def front(self):  # §2
        for kind, (magic, layout) in FRONTS.items():
            if not self.at and magic.startswith(bytes(self.data[: len(magic)])):  # all of it, or a cut one
                fields = struct.unpack(layout, self.take(len(magic) + struct.calcsize(layout))[len(magic) :])
                good = fields[0] == 0x1020304 and fields[1] < 2 if kind == "xl" else kind != "libvirt" or fields[0] == 1
                need(good, 16, "§2", "byte order, flags, version, or Xen v2", "unknown-format")
                need((size := sum(fields[-1:])) >= 0, 16, "§2.2", "a negative length")
                limit("file_header_bytes", size, 16)
                self.say(0, "file_header", kind=kind, bytes=len(self.take(size)))
    def header(self):  # §3, with the detection of §1.2
        self.front()
        at, first, fields, given = self.at, bytes(self.data[self.at : self.at + 16]), {}, self.word and self.guest
        need(not first.startswith(b"\xff" * 8 + b"XENF"), at, "§2.3", "a Xen v2 stream", "unknown-format")
        self.take(16 if len(first) < 16 else 0)  # a cut
        self.word = self.word or (8 if first[4:8] == bytes(4) else 4)
        marked = first[self.word : 2 * self.word] == b"\xff" * self.word
        self.guest = self.guest or ("pv" if marked else "hvm")
        size, chunk = (struct.unpack_from("<i", first, where)[0] for where in (0, self.word))
        sense = 1 <= size <= 0x0FFFFFFF and (self.guest == "pv" or -21 <= chunk <= 1024)
        need(given or sense, at, "§1.2", "not a save stream", "unknown-format")
        self.p2m_size = self.number(self.word)
        need(1 <= self.p2m_size <= 0x0FFFFFFF, at, "§3.1", "p2m_size is out of range")
        limit("memory_bytes", self.p2m_size * PAGE, at)
        if self.guest == "pv": self.pv_header(marked, fields)
        self.say(at, "header", word=self.word, guest=self.guest, p2m_size=self.p2m_size, **fields)
    def pv_header(self, marked, fields):  # §3.2 to §3.4
        info, total = {}, 0
        if marked:
            total, fields["extended_info"] = self.take(self.word) and self.number(), []
            limit("extended_info_bytes", total, self.at - 4)
        end = self.at + total
        while self.at < end:  # §3.3
            at = self.at
            need(end - at >= 8, at, "§3.3", "no room for the head of a block")
            name, size = str(self.take(4), "latin-1"), self.number()
            need(size <= end - self.at and size in BLOCKS.get(name, (size,)), at, "§3.3", f"{name} of {size} bytes")
            self.deviation(name not in BLOCKS, at, "unknown-extended-info", "§3.3")
            info[name] = self.take(size)
            fields["extended_info"].append(name)
        vcpu = len(info.get("vcpu", b"")) or {8: 5168, 4: 2800}[self.word]
        xcnt = int.from_bytes(info.get("xcnt", b"\x10"), "little")
        need(16 <= xcnt <= LIMITS["xsave_bytes"], self.at, "§3.3", "xcnt", "limit" if xcnt > 16 else "malformed")
        self.vcpu_size, self.xsave = vcpu + 128 * ("extv" in info), xcnt - 16 if "xcnt" in info else None  # §7.3
        fields["p2m_frames"] = -(-self.p2m_size // (PAGE // {5168: 8, 2800: 4}[vcpu]))  # §3.4
        self.take(self.word * fields["p2m_frames"])
    def body(self):  # §4
        while True:
            limit("checkpoint_entries", len(self.entries), self.at)
            limit("checkpoint_bytes", self.round and PAGE * len(self.pages) + len(self.joined), self.at)
            at, chunk = self.at, self.number(4, True)
            late = chunk == -13 if self.round else chunk and self.armed
            self.deviation(late, at, "enable-compression-out-of-place", "§6.1")
            if chunk == 0: return self.say(at, "end_of_body")
            if chunk > 0:
                self.batch(at, chunk)
            elif chunk in CHUNKS:
                event, layout, names = CHUNKS[chunk]
                fields = dict(zip(names.split(), struct.unpack(layout, self.take(struct.calcsize(layout)))))
                self.deviation(fields.get("pad"), at, "nonzero-pad", "§4.3")
                self.verify, self.last = self.verify or chunk == -1, self.last or chunk == -9
                self.armed = self.armed or chunk == -13 and self.round == 0  # §6.1
                self.say(at, event, id=chunk, **fields)
            elif chunk == -2:  # §4.2
                highest = self.number(4, True)
                need(0 <= highest < LIMITS["vcpus"], at, "§4.2", f"{highest}", "limit" if highest > 0 else "malformed")
                online = self.number(8 * (highest // 64 + 1))
                self.vcpus = [vcpu for vcpu in range(highest + 1) if online >> vcpu & 1]
                self.say(at, "vcpu_info", highest_id=highest, vcpus=self.vcpus)
            elif chunk == -18:  # §4.6
                self.say(at, "toolstack", bytes=len(self.sized("toolstack_bytes")))
            elif chunk == -12:  # §6.2
                need(self.armed and self.round, at, "§6.2", "COMPRESSED_DATA in a body of format A")
                payload = self.sized("compressed_chunk_bytes", self.word)
                self.deviation(not payload, at, "empty-compressed-data", "§6.2")
                self.joined += payload
                self.chunks.append((at, self.at, len(self.joined), len(self.entries)))
                self.say(at, "compressed_data", bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())
            else:
                need(chunk in (-5, -6), at, "§4.1", f"there is no chunk {chunk}")
                self.tmem(at, *(struct.unpack("<7I", self.take(28)) if chunk == -5 else ()))
    def tmem(self, at, *head):  # §4.4; TMEM_EXTRA, of keys alone, has no head
        need(not head or head[2] == head[6] == ONES, at, "§4.4", "a field that must be all ones is not")
        pools = pages = 0
        while self.number() != ONES:  # 24 bytes: flags, count and UUID, or an object id
            flags, left = struct.unpack("<2I16x", self.take(24)) if head else (0, self.take(28) and 0)
            pools, size = pools + 1, 4 + (PAGE << (flags >> 4 & 15))
            limit("tmem_bytes", self.at - at, at)
            while left and self.take(24) != b"\xff" * 24:
                limit("tmem_bytes", self.at + size - at, at)
                self.take(size)
                pages, left = pages + 1, left - 1
        self.say(at, "tmem" if head else "tmem_extra", pools=pools, pages=pages, keys=pools)
    def batch(self, at, count):  # §5
        need(count <= 1024, at, "§5", f"a batch of {count}")
        entries = struct.unpack(f"<{count}{'Q' if self.word == 8 else 'I'}", self.take(count * self.word))
        self.deviation(max(entries) > ONES, at, "entry-high-bits", "§5.1")
        pfns, types = [entry & 0x0FFFFFFF for entry in entries], [entry >> 28 & 15 for entry in entries]
        need({5, 6, 7}.isdisjoint(types), at, "§5.2", "a type that there is not")
        carried = [pfn for pfn, kind in zip(pfns, types) if kind < 0xD]  # not BROKEN, XALLOC, XTAB
        need(all(pfn < self.p2m_size for pfn in carried), at, "§5.1", "a PFN beyond p2m_size")
        self.entries += [(pfn, not self.verify) for pfn in carried]  # §8.5
        form = "B" if self.armed and self.round else "A"
        self.pages += [self.take(PAGE) for _ in carried] if form == "A" else []  # §5.3, §5.4
        self.say(at, "batch", format=form, entries=count, pages=len(carried), pfns=pfns, types=types)
    def place(self, position):  # where a byte of the joined payloads stands in the stream
        return next((end - edge + position for _, end, edge, _ in self.chunks if position < edge), self.tail_at - 4)
    def check_pages(self, walk):  # §6.2, §6.4: nothing is written
        ends = [0] + walk(self.joined, len(self.entries), lambda *_: None)
        self.deviation(len(self.joined) > ends[-1], self.place(ends[-1]), "surplus-compressed-bytes", "§6.2")
        for at, _, border, known in self.chunks if self.strict else []:
            whole = bisect.bisect_right(ends, border) - 1
            self.deviation(ends[whole] != border, at, "split-page", "§6.2")
            self.deviation(whole > known, at, "compressed-before-batch", "§6.4")
    def tail(self):  # §7; returns the fields of its event, and the state of a record of our own
        if self.guest == "pv":  # §7.3
            at, count = self.at, self.number()
            need(count <= self.p2m_size, at, "§7.3", "more PFNs than memory has")
            self.take(count * self.word)
            for _ in self.vcpus:
                self.take(self.vcpu_size)
                if self.xsave is not None:
                    self.deviation(self.take(8) and self.number(8) != self.xsave, self.at - 16, "xsave-size", "§7.3")
                    self.take(self.xsave)
            self.take(PAGE)
            return {"vcpus": self.vcpus, "unmapped_pfns": count}, None
        pfns, context = struct.unpack("<3Q", self.take(24)), self.sized("hvm_context_bytes")  # §7.1
        at, signature = self.at, bytes(self.take(21))  # §7.2
        to_end, ours = signature == b"QemuDeviceModelRecord", signature == b"RemusDeviceModelState"
        need(to_end or ours or signature == b"DeviceModelRecord0002", at, "§7.2", "an unknown signature")
        self.last, how = self.last or to_end, (4, False, "little")
        if to_end and self.data[self.at : self.at + 1] == b"\n":  # XenServer's
            to_end, signature, how = False, signature + self.take(1), (4, False, "big")
        state = self.take(max(4, len(self.data) - self.at)) if to_end else self.sized("device_state_bytes", *how)
        limit("device_state_bytes", len(state), at)
        qevm, own = state[:4] == b"QEVM", ours and (state[:8] == OWN or not any(pfns) and not context)  # §9.1
        need(qevm or not to_end and (not own or state[:8] == OWN), self.at - len(state), "§7.2", "magic")
        need(self.ours in (None, own and not qevm), at, "§9.1", "a record in some checkpoints only")
        return {"magic_pfns": pfns, "context_bytes": len(context), "signature": signature.decode(),
                "device_state_bytes": len(state)}, state if own and not qevm else None
    def checkpoint(self):  # §8.1: staged, checked, then applied
        self.entries, self.pages, self.joined, self.chunks = [], [], bytearray(), []
        self.body()
        self.tail_at, (tail, own), self.encoded = self.at, self.tail(), self.encoded or bool(self.joined)
        if not self.codec and self.joined:  # §1.2
            self.codec = "delta" if self.joined[:6] in (b"\x9c\xff\0\0\0\0", b"\x9b\xff\0\0\0\0") else "rle"
        self.ours = own is not None
        epoch, size = self.record(own) if self.ours else (self.round, self.p2m_size * PAGE)
        if self.armed and self.round:
            walk = walk_delta if self.codec == "delta" else walk_rle
            self.check_pages(walk)
            walk(self.joined, len(self.entries), self.write)
        self.say(self.tail_at, "tail", end=self.at, **tail)
        for page, data in enumerate(self.pages):
            self.write(page, 0, data)
        self.begun, self.round, self.size = self.at, self.round + 1, size
        self.say(self.at, "checkpoint", epoch=epoch, memory_sha256=self.digest())
    def digest(self):  # of the memory in force
        digest = hashlib.sha256()
        for pfn in range(self.p2m_size if self.round else 0):
            digest.update(self.memory.get(pfn, bytes(PAGE))[: self.size - pfn * PAGE])
        return digest.hexdigest() if self.round else None
    def write(self, page, offset, data):
        if data and self.entries[page][1]:  # §8.5
            self.memory.setdefault(self.entries[page][0], bytearray(PAGE))[offset : offset + len(data)] = data
    def record(self, state):  # §9.2 to §9.4; returns the epoch and the size of memory
        at, covered = self.at - len(state), self.data[self.begun : self.at - 32]
        self.digests = [name for name in self.digests if len(state) > 40 and DIGESTS[name](covered) == state[-32:]]
        need(self.digests, at, "§9.4", "not the digest of the checkpoint")
        inner = Decoder(state[8:-32])
        try:
            fields = inner.msgpack()
        except (EOFError, ValueError, RecursionError):
            fields = None
        need(type(fields) is dict and inner.at == len(inner.data), at, "§9.2", "not just one msgpack map")
        need(type(version := fields.get("version")) is not int or version in (1, 2), at, "§9.2", "", "unknown-format")
        named = fields.get("digest") if version == 2 else "sha256"
        need([named] == self.digests, at, "§9.4" if named in (*DIGESTS,) else "§9.2", "not the digest that it names")
        for key, types in KEYS.items(): need(isinstance(fields.get(key, ()), types), at, "§9.2", f"{key} is missing")
        epoch, before, after = fields["epoch"], fields["before"], fields["after"]
        size = fields.get("memory_bytes", self.p2m_size * PAGE)
        need(type(size) is int and -(-size // PAGE) == self.p2m_size, at, "§9.2", "memory_bytes")
        for pair in [after] if before is None else [after, before]:
            need([type(part) for part in pair] == [int, bytes] and len(pair[1]) == 32, at, "§9.2", "not a position")
        need(after[0] == epoch >= 0 and (before is None or before[0] == epoch - 1), at, "§9.2", "epochs disagree")
        need(self.position in (None, before), at, "§9.3", "this does not follow the record before")
        self.position, self.codecs = after, self.codecs | {fields["codec"]}
        need(not self.encoded or self.codecs == {self.codec}, at, "§9.2", "codec is not that of the data")
        return epoch, size
    def msgpack(self):  # one value; of a map the text keys
        tag, sized = self.number(1), lambda first, one=1: self.number(one << tag - first, order="big")
        if tag < 0x80 or tag > 0xDF or tag == 0xC0:
            return None if tag == 0xC0 else tag - (tag & 0x80) * 2
        if tag in SKIPPED: return self.take(SKIPPED[tag])  # of the keys that are not known here
        if 0xC4 <= tag <= 0xC9: return bytes(self.take(sized(0xC4))) if tag < 0xC7 else self.take(sized(0xC7) + 1)
        if 0xCC <= tag <= 0xD3: return self.number(1 << (tag & 3), tag > 0xCF, "big")
        if 0xA0 <= tag <= 0xDB: return str(self.take(tag & 31 if tag < 0xC0 else sized(0xD9)), "utf-8")
        count = tag & 15 if tag < 0xA0 else sized(tag & 0xFE, 2)
        if tag in range(0x90, 0xA0) or tag in (0xDC, 0xDD): return [self.msgpack() for _ in range(count)]
        pairs = [(self.msgpack(), self.msgpack()) for _ in range(count)]
        return {key: value for key, value in pairs if type(key) is str}

def walk_delta(data, count, write):  # delta.md §2, §4
    at, ends, last = 0, [], None  # last: the offset before, None where a marker must stand
    while at < len(data) and count:
        need(len(data) - at >= 6, at, "delta.md §4.1", "a cut record")
        offset, value = struct.unpack_from("<hI", data, at)
        if offset in (-100, -101):
            need(value == 0, at, "delta.md §2.2", "a marker with a value")
            if len(ends) == count: break
            size = PAGE if offset == -101 else 0
            need(len(data) - at - 6 >= size, at, "delta.md §4.1", "a cut page")
            write(len(ends), 0, data[at + 6 : at + 6 + size])
            at, last = at + 6 + size, None if size else -4
            ends.append(at)
        else:
            need(last is not None, at, "delta.md §4.2", "a delta where a page must open")
            need(last < offset <= 4092 and offset >= 0 and offset % 4 == 0, at, "delta.md §2.1", "offset")
            write(len(ends) - 1, offset, data[at + 2 : at + 6])
            at, last = at + 6, offset
            ends[-1] = at
    need(len(ends) == count, at, "delta.md §4.2", "fewer pages than entries")
    return ends

def walk_rle(data, count, write):  # rle.md §2, §4
    at, ends, words = 0, [], 0
    while len(ends) < count:
        need(at < len(data), at, "rle.md §4.3", "the data end before the pages")
        kind, run = data[at] & 0x80, data[at] & 0x7F
        need(run or not words, at, "rle.md §2.2", "a run of no words")
        size, run = (0 if run else PAGE) if kind else 4 * run, run or 1024
        need(words + run <= 1024, at, "rle.md §4.2", "a run past the page")
        need(len(data) - at - 1 >= size, at, "rle.md §4.3", "a cut run or page")
        write(len(ends), 4 * words, data[at + 1 : at + 1 + size])
        words, at = (words + run) % 1024, at + 1 + size
        ends += [] if words else [at]
    return ends

if __name__ == "__main__":
    word, *given = (os.environ.get("REMUS_" + name) for name in ("WORD", "GUEST", "CODEC", "STRICT"))
    decoder = Decoder(sys.stdin.buffer.read(), int(word or 0), *given)
    try:
        decoder.header()
        while not decoder.last:  # a cut one raises EOFError
            decoder.checkpoint()
    except EOFError: pass
    except Refused as refused:
        at, section, text, kind = refused.args  # a codec counts in the joined payloads
        at = at if section[0] == "§" else decoder.place(at)
        decoder.say(at, "error", section=section, text=text, kind=kind, memory_sha256=decoder.digest())
        sys.exit(21 if kind == "unknown-format" else 20)
    left = len(decoder.data) - decoder.begun  # §8.2, §8.4
    whole, held = decoder.round > 0 and not left, decoder.digest()
    decoder.say(len(decoder.data), "end", complete=whole, trailing_bytes=left, memory_sha256=held)
