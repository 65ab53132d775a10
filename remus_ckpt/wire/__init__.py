"""The legacy save stream as bytes and events: one grammar, a reader and a writer (specs/stream.md).

No I/O, no clock.
"""
