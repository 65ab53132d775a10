"""The legacy save stream, from bytes to events and back, by one grammar (specs/stream.md).

No I/O, no clock.
"""
