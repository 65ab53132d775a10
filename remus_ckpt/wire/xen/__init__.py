"""The legacy save stream of Xen 4.0 to 4.5 (specs/stream.md): bytes to events, events to bytes. No I/O, no clock."""
