"""QEMU's migration stream (specs/qemu-ram.md): bytes to events, without I/O."""
