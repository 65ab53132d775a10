"""Live virtual machines: an unpatched QEMU as a source and as a standby, and its network."""
