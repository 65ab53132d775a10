# The save stream of specs/stream.md, in Kaitai Struct. How to compile and use it, and what it cannot say: README.md.
#
# Kaitai knows no variables. What a later part of the stream hangs on is handed on in `course`: behind every chunk and
# every tail stands one, of no bytes, made from the one before it and from what was just read.
# A field of size 0 with `valid` is a rule that belongs to no single field.
meta:
  id: remus_stream
  title: Xen legacy save stream with Remus checkpoints
  license: Apache-2.0
  ks-version: '0.11'
  endian: le

doc: |
  A file header, a header, and checkpoints, each of them a body of chunks and a tail.
  The stream does not say how it is to be read: `word` and `guest` are given.
doc-ref: specs/stream.md §1

params:
  - id: word
    type: u1
    doc: Bytes of the toolstack's `unsigned long`, 8 or 4.
    doc-ref: specs/stream.md §1.2
  - id: guest
    type: u1
    enum: guest
    doc-ref: specs/stream.md §1.2

seq:
  - id: rule_dialect
    size: 0
    valid:
      expr: (word == 8 or word == 4) and (guest == guest::hvm or guest == guest::pv)
    doc-ref: specs/stream.md §1.2
  - id: file_header
    type:
      switch-on: front
      cases:
        '"Xen saved do"': xl_header
        '"LinuxGuestRe"': xend_header
        '"libvirt-xml\n"': libvirt_header
        '"XenSavedDoma"': xenserver_header
    if: has_file_header
    doc-ref: specs/stream.md §2
  - id: header
    type: header(_io.pos)
    doc-ref: specs/stream.md §3
  - id: start
    type: course(false, false, false, 0, [0x01], 0, _io.pos)
    doc: Where nothing was said, virtual CPU 0 alone is online.
    doc-ref: specs/stream.md §4.2
  - id: checkpoints
    type: 'checkpoint(_index, _index == 0 ? start : checkpoints[_index - 1].after)'
    repeat: until
    repeat-until: _.after.is_last or _io.eof
    doc-ref: specs/stream.md §8
  - id: trailing
    size-eos: true
    doc: Behind the last checkpoint; not read.
    doc-ref: specs/stream.md §8.4

instances:
  front:
    pos: 0
    size: '_io.size < 12 ? _io.size : 12'
    type: str
    encoding: ISO-8859-1
    doc: What a file header is recognised by.
    doc-ref: specs/stream.md §2
  has_file_header:
    value: >-
      front == "Xen saved do" or front == "LinuxGuestRe" or front == "libvirt-xml\n" or front == "XenSavedDoma"
    doc-ref: specs/stream.md §2
  all_ones:
    value: 'word == 8 ? 0xffffffffffffffff : 0xffffffff'
    doc: The mark of extended info.
    doc-ref: specs/stream.md §3.2

