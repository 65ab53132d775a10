"""The session between a backup and a primary, or a control client (specs/session.md). No I/O, no clock.

messages    the messages, and what each field may hold
frames      messages and stream bytes as frames: headers, checksums, compression, limits
machine     who may send what and when; `Session` is one connection from its preface to its end
"""
