"""What a stream may claim before memory is allocated for it (specs/stream.md §1.4)."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_BATCH_ENTRIES = 1024
"""PFNs in one batch (specs/stream.md §5)."""
MAX_BUFFER_PAGES = 16_000
"""Pages that a sender compresses at a time: that many full pages still fit `Limits.compressed_chunk_bytes`."""
MAX_WINDOW = 1024
"""Checkpoints on their way to a backup at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Named ceilings, in bytes unless the name says otherwise. `LimitExceeded.limit` names the exceeded one."""

    memory_bytes: int = 64 * GIB
    """p2m_size × 4,096: the address space taken for memory. Pages that never arrive take no memory."""
    checkpoint_bytes: int = 16 * GIB
    """Pages and compressed data staged for one checkpoint after the first, and 256 bytes for each batch and chunk."""
    checkpoint_entries: int = 1 << 26
    """PFN entries with data in one checkpoint."""
    compressed_chunk_bytes: int = 64 * MIB
    """One COMPRESSED_DATA chunk: a page buffer of full pages is 33.6 MiB at most."""
    vcpus: int = 4096
    extended_info_bytes: int = 1 * MIB
    xsave_bytes: int = 64 * KIB
    """The extended state of one virtual CPU."""
    toolstack_bytes: int = 16 * MIB
    hvm_context_bytes: int = 64 * MIB
    device_state_bytes: int = 256 * MIB
    manifest_bytes: int = 16 * MIB
    """The names, dtypes and shapes of the buffers in a memory (specs/manifest.md §1); part of the device state."""
    tmem_bytes: int = 64 * MIB
    """One TMEM chunk, its pages included."""
    record_bytes: int = 128 * MIB
    """One record of a v2 stream; Xen's own ceiling (specs/xen-v2.md §4)."""
    vcpu_record_bytes: int = 1 * MIB
    """The state of one PV virtual CPU in a record of a v2 stream."""
    file_header_bytes: int = 16 * MIB
    """The configuration in front of the stream."""
    ram_blocks: int = 4096
    """Blocks of memory in a QEMU stream, and its live sections (specs/qemu-ram.md §9)."""
    machine_name_bytes: int = 1024
    """The name of the machine in a QEMU stream."""
    description_bytes: int = 16 * MIB
    """The JSON after the device sections of a QEMU stream."""
    multifd_packet_bytes: int = 4 * MIB
    """The data of one packet of a multifd channel: 512 KiB of memory, compressed or not."""
    snapshots: int = 65_536
    """Snapshots in a qcow2 file."""
    snapshot_table_bytes: int = 32 * MIB
    """The first-level table of a snapshot in a qcow2 file, as in QEMU."""
    elf_table_bytes: int = 64 * MIB
    """The tables in front of an ELF core's memory: more than a million segments."""
