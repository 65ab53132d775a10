"""The session between a primary and its backup, or one who asks (specs/session.md). No I/O, no clock.

messages    what they say, and what each field may hold
frames      messages and stream bytes as frames: headers, checksums, compression, limits
machine     who may say what when; `Session` is one connection from its preface to its end
"""
