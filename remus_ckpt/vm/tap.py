"""TAP devices: a network card of this host whose wire ends in a program.

Source: the kernel's Documentation/networking/tuntap.rst; netdevice(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from remus_ckpt.errors import BridgeError

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 0x0001
_MAX_NAME_BYTES = 15
_REASONS = {
    errno.EBUSY: "another program has it: stop that program, or name another device",
    errno.EPERM: "it needs root, or a device made for this user: ip tuntap add {} mode tap user {}",
    errno.EINVAL: "there is a device of this name, but of another kind: make it with ip tuntap add {} mode tap",
}


@dataclass(frozen=True, slots=True)
class Tap:
    """An open TAP device; a read or a write, which never block, is one Ethernet frame without anything before it."""

    fd: int
    name: str

    def close(self) -> None:
        """Let go of the device. If it was made by `open_tap`, it is removed with its last descriptor."""
        os.close(self.fd)


def open_tap(name: str) -> Tap:
    """Open the TAP device of this name in our network namespace, and bring it up; if there is none, it is made.

    Raises BridgeError if that cannot be done, and says why.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= _MAX_NAME_BYTES or b"%" in encoded or b"/" in encoded:
        raise BridgeError(f"{name!r} is not a name for a TAP device: 1 to {_MAX_NAME_BYTES} bytes, without % and /")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BridgeError(f"/dev/net/tun: {error.strerror}; a TAP device needs it (modprobe tun), and root") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", encoded, _IFF_TAP | _IFF_NO_PI))
        _bring_up(encoded)
    except OSError as error:
        os.close(fd)
        reason = _REASONS.get(error.errno or 0, error.strerror or "")
        raise BridgeError(f"TAP device {name}: {reason.format(name, os.geteuid())}") from error
    return Tap(fd, name)


def _bring_up(name: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", name, 0))
        flags = struct.unpack("16sH22x", answer)[1]
        if not flags & _IFF_UP:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