types:

  # What the next part hangs on

  course:
    doc: The state of the stream at one place. It has no bytes.
    doc-ref: specs/stream.md §10
    params:
      - id: is_armed
        type: bool
        doc: Round 0 has had its ENABLE_COMPRESSION.
        doc-ref: specs/stream.md §6.1
      - id: is_last
        type: bool
        doc: LAST_CHECKPOINT has come, or a tail that reaches to the end of the stream.
        doc-ref: specs/stream.md §8.4
      - id: is_own
        type: bool
        doc: The tail before has a record of ours.
        doc-ref: specs/stream.md §9.1
      - id: highest_vcpu
        type: s4
        doc: As the last VCPU_INFO says.
        doc-ref: specs/stream.md §4.2
      - id: vcpu_map
        type: bytes
        doc: As the last VCPU_INFO says.
        doc-ref: specs/stream.md §4.2
      - id: announced_pages
        type: u4
        doc: Entries with data so far in this body.
        doc-ref: specs/stream.md §6.2
      - id: offset
        type: u8
        doc: The first byte behind what was read.
        doc-ref: specs/stream.md §8.1

  announced:
    doc: What the extended info so far says of the layout of a PV guest. It has no bytes.
    doc-ref: specs/stream.md §3.3
    params:
      - id: guest_word
        type: u1
        doc: As the size of `vcpu` says.
        doc-ref: specs/stream.md §3.3
      - id: has_extended_context
        type: bool
        doc: Whether `extv` stands there.
        doc-ref: specs/stream.md §3.3
      - id: len_xsave
        type: u4
        doc: What `xcnt` says; 0 where it is missing.
        doc-ref: specs/stream.md §3.3

  # What may stand in front

  xl_header:
    doc-ref: specs/stream.md §2.1
    seq:
      - id: magic
        contents: ["Xen saved domain, xl format", 0x0a, 0x20, 0x00, 0x20, 0x0d]
        doc-ref: specs/stream.md §2.1
      - id: byte_order
        type: u4
        valid: 0x01020304
        doc-ref: specs/stream.md §2.1
      - id: mandatory_flags
        type: u4
        valid:
          max: 1
        doc: Bit 0 says that the configuration is JSON; a stream with bit 1 is Xen v2.
        doc-ref: specs/stream.md §2.1, §2.3
      - id: optional_flags
        type: u4
        doc-ref: specs/stream.md §2.1
      - id: len_data
        type: u4
        doc-ref: specs/stream.md §2.1
      - id: data
        size: len_data
        doc-ref: specs/stream.md §2.1

  xend_header:
    doc-ref: specs/stream.md §2.2
    seq:
      - id: magic
        contents: LinuxGuestRecord
        doc-ref: specs/stream.md §2.2
      - id: len_data
        type: s4be
        valid:
          min: 0
        doc-ref: specs/stream.md §2.2
      - id: data
        size: len_data
        doc-ref: specs/stream.md §2.2

  libvirt_header:
    doc-ref: specs/stream.md §2.4
    seq:
      - id: magic
        contents: ["libvirt-xml", 0x0a, 0x20, 0x00, 0x20, 0x0d]
        doc-ref: specs/stream.md §2.4
      - id: version
        type: u4
        valid: 1
        doc: A stream with version 2 is Xen v2.
        doc-ref: specs/stream.md §2.4, §2.3
      - id: len_data
        type: u4
        doc-ref: specs/stream.md §2.4
      - id: unused
        size: 40
        doc-ref: specs/stream.md §2.4
      - id: data
        size: len_data
        doc-ref: specs/stream.md §2.4

  xenserver_header:
    doc-ref: specs/stream.md §2.5
    seq:
      - id: magic
        contents: ["XenSavedDomain", 0x0a]
        doc-ref: specs/stream.md §2.5

  # Header

  word:
    doc: A field of the toolstack's word.
    doc-ref: specs/stream.md §1.1
    seq:
      - id: value
        type:
          switch-on: _root.word
          cases:
            8: u8
            4: u4
        doc-ref: specs/stream.md §1.1

  header:
    doc-ref: specs/stream.md §3
    params:
      - id: offset
        type: u8
        doc-ref: specs/stream.md §3
    seq:
      - id: p2m_size
        type: word
        doc-ref: specs/stream.md §3.1
      - id: rule_p2m_size
        size: 0
        valid:
          expr: p2m_size.value >= 1 and p2m_size.value <= 0x0fffffff
        doc: It refuses Xen v2 behind a file header as well, whose first word is all ones.
        doc-ref: specs/stream.md §3.1, §2.3
      - id: pv
        type: pv_header(p2m_size.value)
        if: _root.guest == guest::pv
        doc-ref: specs/stream.md §3.2

  pv_header:
    doc-ref: specs/stream.md §3.2
    params:
      - id: p2m_size
        type: u8
        doc-ref: specs/stream.md §3.1
    seq:
      - id: unannounced
        type: announced(_root.word, false, 0)
        doc: What holds without extended info.
        doc-ref: specs/stream.md §3.4, §7.3
      - id: mark
        type: word
        doc: All ones, or the first entry of the list.
        doc-ref: specs/stream.md §3.2
      - id: len_extended_info
        type: u4
        if: has_extended_info
        doc-ref: specs/stream.md §3.2
      - id: extended_info
        type: extended_info(unannounced)
        size: len_extended_info
        if: has_extended_info
        doc-ref: specs/stream.md §3.3
      - id: first_behind_info
        type: word
        if: has_extended_info
        doc-ref: specs/stream.md §3.2
      - id: rest
        type: word
        repeat: expr
        repeat-expr: num_frames - 1
        doc-ref: specs/stream.md §3.4
    instances:
      has_extended_info:
        value: mark.value == _root.all_ones
        doc-ref: specs/stream.md §3.2
      announced:
        value: >-
          has_extended_info and len_extended_info > 0 ? extended_info.blocks.last.after : unannounced
        doc-ref: specs/stream.md §3.3
      first:
        value: 'has_extended_info ? first_behind_info.value : mark.value'
        doc: The first entry of the list; the others are in `rest`.
        doc-ref: specs/stream.md §3.4
      frame_entries:
        value: 4096 / announced.guest_word
        doc: Entries in a frame of the guest's p2m.
        doc-ref: specs/stream.md §3.4
      num_frames:
        value: (p2m_size + frame_entries - 1) / frame_entries
        doc-ref: specs/stream.md §3.4
      len_vcpu_context:
        value: 'announced.guest_word == 8 ? 5168 : 2800'
        doc-ref: specs/stream.md §7.3

  extended_info:
    doc-ref: specs/stream.md §3.3
    params:
      - id: start
        type: announced
        doc-ref: specs/stream.md §3.3
    seq:
      - id: blocks
        type: 'extended_info_block(_index == 0 ? start : blocks[_index - 1].after)'
        repeat: eos
        doc-ref: specs/stream.md §3.3

  extended_info_block:
    doc-ref: specs/stream.md §3.3
    params:
      - id: before
        type: announced
        doc-ref: specs/stream.md §3.3
    seq:
      - id: name
        size: 4
        type: str
        encoding: ISO-8859-1
        doc-ref: specs/stream.md §3.3
      - id: len_data
        type: u4
        valid:
          expr: '(is_vcpu ? _ == 5168 or _ == 2800 : true) and (is_extv ? _ == 0 : true) and (is_xcnt ? _ == 4 : true)'
        doc-ref: specs/stream.md §3.3
      - id: data
        size: len_data
        type:
          switch-on: name
          cases:
            '"xcnt"': xcnt
            _: block_data
        doc-ref: specs/stream.md §3.3
      - id: after
        type: announced(guest_word, before.has_extended_context or is_extv, len_xsave)
        doc-ref: specs/stream.md §3.3
    instances:
      is_vcpu:
        value: name == "vcpu"
        doc-ref: specs/stream.md §3.3
      is_extv:
        value: name == "extv"
        doc-ref: specs/stream.md §3.3
      is_xcnt:
        value: name == "xcnt"
        doc-ref: specs/stream.md §3.3
      guest_word:
        value: 'is_vcpu ? (len_data == 5168 ? 8 : 4) : before.guest_word'
        doc-ref: specs/stream.md §3.3
      len_xsave:
        value: 'is_xcnt ? data.as<xcnt>.value : before.len_xsave'
        doc-ref: specs/stream.md §3.3

  block_data:
    doc-ref: specs/stream.md §3.3
    seq:
      - id: bytes
        size-eos: true
        doc-ref: specs/stream.md §3.3

  xcnt:
    doc-ref: specs/stream.md §3.3
    seq:
      - id: value
        type: u4
        valid:
          min: 16
        doc-ref: specs/stream.md §3.3

  # Body

  checkpoint:
    doc: A body and its tail.
    doc-ref: specs/stream.md §8.1
    params:
      - id: number
        type: u4
        doc: Its round, from 0.
        doc-ref: specs/stream.md §1.3
      - id: before
        type: course
        doc-ref: specs/stream.md §10
    seq:
      - id: chunks
        type: 'chunk(number, _index, _index == 0 ? before : chunks[_index - 1].after)'
        repeat: until
        repeat-until: _.id == 0
        doc-ref: specs/stream.md §4
      - id: tail
        type:
          switch-on: _root.guest
          cases:
            'guest::hvm': tail_hvm
            'guest::pv': tail_pv(chunks.last.after)
        doc-ref: specs/stream.md §7
      - id: rule_own_throughout
        size: 0
        valid:
          expr: number == 0 or is_own == before.is_own
        doc-ref: specs/stream.md §9.1, §9.2
      - id: after
        type: >-
          course(chunks.last.after.is_armed, is_last, is_own, chunks.last.after.highest_vcpu,
          chunks.last.after.vcpu_map, chunks.last.after.announced_pages, _io.pos)
        doc-ref: specs/stream.md §10
    instances:
      is_own:
        value: '_root.guest == guest::hvm ? tail.as<tail_hvm>.is_own : false'
        doc-ref: specs/stream.md §9.1
      is_last:
        value: 'chunks.last.after.is_last or (_root.guest == guest::hvm ? tail.as<tail_hvm>.is_endless : false)'
        doc-ref: specs/stream.md §7.2, §8.4

  chunk:
    doc-ref: specs/stream.md §4.1
    params:
      - id: round
        type: u4
        doc-ref: specs/stream.md §1.3
      - id: number
        type: u4
        doc: Its place in the body, from 0.
        doc-ref: specs/stream.md §4.1
      - id: before
        type: course
        doc-ref: specs/stream.md §10
    seq:
      - id: id
        type: s4
        valid:
          min: -21
          max: 1024
        doc: A count of entries, 0 for the end of the body, or one of `chunk_id`.
        doc-ref: specs/stream.md §4.1, §5
      - id: batch
        type: batch(id, not is_compressed)
        if: id > 0
        doc-ref: specs/stream.md §5
      - id: rule_compressed_data
        size: 0
        if: id == chunk_id::compressed_data.to_i
        valid:
          expr: is_compressed
        doc-ref: specs/stream.md §6.2
      - id: payload
        type:
          switch-on: id
          cases:
            'chunk_id::enable_verify_mode.to_i': flag
            'chunk_id::vcpu_info.to_i': vcpu_info
            'chunk_id::hvm_ident_pt.to_i': hvm_param
            'chunk_id::hvm_vm86_tss.to_i': hvm_param
            'chunk_id::tmem.to_i': tmem
            'chunk_id::tmem_extra.to_i': tmem_extra
            'chunk_id::tsc_info.to_i': tsc_info
            'chunk_id::hvm_console_pfn.to_i': hvm_param
            'chunk_id::last_checkpoint.to_i': flag
            'chunk_id::hvm_acpi_ioports_location.to_i': hvm_param
            'chunk_id::hvm_viridian.to_i': hvm_param
            'chunk_id::compressed_data.to_i': compressed_data
            'chunk_id::enable_compression.to_i': flag
            'chunk_id::hvm_generation_id_addr.to_i': hvm_param
            'chunk_id::hvm_paging_ring_pfn.to_i': hvm_param
            'chunk_id::hvm_access_ring_pfn.to_i': hvm_param
            'chunk_id::hvm_sharing_ring_pfn.to_i': hvm_param
            'chunk_id::toolstack.to_i': toolstack
            'chunk_id::hvm_ioreq_server_pfn.to_i': hvm_param
            'chunk_id::hvm_nr_ioreq_server_pages.to_i': hvm_param
            'chunk_id::hvm_x87_fip_width.to_i': hvm_param
        if: id < 0
        doc-ref: specs/stream.md §4.1
      - id: after
        type: >-
          course(is_armed, before.is_last or id == chunk_id::last_checkpoint.to_i, before.is_own,
          highest_vcpu, vcpu_map, announced_pages, _io.pos)
        doc-ref: specs/stream.md §10
    instances:
      offset:
        value: before.offset
        doc: Where its id stands.
        doc-ref: specs/stream.md §4.1
      is_compressed:
        value: round > 0 and before.is_armed
        doc: Whether the body is in format B.
        doc-ref: specs/stream.md §6.1
      is_armed:
        value: before.is_armed or (round == 0 and id == chunk_id::enable_compression.to_i)
        doc: In a later round ENABLE_COMPRESSION changes nothing.
        doc-ref: specs/stream.md §6.1
      highest_vcpu:
        value: 'id == chunk_id::vcpu_info.to_i ? payload.as<vcpu_info>.highest : before.highest_vcpu'
        doc-ref: specs/stream.md §4.2
      vcpu_map:
        value: 'id == chunk_id::vcpu_info.to_i ? payload.as<vcpu_info>.map : before.vcpu_map'
        doc-ref: specs/stream.md §4.2
      announced_pages:
        value: '(number == 0 ? 0 : before.announced_pages) + (id > 0 ? batch.num_pages : 0)'
        doc-ref: specs/stream.md §6.2

  flag:
    doc: Nothing behind the id.
    doc-ref: specs/stream.md §4.7

  vcpu_info:
    doc-ref: specs/stream.md §4.2
    seq:
      - id: highest
        type: s4
        valid:
          min: 0
        doc-ref: specs/stream.md §4.2
      - id: map
        size: 8 * (highest / 64 + 1)
        doc: As many u64. They are little-endian, so that virtual CPU i is bit i % 8 of byte i / 8.
        doc-ref: specs/stream.md §4.2

  hvm_param:
    doc-ref: specs/stream.md §4.3
    seq:
      - id: pad
        type: u4
        doc-ref: specs/stream.md §4.3
      - id: value
        type: u8
        doc-ref: specs/stream.md §4.3

  tsc_info:
    doc-ref: specs/stream.md §4.5
    seq:
      - id: mode
        type: u4
        doc-ref: specs/stream.md §4.5
      - id: nsec
        type: u8
        doc-ref: specs/stream.md §4.5
      - id: khz
        type: u4
        doc-ref: specs/stream.md §4.5
      - id: incarnation
        type: u4
        doc-ref: specs/stream.md §4.5

  toolstack:
    doc-ref: specs/stream.md §4.6
    seq:
      - id: len_data
        type: u4
        doc-ref: specs/stream.md §4.6
      - id: data
        size: len_data
        doc-ref: specs/stream.md §4.6

  compressed_data:
    doc-ref: specs/stream.md §6.2
    seq:
      - id: len_data
        type: word
        doc-ref: specs/stream.md §6.2
      - id: data
        size: len_data.value
        doc: A part of the body's compressed pages; its borders mean nothing.
        doc-ref: specs/stream.md §6.2

  tmem:
    doc-ref: specs/stream.md §4.4
    seq:
      - id: version
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: max_pools
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: ones
        type: u4
        valid: '0xffffffff'
        doc-ref: specs/stream.md §4.4
      - id: flags
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: weight
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: cap
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: ones_again
        type: u4
        valid: '0xffffffff'
        doc-ref: specs/stream.md §4.4
      - id: pools
        type: tmem_pool
        repeat: until
        repeat-until: _.is_end
        doc: The last one is the mark of the end.
        doc-ref: specs/stream.md §4.4

  tmem_pool:
    doc-ref: specs/stream.md §4.4
    seq:
      - id: id
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: flags
        type: u4
        if: not is_end
        doc-ref: specs/stream.md §4.4
      - id: num_announced
        type: u4
        if: not is_end
        doc-ref: specs/stream.md §4.4
      - id: uuid
        type: u8
        repeat: expr
        repeat-expr: 2
        if: not is_end
        doc-ref: specs/stream.md §4.4
      - id: pages
        type: tmem_page(_index + 1, len_page)
        repeat: until
        repeat-until: _.is_end or _.count == num_announced
        if: not is_end and num_announced > 0
        doc: Where there are fewer than announced, the last one is the mark of the end.
        doc-ref: specs/stream.md §4.4
    instances:
      is_end:
        value: id == 0xffffffff
        doc-ref: specs/stream.md §4.4
      len_page:
        value: 4096 << (flags >> 4 & 0xf)
        doc-ref: specs/stream.md §4.4

  tmem_page:
    doc-ref: specs/stream.md §4.4
    params:
      - id: count
        type: u4
        doc: Pages up to this one.
        doc-ref: specs/stream.md §4.4
      - id: len_data
        type: u4
        doc-ref: specs/stream.md §4.4
    seq:
      - id: object_id
        type: u8
        repeat: expr
        repeat-expr: 3
        doc-ref: specs/stream.md §4.4
      - id: index
        type: u4
        if: not is_end
        doc-ref: specs/stream.md §4.4
      - id: data
        size: len_data
        if: not is_end
        doc-ref: specs/stream.md §4.4
    instances:
      is_end:
        value: >-
          object_id[0] == 0xffffffffffffffff and object_id[1] == 0xffffffffffffffff and
          object_id[2] == 0xffffffffffffffff
        doc-ref: specs/stream.md §4.4

  tmem_extra:
    doc-ref: specs/stream.md §4.4
    seq:
      - id: keys
        type: tmem_key
        repeat: until
        repeat-until: _.is_end
        doc: The last one is the mark of the end.
        doc-ref: specs/stream.md §4.4

  tmem_key:
    doc-ref: specs/stream.md §4.4
    seq:
      - id: pool_id
        type: u4
        doc-ref: specs/stream.md §4.4
      - id: object_id
        type: u8
        repeat: expr
        repeat-expr: 3
        if: not is_end
        doc-ref: specs/stream.md §4.4
      - id: index
        type: u4
        if: not is_end
        doc-ref: specs/stream.md §4.4
    instances:
      is_end:
        value: pool_id == 0xffffffff
        doc-ref: specs/stream.md §4.4

  # Page batches

  batch:
    doc-ref: specs/stream.md §5
    params:
      - id: num_entries
        type: s4
        doc-ref: specs/stream.md §5
      - id: has_pages
        type: bool
        doc: Whether the pages follow (format A) or come compressed (format B).
        doc-ref: specs/stream.md §5.3, §5.4
    seq:
      - id: entries
        type: 'entry(_index == 0 ? 0 : entries[_index - 1].pages_after)'
        repeat: expr
        repeat-expr: num_entries
        doc-ref: specs/stream.md §5.1
      - id: pages
        size: 4096
        repeat: expr
        repeat-expr: num_pages
        if: has_pages
        doc: One for each entry that carries data, in the order of the entries.
        doc-ref: specs/stream.md §5.3
    instances:
      num_pages:
        value: entries.last.pages_after
        doc: Entries that carry data.
        doc-ref: specs/stream.md §5

  entry:
    doc-ref: specs/stream.md §5.1
    params:
      - id: page_number
        type: u4
        doc: Entries with data before it, and so the number of its page in the batch if it carries data.
        doc-ref: specs/stream.md §5.3
    seq:
      - id: bits
        type: word
        doc-ref: specs/stream.md §5.1
      - id: rule_page_type
        size: 0
        valid:
          expr: page_type < 5 or page_type > 7
        doc-ref: specs/stream.md §5.2
      - id: rule_pfn
        size: 0
        valid:
          expr: not has_data or pfn < _root.header.p2m_size.value
        doc-ref: specs/stream.md §5.1
    instances:
      pfn:
        value: bits.value & 0x0fffffff
        doc-ref: specs/stream.md §5.1
      page_type:
        value: bits.value >> 28 & 0xf
        doc: One of the enum of that name.
        doc-ref: specs/stream.md §5.2
      has_data:
        value: page_type < page_type::broken.to_i
        doc-ref: specs/stream.md §5.2
      pages_after:
        value: 'page_number + (has_data ? 1 : 0)'
        doc-ref: specs/stream.md §5.3

  # Tail

  tail_hvm:
    doc-ref: specs/stream.md §7.1
    seq:
      - id: magic_pfns
        type: u8
        repeat: expr
        repeat-expr: 3
        doc: ioreq, buffered ioreq, store.
        doc-ref: specs/stream.md §7.1
      - id: len_context
        type: u4
        doc-ref: specs/stream.md §7.1
      - id: context
        size: len_context
        doc-ref: specs/stream.md §7.1
      - id: signature
        size: 21
        type: str
        encoding: ISO-8859-1
        valid:
          any-of:
            - '"QemuDeviceModelRecord"'
            - '"DeviceModelRecord0002"'
            - '"RemusDeviceModelState"'
        doc-ref: specs/stream.md §7.2
      - id: record
        type:
          switch-on: signature
          cases:
            '"QemuDeviceModelRecord"': endless_record
            '"DeviceModelRecord0002"': xl_record
            '"RemusDeviceModelState"': remus_record(has_own_shape)
        doc-ref: specs/stream.md §7.2
    instances:
      has_own_shape:
        value: magic_pfns[0] == 0 and magic_pfns[1] == 0 and magic_pfns[2] == 0 and len_context == 0
        doc-ref: specs/stream.md §9.1
      is_endless:
        value: signature == "QemuDeviceModelRecord"
        doc-ref: specs/stream.md §7.2
      is_own:
        value: 'signature == "RemusDeviceModelState" ? record.as<remus_record>.body.is_own : false'
        doc-ref: specs/stream.md §9.2

  endless_record:
    doc: The state of the device model reaches to the end of the stream; XenServer's is as long as it says.
    doc-ref: specs/stream.md §7.2
    seq:
      - id: line_feed
        size: 1
        if: is_xenserver
        doc-ref: specs/stream.md §7.2
      - id: len_data
        type: u4be
        if: is_xenserver
        doc-ref: specs/stream.md §7.2
      - id: data
        size: len_data
        if: is_xenserver
        doc-ref: specs/stream.md §7.2
      - id: magic
        contents: QEVM
        if: not is_xenserver
        doc-ref: specs/stream.md §7.2
      - id: rest
        size-eos: true
        if: not is_xenserver
        doc-ref: specs/stream.md §7.2
    instances:
      first:
        pos: _io.pos
        type: u1
        doc: The first byte, looked at before it is read.
        doc-ref: specs/stream.md §7.2
      is_xenserver:
        value: first == 0x0a
        doc-ref: specs/stream.md §7.2

  xl_record:
    doc-ref: specs/stream.md §7.2
    seq:
      - id: len_data
        type: u4
        doc-ref: specs/stream.md §7.2
      - id: data
        size: len_data
        doc-ref: specs/stream.md §7.2

  remus_record:
    doc-ref: specs/stream.md §7.2
    params:
      - id: has_own_shape
        type: bool
        doc-ref: specs/stream.md §9.1
    seq:
      - id: len_body
        type: u4
        doc-ref: specs/stream.md §7.2
      - id: body
        type: remus_record_body(has_own_shape)
        size: len_body
        doc-ref: specs/stream.md §9.2

  remus_record_body:
    doc: Xen's, or a record of ours.
    doc-ref: specs/stream.md §9.2
    params:
      - id: has_own_shape
        type: bool
        doc: In a tail that looks like ours only QEMU's state is Xen's.
        doc-ref: specs/stream.md §9.1
    seq:
      - id: xen_state
        size-eos: true
        if: not is_own
        doc-ref: specs/stream.md §7.2
      - id: own
        type: own_record
        if: is_own
        doc-ref: specs/stream.md §9.2
    instances:
      front:
        pos: 0
        size: '_io.size < 8 ? _io.size : 8'
        type: str
        encoding: ISO-8859-1
        doc-ref: specs/stream.md §9.2
      is_qemu:
        value: 'front.length >= 4 and front.substring(0, 4) == "QEVM"'
        doc-ref: specs/stream.md §9.2
      is_own:
        value: 'front == "\u0089REMUSck" or (has_own_shape and not is_qemu)'
        doc-ref: specs/stream.md §9.2

  own_record:
    doc-ref: specs/stream.md §9.2
    seq:
      - id: magic
        contents: [0x89, "REMUSck"]
        doc-ref: specs/stream.md §9.2
      - id: map
        size: _io.size - 40
        doc: One msgpack map.
        doc-ref: specs/stream.md §9.2
      - id: digest
        size: 32
        doc: SHA-256 or BLAKE3 of the checkpoint's bytes before it.
        doc-ref: specs/stream.md §9.4

  tail_pv:
    doc-ref: specs/stream.md §7.3
    params:
      - id: before
        type: course
        doc: Has the map of virtual CPUs that this same checkpoint stated.
        doc-ref: specs/stream.md §4.2
    seq:
      - id: num_unmapped
        type: u4
        valid:
          max: _root.header.p2m_size.value
        doc-ref: specs/stream.md §7.3
      - id: unmapped
        type: word
        repeat: expr
        repeat-expr: num_unmapped
        doc-ref: specs/stream.md §7.3
      - id: vcpus
        type: vcpu_place(_index, before.vcpu_map[_index / 8])
        repeat: expr
        repeat-expr: before.highest_vcpu + 1
        doc: A place for each virtual CPU; only those that are online have bytes.
        doc-ref: specs/stream.md §7.3
      - id: shared_info
        size: 4096
        doc-ref: specs/stream.md §7.3

  vcpu_place:
    doc-ref: specs/stream.md §7.3
    params:
      - id: number
        type: u4
        doc-ref: specs/stream.md §7.3
      - id: map_byte
        type: u1
        doc: The byte of the map that has its bit.
        doc-ref: specs/stream.md §4.2
    seq:
      - id: state
        type: vcpu_state
        if: is_online
        doc-ref: specs/stream.md §7.3
    instances:
      is_online:
        value: (map_byte >> (number % 8) & 1) == 1
        doc-ref: specs/stream.md §4.2

  vcpu_state:
    doc-ref: specs/stream.md §7.3
    seq:
      - id: context
        size: _root.header.pv.len_vcpu_context
        doc-ref: specs/stream.md §7.3
      - id: extended_context
        size: 128
        if: _root.header.pv.announced.has_extended_context
        doc-ref: specs/stream.md §7.3
      - id: xsave
        type: xsave(_root.header.pv.announced.len_xsave - 16)
        if: _root.header.pv.announced.len_xsave > 0
        doc-ref: specs/stream.md §7.3

  xsave:
    doc-ref: specs/stream.md §7.3
    params:
      - id: len_data
        type: u4
        doc: By `xcnt`, whatever `size` says.
        doc-ref: specs/stream.md §7.3
    seq:
      - id: mask
        type: u8
        doc-ref: specs/stream.md §7.3
      - id: size
        type: u8
        doc-ref: specs/stream.md §7.3
      - id: data
        size: len_data
        doc-ref: specs/stream.md §7.3

enums:
  guest:
    0: hvm
    1: pv
  chunk_id:
    -1: enable_verify_mode
    -2: vcpu_info
    -3: hvm_ident_pt
    -4: hvm_vm86_tss
    -5: tmem
    -6: tmem_extra
    -7: tsc_info
    -8: hvm_console_pfn
    -9: last_checkpoint
    -10: hvm_acpi_ioports_location
    -11: hvm_viridian
    -12: compressed_data
    -13: enable_compression
    -14: hvm_generation_id_addr
    -15: hvm_paging_ring_pfn
    -16: hvm_access_ring_pfn
    -17: hvm_sharing_ring_pfn
    -18: toolstack
    -19: hvm_ioreq_server_pfn
    -20: hvm_nr_ioreq_server_pages
    -21: hvm_x87_fip_width
  page_type:
    0x0: notab
    0x1: l1tab
    0x2: l2tab
    0x3: l3tab
    0x4: l4tab
    0x8: notab_pinned
    0x9: l1tab_pinned
    0xa: l2tab_pinned
    0xb: l3tab_pinned
    0xc: l4tab_pinned
    0xd: broken
    0xe: xalloc
    0xf: xtab
