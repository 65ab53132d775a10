"""The session between a backup and a primary, or a control client (specs/session.md). No I/O, no clock.

messages    the messages, and what each field may hold
frames      messages and stream bytes as frames: headers, checksums, compression, limits
rules       who may send what and when
incoming    bytes to messages
outgoing    messages to bytes
machine     `Session`: one connection in both directions, from its preface to its end
"""
